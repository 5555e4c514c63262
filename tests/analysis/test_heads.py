"""Looking at a model's attention, and comparing two."""

import math

import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distattn_hf import AttentionSpec, CalibrationOptions, convert
from distattn_hf.analysis.comparison import NUM_BUCKETS, Comparison, compare, row_correlation
from distattn_hf.analysis.export import to_bertviz
from distattn_hf.analysis.intervention import prune_heads, replaced_heads
from distattn_hf.analysis.rollout import attention_rollout
from distattn_hf.analysis.samples import AnalysisOptions, TextLoss, make_batches
from distattn_hf.analysis.statistics import measure
from distattn_hf.analysis.watch import capture, watched
from tests.analysis.models import letter_tokenizer
from tests.conversion import absolute_models
from tests.conversion.models import FAMILIES, bert, gpt2, token_batch
from tests.tolerances import CACHED_LOGITS, assert_close

# Whole float32 models: rounding through two layers and a softmax, as tests.tolerances.CACHED_LOGITS.
FLOAT32 = {"rtol": 0, "atol": 5e-5}


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_watching_changes_no_bit_and_leaves_nothing_behind(family, converted):
    model = FAMILIES[family]()
    if converted:
        model = convert(model, AttentionSpec("l2"), init="plain")
    batch = token_batch(model, padded=True)
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    with torch.no_grad():
        plain, seen = model(**batch).logits, []
        with watched(model, lambda call: seen.append(call.output.clone())):
            assert torch.equal(model(**batch).logits, plain)
        with pytest.raises(RuntimeError, match="broken"), watched(model, _break):
            model(**batch)
        assert torch.equal(model(**batch).logits, plain)
    assert len(seen) == (6 if family == "t5" else 2)
    assert before == ALL_ATTENTION_FUNCTIONS._local_mapping


def test_watching_can_be_nested():
    model, seen = gpt2(), []
    batch = token_batch(model)
    with watched(model, lambda call: seen.append("outer")), torch.no_grad():
        with watched(model, lambda call: seen.append("inner")):
            model(**batch)
        model(**batch)
    assert seen == ["outer", "inner"] * 2 + ["outer"] * 2


def _break(call):
    raise RuntimeError("broken")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_make_the_output(family, padded):
    """weights · values is what the model itself computed, whatever masks, flags, biases and grouped keys it used."""
    model = FAMILIES[family]()
    batch = token_batch(model, padded=padded)
    for call in capture(model, batch).values():
        assert_close(call.full() @ call.value, call.output, "float32_forward", call.name)


def test_other_implementations_come_back():
    model = gpt2()
    model.config._attn_implementation_internal = "flex_attention"
    with watched(model, lambda call: None):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "flex_attention"


def test_models_off_the_interface_are_asked_for_their_maps():
    model = BloomForCausalLM(BloomConfig(n_layer=2, n_head=2, hidden_size=16, vocab_size=64)).eval()
    batch = token_batch(model, length=9, padded=True)
    found = measure(model, [batch])
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).attentions
    row = maps[1][1, 1, 4, :5].double()
    expected = [float(torch.special.entr(w[1, 1, i, : i + 1].double()).sum()) for w in maps for i in range(9)]
    call = capture(model, batch)["attentions.1"]
    assert_close(call.rows(4, 5).weights[1, 1, 0, :5].double(), row, "equal")
    # Item 0 has 2 tokens after 7 of padding: its one row with two keys, beside 8 of item 1.
    assert [head.rows for head in found.heads] == [9] * 4
    assert max(head.entropy for head in found.heads) <= max(expected) + 1e-6
    with pytest.raises(ValueError, match="no attention weights available from this model: BloomForCausalLM does not"):
        prune_heads(model, {0: [0]})


def test_a_model_without_attention_says_so():
    model = MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=16, state_size=4)).eval()
    with pytest.raises(ValueError, match="no attention weights available from this model: MambaForCausalLM"):
        measure(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])


def native(**options):
    from distattn_hf.core.configuration_native import DistAttnConfig
    from distattn_hf.core.modeling_distattn import DistAttnForCausalLM, DistAttnForMaskedLM

    config = DistAttnConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=64, intermediate_size=16,
        max_position_embeddings=32, pad_token_id=0, initializer_range=0.5, **{"is_decoder": True, **options},
    )  # fmt: skip
    return (DistAttnForCausalLM if config.is_decoder else DistAttnForMaskedLM)(config).eval()


