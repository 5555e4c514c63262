"""Learned sinks beside Nyström attention: in the normaliser, with a cache, in short rows, in fits."""

from functools import cache

import pytest
import torch

from distattn_hf import AttentionSpec, CalibrationOptions, convert
from distattn_hf.analysis.watch import capture
from distattn_hf.conversion.observe import observed
from distattn_hf.core import nystrom_hybrid as hybrid
from distattn_hf.core.nystrom_hybrid import HybridInputs, hybrid_attention
from distattn_hf.core.reference import reference_hybrid
from tests.conversion.absolute_models import gpt_oss
from tests.conversion.models import token_batch
from tests.conversion.nystrom_cases import in_chunks, padded
from tests.core.cases import needs_compiler
from tests.tolerances import CACHED_LOGITS, EXACT_LOGITS, assert_close


def spec(window_size=6, **options):
    fields = {"num_landmarks": 8, "num_sinks": 2, "exact_below": 0, "layers": "full_attention", **options}
    return AttentionSpec(mechanism="nystrom", window_size=window_size, **fields)


@cache
def student_of(window_size=6, **options):
    """For tests that change nothing in it."""
    teacher = gpt_oss(layers=4)
    batches = [token_batch(teacher, length=40, seed=seed) for seed in range(2)]
    quick = CalibrationOptions(steps=2, progress=False)
    return convert(teacher, spec(window_size, **options), calibration=batches, options=quick)


def inputs_with_a_sink(causal, window, sinks, length=70, dtype=torch.float64) -> HybridInputs:
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    query, key = normal(2, 2, length, 7), normal(2, 2, length, 7)
    key[..., -1] = 0
    keep = torch.ones(2, length, dtype=torch.bool)
    keep[1, : length // 3] = False
    return HybridInputs(
        query, key, normal(2, 2, length, 5), keep, normal(2, 2, length, 4), normal(2, 2, length, 4).exp(), sinks + 1,
        window, causal, has_learned_sink=True,
    )  # fmt: skip


def by_loops(x: HybridInputs, window: int, sinks: int) -> torch.Tensor:
    output = torch.zeros_like(x.value)
    for b in range(2):
        first = x.keep[b].nonzero()[:sinks, 0].tolist()
        for h in range(2):
            for i in range(x.query.shape[2]):
                total, weighted = float(x.query[b, h, i, -1].exp()), torch.zeros(5, dtype=torch.float64)
                for j in range(i + 1 if x.is_causal else x.key.shape[2]):
                    if not x.keep[b, j]:
                        continue
                    exact = abs(i - j) < window or j in first
                    near = x.query[b, h, i, :-1] @ x.key[b, h, j, :-1]
                    weight = near.exp() if exact else x.far_query[b, h, i].exp() @ x.far_key[b, h, j]
                    total, weighted = total + float(weight), weighted + weight * x.value[b, h, j]
                output[b, h, i] = weighted / total
    return output


@pytest.mark.parametrize(("causal", "window", "sinks"), [(True, 5, 2), (True, 0, 0), (False, 5, 2), (False, 0, 1)])
def test_it_is_in_the_normaliser(causal, window, sinks, monkeypatch):
    x = inputs_with_a_sink(causal, window, sinks, length=20)
    expected = by_loops(x, window, sinks)
    assert_close(reference_hybrid(x)[0], expected, "float64")
    monkeypatch.setattr(hybrid, "_BLOCK", 4)
    assert_close(hybrid_attention(x)[0], expected, "float64")


@needs_compiler
@pytest.mark.parametrize("window", [5, 0])
def test_the_kernel_counts_it(window):
    x = inputs_with_a_sink(True, window, 2, length=150)
    single = inputs_with_a_sink(True, window, 2, length=150, dtype=torch.float32)
    names = ("query", "key", "value", "far_query", "far_key")
    single = type(x)(**{**x.__dict__, **{name: getattr(x, name).float() for name in names}})
    assert hybrid.cpp_supports(single)
    assert_close(hybrid_attention(single)[0], reference_hybrid(x)[0], "float32_forward")


@pytest.mark.parametrize("lift", [True, False])
def test_a_window_of_all_keys(lift):
    """Then nothing is far: of the lift it is the teacher's attention, sinks included."""
    student = student_of(64, lift=lift)
    batch = padded(30)
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        got, expected = (model(**batch).logits[valid] for model in (student, gpt_oss(layers=4)))
    if lift:
        assert float((got - expected).abs().max()) <= EXACT_LOGITS
    student.set_attn_implementation("eager")
    with torch.no_grad():
        assert float((student(**batch).logits[valid] - got).abs().max()) <= EXACT_LOGITS
    student.set_attn_implementation("sdpa")


@pytest.mark.parametrize("lift", [True, False])
@pytest.mark.parametrize("sizes", [[30], [12, 1, 1, 16], [1] * 30])
def test_with_a_cache_in_any_chunks(lift, sizes):
    student, batch = student_of(lift=lift), padded(30)
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = student(**batch, use_cache=False).logits
        got, _ = in_chunks(student, batch, sizes)
    assert float((got - expected)[valid].abs().max()) <= CACHED_LOGITS


@pytest.mark.parametrize("lift", [True, False])
def test_rows_of_few_keys_are_exact(lift):
    """By the same sink, on whatever path: rows of up to 20 keys equal those of a window that sees them all."""
    student = student_of(lift=lift)
    batch = padded(16)
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        student.set_attention_options(exact_below=20)
        few = student(**batch).logits[valid]
        student.set_attention_options(exact_below=0, window_size=64)
        whole = student(**batch).logits[valid]
        for state in student.attention_states.values():
            for group in state.groups:
                group.spec = spec(lift=lift)
    student_of.cache_clear()
    assert float((few - whole).abs().max()) <= CACHED_LOGITS


@pytest.mark.parametrize("lift", [True, False])
def test_analyses_see_it(lift):
    for call in capture(student_of(lift=lift), padded(30)).values():
        weights = call.full()
        torch.testing.assert_close(weights @ call.value, call.output, atol=CACHED_LOGITS, rtol=0)
        assert bool((weights.sum(-1)[:, :, 8:] < 0.99).any())


@pytest.mark.parametrize("lift", [True, False])
def test_a_fit_knows_it(lift):
    """With a sink that outweighs all keys a head's output is almost nothing, and so is what there is to fit."""
    teacher = gpt_oss(layers=4)
    for layer in teacher.model.layers:
        layer.self_attn.sinks.data.fill_(30.0)
    batches = [token_batch(teacher, length=40, seed=seed) for seed in range(2)]
    student = convert(
        teacher, spec(lift=lift), calibration=batches, options=CalibrationOptions(steps=2, progress=False)
    )
    for group in student.conversion_report.groups:
        assert max(group.divergence_after) < 1e-3
    seen = []

    def observe(state, query, key, value, call):
        seen.append(call.sink_logit)
        return torch.zeros_like(value)

    with observed(student, observe):
        student(**token_batch(student))
    assert len(seen) == 2
    assert all(bool((sink == 30).all()) for sink in seen)


def test_everything_trains():
    for lift in (True, False):
        student = student_of(lift=lift).train()
        batch = token_batch(student, length=40)
        student.zero_grad()
        student(**batch, labels=batch["input_ids"]).loss.backward()
        names = [".sinks"] if lift else [".sinks", ".origin", ".logit_shift"]
        for name in names:
            gradients = [p.grad for n, p in student.named_parameters() if n.endswith(name)]
            assert gradients
            assert all(g is not None and bool((g != 0).any()) for g in gradients)
        student.zero_grad()
        student.eval()
