"""α moved into the query projection: the same function, α = 1, and a refusal wherever that is not so."""

import pytest
import torch
from transformers import AutoModel, Qwen3Config, Qwen3ForCausalLM

from distattn_hf import AttentionSpec, CalibrationOptions, convert, fold_alpha, revert
from distattn_hf.conversion.convert import current_report
from distattn_hf.conversion.fold import check_foldable
from distattn_hf.training.stages import Stage, StageOptions
from tests.conversion.models import FAMILIES, SPECIAL, gpt2, llama, token_batch

QUICK = CalibrationOptions(steps=3, progress=False)


def qwen3():
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, **SPECIAL,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def converted(teacher, *specs):
    return convert(teacher, list(specs), calibration=[token_batch(teacher, seed=s) for s in range(2)], options=QUICK)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("metric", "options"),
    [
        ("l2", {}),
        ("sqeuclidean", {}),
        ("l1", {"transform": "scalar"}),
        ("lp", {"p": 3.0, "transform": "scalar"}),
        ("chebyshev", {}),
    ],
)
def test_the_same_outputs_with_alpha_one(family, metric, options, tmp_path):
    """Some heads only, so that a factor in the wrong place would reach the others; biases as large as weights."""
    teacher = FAMILIES[family]()
    for name, parameter in teacher.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    student = converted(teacher, AttentionSpec(metric, heads=[0, 2, 3], layers=[1], **options)).double()
    for state in student.attention_states.values():
        state.groups[0].log_alpha.data += torch.linspace(-0.5, 0.2, 3)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    folded = fold_alpha(student)
    batch = token_batch(teacher, padded=True, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(folded(**batch).logits, student(**batch).logits, rtol=1e-9, atol=1e-9)
    for state in folded.attention_states.values():
        assert torch.equal(state.groups[0].log_alpha, torch.zeros(3, dtype=torch.float64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    folded.float().save_pretrained(tmp_path)
    again = type(folded).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, folded(**batch).logits)
    report = current_report(again)
    assert (report.mean_alpha, report.changed_since) == (1.0, True)  # this test changed α by hand


def test_the_report_and_what_the_queries_were_are_kept():
    student = converted(gpt2(), AttentionSpec("l2"))
    folded = fold_alpha(student)
    report = current_report(folded)
    assert (report.mean_alpha, report.changed_since) == (1.0, False)
    assert report.groups[0].divergence_after == current_report(student).groups[0].divergence_after
    with pytest.raises(ValueError, match="its query projections are not the teacher's"):
        revert(folded)
    with pytest.raises(ValueError, match="its query projections are not the teacher's.*train: attention.qk"):
        Stage("transfer", folded, gpt2(), "causal-lm", StageOptions())
    Stage("transfer", folded, gpt2(), "causal-lm", StageOptions(train="attention+qk"))
    # Maps take α themselves, and the teacher's weights stay.
    mapped = fold_alpha(converted(gpt2(), AttentionSpec("l1", transform="maps")))
    assert all(torch.equal(t, dict(gpt2().named_parameters())[n]) for n, t in revert(mapped).named_parameters())


def test_cosine_beside_l2_keeps_what_it_has():
    student = converted(llama(), AttentionSpec("cosine", layers=[0]), AttentionSpec("l2", layers=[1]))
    folded, batch = fold_alpha(student), token_batch(student)
    with torch.no_grad():
        torch.testing.assert_close(folded(**batch).logits, student(**batch).logits, rtol=1e-4, atol=1e-4)


def test_refused():
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not a converted model"):
        fold_alpha(gpt2())
    with pytest.raises(ValueError, match="has no head with α"):
        fold_alpha(converted(gpt2(), AttentionSpec("cosine")))
    with pytest.raises(ValueError, match="'h.0.attn' has Nyström attention"):
        fold_alpha(converted(gpt2(), AttentionSpec(mechanism="nystrom", num_landmarks=4, window_size=4, num_sinks=1)))
    with pytest.raises(ValueError, match="'h.0.attn' has a fixed λ=2 for all heads"):
        fold_alpha(converted(gpt2(), AttentionSpec("l2", lam=2.0, learnable_lambda=False)))
    with pytest.raises(ValueError, match=r"normalises its queries \(q_norm\)"):
        fold_alpha(converted(qwen3(), AttentionSpec("l2")))
    student = converted(llama(), AttentionSpec("l2"))
    layer = student.model.layers[1].self_attn
    layer.q_proj = torch.nn.Sequential(layer.q_proj)
    with pytest.raises(ValueError, match="a plain linear layer; it is Sequential"):
        fold_alpha(student)


@pytest.mark.parametrize(
    ("build", "spec", "message"),
    [
        (gpt2, AttentionSpec("cosine"), "no spec has α"),
        (gpt2, AttentionSpec("l2", transform="none"), "no spec has α"),
        (gpt2, AttentionSpec(mechanism="nystrom"), "mechanism='nystrom' has landmarks"),
        (gpt2, AttentionSpec("l2", lam=2.0, learnable_lambda=False), "has a fixed λ=2"),
        (lambda: llama(clip_qkv=3.0), AttentionSpec("l2"), "clips its queries"),
        (qwen3, AttentionSpec("l2"), "normalises its queries"),
    ],
)
def test_what_cannot_be_folded_is_refused_before_the_fit(build, spec, message):
    with pytest.raises(ValueError, match=message):
        check_foldable(build(), [spec])


def test_what_can_be_folded_passes():
    specs = [AttentionSpec("cosine", layers=[0]), AttentionSpec("l2", layers=[1])]
    for build in FAMILIES.values():
        check_foldable(build(), specs)
    check_foldable(qwen3(), [AttentionSpec("l1", transform="maps")])  # its maps take α


def test_a_bare_model_loads_and_folds(tmp_path):
    converted(llama(), AttentionSpec("l2")).save_pretrained(tmp_path)
    model, batch = AutoModel.from_pretrained(tmp_path).eval(), token_batch(llama())
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        torch.testing.assert_close(fold_alpha(model)(**batch).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
