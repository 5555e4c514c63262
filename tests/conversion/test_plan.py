"""Which layers and heads a plan converts, and that the others keep dot-product attention."""

import pytest
import torch

from distattn_hf import AttentionSpec, convert, register_metric
from distattn_hf.core.metrics import METRICS
from tests.conversion.models import FAMILIES, bert, gpt2, llama, t5, token_batch
from tests.tolerances import EXACT_LOGITS


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(None, [0, 1]), ([1], [1]), ("0", [0]), ("0-1", [0, 1]), ("h.1.*", [1]), ((0, 1), [0, 1])],
)
def test_layers(layers, expected):
    student = convert(gpt2(), AttentionSpec("l2", layers=layers), init="plain")
    assert sorted(student.attention_states) == [f"h.{i}.attn" for i in expected]


def test_layers_argument_applies_to_specs_that_name_none():
    student = convert(gpt2(), AttentionSpec("l2"), init="plain", layers=[1])
    assert list(student.attention_states) == ["h.1.attn"]
    report = student.conversion_report
    assert report.unconverted == ["h.0.attn"]


@pytest.mark.parametrize(("kind", "count"), [("self", 4), ("cross", 2), (None, 6)])
def test_attention_kind(kind, count):
    student = convert(t5(), AttentionSpec("l2", attention=kind), init="plain")
    assert len(student.attention_states) == count


def test_unconverted_layers_are_the_teachers():
    """Only layer 1 changes, so what layer 0 puts out is bit-equal."""
    teacher = llama()
    batch = token_batch(teacher, padded=True)
    student = convert(teacher, AttentionSpec("chebyshev", layers=[1]), init="plain")
    with torch.no_grad():
        mine, theirs = (m(**batch, output_hidden_states=True).hidden_states for m in (student, teacher))
    assert torch.equal(mine[1], theirs[1])
    assert not torch.allclose(mine[2], theirs[2], atol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_heads_left_out_keep_dot_product_attention(family):
    """Exact on two heads and dot product on the other two is the teacher; a swap of heads would not be."""
    teacher = FAMILIES[family]()
    batch = token_batch(teacher, padded=True)
    student = convert(teacher, AttentionSpec(heads=[0, 3]), init="exact")
    with torch.no_grad():
        difference = (student(**batch).logits - teacher(**batch).logits)[batch["attention_mask"].bool()]
    assert difference.abs().max() <= EXACT_LOGITS


def test_mixed_plan_weights_match_each_metric_alone():
    """Heads 0-1 by l2 and 2-3 by l1 give, head by head, the weights of the models converted whole."""
    teacher = bert()
    batch = token_batch(teacher, padded=True)
    plan = [AttentionSpec("l2", heads=[0, 1]), AttentionSpec("l1", heads=[2, 3])]
    mixed = convert(teacher, plan, init="plain")
    with torch.no_grad():
        weights = mixed(**batch, output_attentions=True).attentions[0]
        for spec, heads in (("l2", slice(0, 2)), ("l1", slice(2, 4))):
            whole = convert(teacher, AttentionSpec(spec), init="plain")
            expected = whole(**batch, output_attentions=True).attentions[0]
            torch.testing.assert_close(weights[:, heads], expected[:, heads])


def test_specs_for_different_layers():
    plan = [AttentionSpec("l2", layers=[0]), AttentionSpec("l1", layers=[1])]
    states = convert(gpt2(), plan, init="plain").attention_states
    assert [state.groups[0].metric for state in states.values()] == ["l2", "l1"]


@pytest.mark.parametrize("metric", [m for m in METRICS if METRICS.get(m).is_distance and not m.startswith("lifted")])
def test_calibration_helps_every_metric(metric):
    teacher = gpt2()
    batches = [token_batch(teacher, length=32, seed=seed) for seed in range(6)]
    spec = AttentionSpec(metric, p=3.0 if metric == "lp" else None)
    student = convert(teacher, spec, calibration=batches)
    report = student.conversion_report
    assert report.mean_divergence_after < 0.8 * report.mean_divergence_before
    for group in report.groups:
        assert all(after <= before + 1e-6 for before, after in zip(group.divergence_before, group.divergence_after))


def test_calibration_is_deterministic_and_reads_any_form():
    teacher = gpt2()
    batches = [token_batch(teacher, length=32, seed=seed) for seed in range(4)]
    first, second = (convert(teacher, AttentionSpec("l2"), calibration=batches).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    datasets = pytest.importorskip("datasets")
    rows = torch.cat([b["input_ids"] for b in batches])
    dataset = datasets.Dataset.from_dict({"input_ids": rows.tolist()})
    third = convert(teacher, AttentionSpec("l2"), calibration=dataset).state_dict()
    name = "transformer.h.0.attn.distattn.groups.0.log_lambda"
    torch.testing.assert_close(first[name], third[name])


def test_divergence_in_the_report_is_that_of_the_weights():
    """The reported number against KL computed from both models' attention weights, on the same held-out rows."""
    teacher = bert()
    batches = [token_batch(teacher, length=24, seed=seed) for seed in range(8)]
    student = convert(teacher, AttentionSpec("l2", layers=[0]), calibration=batches)
    held_out = batches[-1]
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        expected = teacher(**held_out, output_attentions=True).attentions[0]
        got = student(**held_out, output_attentions=True).attentions[0]
    divergence = (expected * (expected.log() - got.log())).sum(-1).mean((0, 2))
    reported = torch.tensor(student.conversion_report.groups[0].divergence_after)
    # The report draws 128 rows a sequence with replacement from 24: the same mean up to sampling noise.
    torch.testing.assert_close(reported, divergence, rtol=0.35, atol=5e-4)


def test_user_metric_converts_and_reloads(tmp_path):
    register_metric("test_half_l1", lambda q, k: 0.5 * (q[..., :, None, :] - k[..., None, :, :]).abs().sum(-1))
    student = convert(gpt2(), AttentionSpec("test_half_l1"), init="plain")
    batch = token_batch(student)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, student(**batch).logits)
    del METRICS._entries["test_half_l1"]
    with pytest.raises(ValueError, match="unknown metric 'test_half_l1'"):
        type(student).from_pretrained(tmp_path)