@pytest.mark.parametrize("mechanism", ["dot", "l2"])
def test_native_models_are_watched_and_pruned_as_others(mechanism):
    model = native(mechanism=mechanism)
    batch = token_batch(model, padded=True)
    calls = capture(model, batch)
    assert list(calls) == ["layers.0.self_attn", "layers.1.self_attn"]
    for call in calls.values():
        assert_close((call.full() @ call.value).detach(), call.output, "float32_forward", call.name)
    with torch.no_grad(), replaced_heads(model, {1: [0]}):
        expected = model(**batch).logits
    with torch.no_grad():
        torch.testing.assert_close(prune_heads(model, {1: [0]})(**batch).logits, expected, **FLOAT32)


def test_native_mechanisms_give_their_own_maps():
    model = native(mechanism="performer")
    batch = token_batch(model, length=9)
    found = measure(model, [batch])
    assert found.modules == ["layers.0.self_attn", "layers.1.self_attn"]
    assert [head.rows for head in found.heads] == [16] * 4
    maps = model(**batch, output_attentions=True).attentions
    for call, expected in zip(capture(model, batch).values(), maps, strict=True):
        assert_close(call.full().detach(), expected.detach(), "equal")


def test_a_mechanism_whose_numbers_are_no_weights_says_so():
    model = native(mechanism="linformer", is_decoder=False, mechanism_options={"rank": 4})
    with pytest.raises(ValueError, match="mechanism 'linformer' gives negative numbers, which are no weights"):
        measure(model, [token_batch(model, length=9)])


def test_maps_of_negative_numbers_are_refused(monkeypatch):
    from types import SimpleNamespace

    from distattn_hf.analysis import watch

    weights = torch.tensor([[[[1.5, -0.5], [0.5, 0.5]]]])
    monkeypatch.setattr(watch, "forward", lambda *args, **options: SimpleNamespace(attentions=(weights,)))
    model = MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=16, state_size=4))
    with pytest.raises(ValueError, match="gives negative numbers in attentions, which are no weights"):
        capture(model, {"input_ids": torch.ones(1, 2, dtype=torch.long)})


def test_a_softcap_is_part_of_the_weights():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, hidden_size=16, vocab_size=64,
        intermediate_size=16, attn_logit_softcapping=0.5, attn_implementation="eager", initializer_range=0.5,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    batch = token_batch(model, length=8)
    call = next(iter(capture(model, batch).values()))
    assert call.softcap == 0.5
    assert_close(call.full() @ call.value, call.output, "float32_forward")


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
@pytest.mark.parametrize("spec", [None, "exact", "l2", "sqeuclidean", "cosine", "l1"])
def test_sinks_and_caps_are_part_of_the_weights(family, spec):
    """Weights times values are the outputs, of the untouched model and of every conversion."""
    model = absolute_models.FAMILIES[family]()
    if spec is not None:
        metric, init = ("sqeuclidean", "exact") if spec == "exact" else (spec, "plain")
        model = convert(model, AttentionSpec(metric, transform=None if spec == "exact" else "scalar"), init=init)
    else:
        model.set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        if name.endswith((".origin", ".logit_shift", ".distattn.groups.0.shift")):
            torch.nn.init.normal_(parameter)
    for call in capture(model, token_batch(model, padded=spec is not None)).values():
        weights = call.full()
        torch.testing.assert_close(weights @ call.value, call.output, atol=CACHED_LOGITS, rtol=0)
        assert bool((weights.sum(-1)[:, :, 8:] < 0.99).any()) == (family == "gpt_oss")


def test_a_comparison_counts_the_sink():
    """The rest of a row is a weight like others: KL >= 0 over all of them, and 0 between equals."""
    teacher = absolute_models.gpt_oss()
    batch = token_batch(teacher)
    same = compare(convert(teacher, AttentionSpec(), init="exact"), teacher, [batch])
    other = convert(teacher, AttentionSpec(), init="exact")
    for module in other.attention_modules().values():
        module.sinks.data += 3.0
    apart = compare(other, teacher, [batch])
    assert max(head.divergence for head in same.heads) < 1e-5
    assert min(head.divergence for head in apart.heads) > 0.05


