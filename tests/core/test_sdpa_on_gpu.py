"""The form in which `sdpa` hands problems to PyTorch on a GPU (norms as columns, half precision), run on the CPU."""

import pytest
import torch
from torch.nn import functional as F

from distattn_hf import distance_attention
from distattn_hf.core import backend_sdpa
from distattn_hf.core.metrics import get_metric
from tests.tolerances import HALF_ERROR_RATIO, assert_close

from .cases import evaluate, make_tensors
from .test_half_precision import DTYPES, errors

both_metrics = pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
MASKS = {"causal": True, "per query": False, "padding": False, "none": False}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backend_sdpa, "_on_cuda", lambda inputs: True)
    # CPU only, and chosen by the tensors' own device.
    monkeypatch.setattr(backend_sdpa, "can_run_in_parts", lambda *arguments: False)


def attention(metric: str, backend: str, **options):
    def attend(query, key, value, lam):
        return distance_attention(query, key, value, metric=metric, backend=backend, lam=lam, **options)

    return attend


def options_of(mask: str, length: int) -> dict:
    keep = torch.rand(2, 1, length if mask == "per query" else 1, length) < 0.7
    keep[..., 0] = True
    return {"is_causal": mask == "causal", "mask": keep if mask in ("per query", "padding") else None}


def problem(metric: str, head_dim: int, dtype=torch.float32, length: int = 40) -> dict:
    tensors = make_tensors(length, head_dim=head_dim, heads=8, key_heads=2, dtype=dtype)
    lam = get_metric(metric).default_lambda(head_dim, head_dim**-0.5)
    return {**tensors, "lam": lam * torch.linspace(0.5, 1.5, 8)}


@both_metrics
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [17, 64, 256])
def test_float32(metric, mask, head_dim):
    """256 leaves the flash kernel no room for a column, and a mask cannot stand beside the causal flag."""
    tensors, options = problem(metric, head_dim), options_of(mask, 40)
    expected = evaluate(attention(metric, "reference", **options), tensors, torch.float64)
    actual = evaluate(attention(metric, "sdpa", **options), tensors)
    for name, value in expected.items():
        assert_close(actual[name], value, "float32_forward" if name == "output" else "float32_gradient", name)


@both_metrics
@DTYPES
@pytest.mark.parametrize("head_dim", [64, 256])
def test_half_precision_error_is_within_twice_pytorchs(metric, dtype, head_dim):
    """The gradient of λ included: PyTorch's yardstick has a temperature for each head."""

    def pytorch(query, key, value, lam):
        query = query * (lam / lam.detach().mean()).to(query.dtype)[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def mean(draws, name):
        return [sum(draw[name][kind] for draw in draws) / len(draws) for kind in (0, 1)]

    ours, theirs = [], []
    # λ has eight numbers, whose error in one draw is a matter of chance.
    for _ in range(5):
        tensors = problem(metric, head_dim, dtype, length=96)
        expected = evaluate(attention(metric, "reference", is_causal=True), tensors, torch.float64)
        ours.append(errors(evaluate(attention(metric, "sdpa", is_causal=True), tensors), expected))
        theirs.append(errors(evaluate(pytorch, tensors), evaluate(pytorch, tensors, torch.float64)))
    for name in expected:
        for mine, budget in zip(mean(ours, name), mean(theirs, name)):
            assert mine <= HALF_ERROR_RATIO * budget, f"{name}: error {mine:.2e}, PyTorch's {budget:.2e}"


@both_metrics
@DTYPES
@pytest.mark.parametrize("causal", [False, True])
def test_a_sink_is_where_it_was_beside_norms_in_columns(metric, dtype, causal):
    """What is taken off all key norms, the sink loses, too: its error is of the size of that without a sink."""
    tensors = problem(metric, 64, dtype)
    # Where the keys' logits are.
    sink = torch.full((8,), -1.0 if metric == "cosine" else -16.0)
    found = {}
    for name, options in (("plain", {}), ("sink", {"sink_logit": sink})):
        expected = attention(metric, "reference", is_causal=causal, **options)(
            **{n: t.double() for n, t in tensors.items()}
        )
        actual = attention(metric, "sdpa", is_causal=causal, **options)(**tensors)
        found[name] = float((actual.double() - expected).norm())
    assert found["sink"] <= 2 * found["plain"]