def test_comparison_against_loops():
    teacher = gpt2().double()
    student = convert(gpt2(), AttentionSpec("l2"), init="plain").double()
    batch = token_batch(teacher, padded=True)
    found = compare(student, teacher, [batch])
    for model in (teacher, student):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = [model(**batch, output_attentions=True).attentions for model in (teacher, student)]
    keep = batch["attention_mask"].bool().numpy()
    for module, (name, *pair) in enumerate(zip(found.modules, *maps, strict=True)):
        theirs, mine = (w.double().numpy() for w in pair)
        buckets = [[] for _ in range(NUM_BUCKETS)]
        for head in range(4):
            divergences, correlations = [], []
            for item in range(2):
                tokens = [i for i in range(20) if keep[item, i]]
                for place, i in enumerate(tokens):
                    keys = tokens[: place + 1]
                    if len(keys) > 1:
                        t, s = theirs[item, head, i, keys], mine[item, head, i, keys]
                        divergences.append(float((t * np.log(t / s)).sum()))
                        correlations.append(np.corrcoef(t, s)[0, 1])
                        buckets[place * NUM_BUCKETS // len(tokens)].append(divergences[-1])
            row = found.heads[4 * module + head]
            # Correlations divide by deviations of rows that are almost uniform.
            assert (row.module, row.head, row.rows) == (name, head, len(divergences))
            assert row.divergence == pytest.approx(np.mean(divergences), rel=1e-7)
            assert row.correlation == pytest.approx(np.mean(correlations), abs=1e-6)
            assert row.output_error is None
            assert row.weak_rows is None
        assert found.by_position[name] == pytest.approx([np.mean(b) for b in buckets], rel=1e-7)
    outputs = [capture(model, batch)[found.modules[0]].output for model in (teacher, student)]
    flat = [o.transpose(1, 2).flatten(2)[batch["attention_mask"].bool()] for o in outputs]
    cosine = torch.cosine_similarity(*flat, dim=-1).mean()
    assert found.output_cosine[found.modules[0]] == pytest.approx(float(cosine), abs=1e-6)
    assert Comparison.from_dict(found.to_dict()) == found
    assert list(found.to_frame()["divergence"]) == [h.divergence for h in found.heads]


def test_a_model_is_its_own_equal():
    model = bert()
    found = compare(model, bert(), [token_batch(model, padded=True)])
    assert all(h.divergence < 1e-6 and h.correlation > 1 - 1e-5 for h in found.heads)
    assert all(value > 1 - 1e-6 for value in found.output_cosine.values())


def test_correlation_of_constant_rows():
    keep = torch.tensor([True, True, True, False])
    flat, tilted = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0]]), torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    assert row_correlation(flat, flat, keep).tolist() == [1.0]
    assert row_correlation(flat, tilted, keep).tolist() == [0.0]
    assert float(row_correlation(tilted, tilted, keep)) == pytest.approx(1.0, abs=1e-6)


def test_nystrom_errors_against_the_kernel_written_out():
    teacher = gpt2()
    batch = token_batch(teacher, length=24)
    spec = AttentionSpec("sqeuclidean", mechanism="nystrom", num_landmarks=4, window_size=3, num_sinks=1)
    options = CalibrationOptions(steps=3, progress=False)
    student = convert(teacher, spec, calibration=[batch], options=options)
    found = compare(student, teacher, [batch])
    for name, call in capture(student, batch).items():
        # The lifted kernel at λ = 1/2 is the dot product's own: exact attention on the student's queries and keys.
        group = student.attention_states[name].groups[0]
        query, key = group.map(call.query, call.key)
        assert group.spec.lift, "the case must be a lifted one"
        logits = 2 * group.lam() * call.scaling * (query @ key.mT)
        hidden = torch.ones(24, 24).triu(1).bool()
        exact = logits.detach().masked_fill(hidden, float("-inf")).softmax(-1).double()
        mine, value = call.full().detach().double(), call.value.double()
        for head in range(4):
            rows = slice(1, None)
            error = (mine @ value - exact @ value)[:, head, rows].square().sum()
            norm = (exact @ value)[:, head, rows].square().sum()
            weak = 0
            for item in range(2):
                for i in range(1, 24):
                    near = [j for j in range(i + 1) if i - j < 3 or j == 0]
                    ratio = float(exact[item, head, i, near].sum() / mine[item, head, i, near].sum())
                    weak += max(ratio, 1 / ratio) > 1.25
            statistics = next(h for h in found.heads if (h.module, h.head) == (name, head))
            assert statistics.output_error == pytest.approx(math.sqrt(error / norm), rel=1e-3)
            assert statistics.weak_rows == pytest.approx(weak / 46, abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_rollout_rows_sum_to_one_and_follow_the_recursion(family):
    model = FAMILIES[family]()
    batch = token_batch(model, padded=True)
    parts = (None, "decoder") if family == "t5" else (None,)
    for part in parts:
        found = attention_rollout(model, batch, part=part)
        assert_close(found.sum(-1), torch.ones(found.shape[:2]), "weights_sum")
        assert float(found.min()) >= 0
    if family in ("gpt2", "bert"):
        found = attention_rollout(model, batch, residual=0.3)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            maps = model(**batch, output_attentions=True).attentions
        rolled = torch.eye(20)
        for weights in maps:
            rolled = (0.7 * weights[1].mean(0) + 0.3 * torch.eye(20)) @ rolled
        torch.testing.assert_close(found[1], rolled, **FLOAT32)


def test_bertviz_gets_what_its_views_take():
    """head_view asks for layers of (1, H, N, N) and as many tokens."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = letter_tokenizer()
    found = to_bertviz(gpt2(), tokenizer, "a b c . d")
    assert [tuple(layer.shape) for layer in found["attention"]] == [(1, 4, 5, 5)] * 2
    assert found["tokens"] == ["a", "b", "c", ".", "d"]
    assert_close(found["attention"][0].sum(-1), torch.ones(1, 4, 5), "weights_sum")
    both = to_bertviz(FAMILIES["t5"](T5ForConditionalGeneration), tokenizer, "a b c")
    shapes = [both[f"{part}_attention"][1].shape for part in ("encoder", "decoder", "cross")]
    assert shapes == [(1, 4, 3, 3)] * 3
    assert [len(both[f"{part}_tokens"]) for part in ("encoder", "decoder")] == [3, 3]
    assert "include_layers" not in both
    config = T5Config(num_layers=3, num_decoder_layers=2, num_heads=2, d_model=8, d_kv=4, d_ff=8, vocab_size=64)
    config.decoder_start_token_id = 0
    assert to_bertviz(T5ForConditionalGeneration(config).eval(), tokenizer, "a b")["include_layers"] == [0, 1]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m, t: prune_heads(m, {7: [0]}), r"there is no layer or module 7; layers are \[0, 1\]"),
        (lambda m, t: prune_heads(m, {1: [4]}), "there is no head 4 in 'h.1.attn', which has heads 0 to 3"),
        (lambda m, t: prune_heads(m, {1: [True]}), "there is no head True"),
        (lambda m, t: prune_heads(m, {}), "heads names no head"),
        (lambda m, t: replaced_heads(m, {0: [0]}, "noise").__enter__(), "replacement must be one of zero, uniform"),
        (lambda m, t: replaced_heads(m, {0: [0]}, "mean").__enter__(), "needs means of 'h.0.attn'"),
        (lambda m, t: make_batches(m, t, ["", "  \n"]), "text is empty"),
        (lambda m, t: make_batches(m, t, [3]), "texts must be strings, got int"),
        (lambda m, t: make_batches(m, None, ["a"]), "has no tokenizer files"),
        (lambda m, t: attention_rollout(m, token_batch(m), residual=1.0), r"residual must be in \[0, 1\)"),
        (lambda m, t: attention_rollout(m, token_batch(m), part="decoder"), "part must be None for this model"),
        (lambda m, t: TextLoss(m, t, ["a"]), "no token that a loss could be taken of"),
        (lambda m, t: TextLoss(bert(), t, ["a b"]), "no mask token"),
        (lambda m, t: AnalysisOptions(max_tokens=0), "max_tokens must be an integer >= 1, got 0"),
        (lambda m, t: compare(m, bert(), [token_batch(m)]), "share no attention module: encoder.layer.0"),
    ],
)
def test_errors_say_what_is_allowed(act, message):
    with pytest.raises(ValueError, match=message):
        act(gpt2(), letter_tokenizer())
