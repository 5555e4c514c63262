"""Sinks and caps: every backend against loops and against plain torch, gradients included; who refuses what."""

import math
from unittest import mock

import pytest
import torch

from distattn_hf import distance_attention, explain_backend, register_metric
from distattn_hf.core.attention import run_attention
from distattn_hf.core.inputs import AttentionInputs
from distattn_hf.core.metrics import METRICS
from tests.tolerances import assert_close

from .cases import (
    CAPPED_CASES,
    CAPPED_DECODING_CASES,
    CASES,
    DECODING_CASES,
    FLOAT64_CASES,
    METRIC_CASES,
    evaluate,
    lambdas,
    make_tensors,
    metric_id,
    needs_compiler,
    padded,
    some,
    with_empty_rows,
)
from .oracles import _oracle

SINKS = {"head": (4,), "query": (2, 4, 11, 1), "far above": (4,), "far below": (4,)}
MASKS = {
    "none": lambda: {},
    "causal": lambda: {"is_causal": True},
    "padding": lambda: {"mask": padded(2, 13)},
    "each query": lambda: {"mask": some(2, 1, 11, 13)},
    "causal + each head": lambda: {"is_causal": True, "mask": some(2, 4, 11, 13)},
    "empty rows": lambda: {"mask": with_empty_rows(2, 11, 13, 4)},
}


def sink_logits(name, dtype=torch.float32):
    offset = {"far above": 60.0, "far below": -60.0}.get(name, 0.0)
    return (2 * torch.randn(SINKS[name], dtype=torch.float64) + offset - 2).to(dtype)


def loops(metric, p, query, key, value, lam, scaling, sink, softcap, is_causal):
    """One entry at a time: exp(capped logit) over exp(sink) + Σ exp(capped logit); the lift's logits are q·k's."""
    distance = _oracle("dot" if metric == "lifted_sqeuclidean" else metric, 0.0)
    factor = 2.0 if metric == "lifted_sqeuclidean" else 1.0
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    output = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    for b in range(len(query)):
        for h in range(heads):
            keys, values = key[b, h // group].tolist(), value[b, h // group]
            for i, q in enumerate(query[b, h].tolist()):
                logits = [-factor * lam[h] * scaling * distance(q, k, keys, p) for k in keys]
                if softcap is not None:
                    logits = [softcap * math.tanh(logit / softcap) for logit in logits]
                terms = [math.exp(x) if not is_causal or j <= i else 0.0 for j, x in enumerate(logits)]
                total = math.fsum(terms) + math.exp(sink[h])
                output[b, h, i] = sum(term / total * v for term, v in zip(terms, values, strict=True))
    return output


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("metric", "p"), METRIC_CASES, ids=[metric_id(c) for c in METRIC_CASES])
def test_the_reference_is_the_formula(metric, p, softcap):
    tensors = make_tensors(5, 7, 3, 4, batch=1, heads=2, key_heads=1, dtype=torch.float64)
    sink, lam = torch.tensor([0.4, -1.3], dtype=torch.float64), [0.6, 1.4]
    for is_causal in (False, True):
        got = distance_attention(
            **tensors, metric=metric, p=p, lam=torch.tensor(lam, dtype=torch.float64), scaling=0.4, sink_logit=sink,
            softcap=softcap, is_causal=is_causal, backend="reference",
        )  # fmt: skip
        expected = loops(metric, p, *tensors.values(), lam, 0.4, sink.tolist(), softcap, is_causal)
        assert_close(got, expected, "float64")


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", [c for c in CASES if c.backend != "reference"], ids=str)
def test_sinks_of_every_backend_and_their_gradients(case, mask, sink):
    tensors = make_tensors(11, 13, 8, 6, heads=4, key_heads=2)
    tensors |= {"lam": lambdas(4), "sink_logit": sink_logits(sink)}
    options = MASKS[mask]()
    expected = evaluate(case.reference, tensors, torch.float64, **options)
    actual = evaluate(case, tensors, **options)
    for name, value in expected.items():
        assert_close(actual[name], value, "float32_forward" if name == "output" else "float32_gradient", name)


# The matmul forms of l2 and sqeuclidean have other digits.
@pytest.mark.parametrize(
    "case",
    [
        case
        for case in FLOAT64_CASES
        if case.backend != "reference"
        and (case.backend != "chunked" or case.softening or case.metric not in ("l2", "sqeuclidean"))
    ],
    ids=str,
)
def test_sinks_in_float64(case):
    tensors = make_tensors(11, 13, 8, 6, heads=4, key_heads=2, dtype=torch.float64)
    tensors |= {"lam": lambdas(4), "sink_logit": sink_logits("query", torch.float64)}
    expected = evaluate(case.reference, tensors, torch.float64, is_causal=True)
    actual = evaluate(case, tensors, torch.float64, is_causal=True)
    for name, value in expected.items():
        assert_close(actual[name], value, "float64", name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in DECODING_CASES if c.backend != "reference"], ids=str)
def test_sinks_when_decoding(case, dtype):
    """One query, keys in either type, a sink that outweighs all keys of one head."""
    tensors = make_tensors(1, 300, 8, 6, heads=4, key_heads=2, dtype=dtype)
    sink = torch.tensor([-2.0, 0.0, 3.0, 80.0])
    options = {"lam": lambdas(4), "mask": padded(2, 300)}
    got = case(**tensors, sink_logit=sink, **options)
    rounded = {name: tensor.double() for name, tensor in tensors.items()}
    options["lam"] = options["lam"].double()
    expected = case.reference(**rounded, sink_logit=sink.double(), **options)
    if dtype == torch.float32:
        assert_close(got, expected, "float32_forward")
    else:
        torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", [c for c in CAPPED_CASES if c.backend != "reference"], ids=str)
def test_caps_and_their_gradients(case, mask):
    """Beside a bias, which joins the capped logits, and a sink."""
    tensors = make_tensors(11, 13, 8, 6, heads=4, key_heads=2)
    tensors |= {"lam": lambdas(4), "sink_logit": sink_logits("head"), "position_bias": torch.randn(1, 4, 11, 13)}
    options = {**MASKS[mask](), "softcap": 0.7}
    expected = evaluate(case.reference, tensors, torch.float64, **options)
    actual = evaluate(case, tensors, **options)
    for name, value in expected.items():
        assert_close(actual[name], value, "float32_forward" if name == "output" else "float32_gradient", name)


@pytest.mark.parametrize("shift", [None, "head", "query"])
@pytest.mark.parametrize("case", [c for c in CAPPED_CASES if c.backend != "reference"], ids=str)
def test_a_shift_inside_the_cap_and_its_gradient(case, shift):
    """What converted heads pass: from where their logits count."""
    shape = {"head": (1, 4, 1, 1), "query": (2, 4, 70, 1)}.get(shift)
    tensors = make_tensors(70, 150, 8, 6, heads=4, key_heads=2) | {"lam": lambdas(4)}
    if shape is not None:
        tensors["shift"] = 3 * torch.randn(shape) + 2
    metric = METRICS.get(case.metric)

    def run(query, key, value, lam, shift=None, backend="reference"):
        inputs = AttentionInputs(
            query, key, value, metric, lam, 0.5, case.p, softening=case.softening or None, softcap=1.3, shift=shift,
            is_causal=True,
        )  # fmt: skip
        return run_attention(inputs, backend)

    expected = evaluate(run, tensors, torch.float64)
    actual = evaluate(run, tensors, backend=case.backend)
    for name, value in expected.items():
        scale = value.abs().max().clamp_min(1)
        kind = "float32_forward" if name == "output" else "float32_gradient"
        assert_close(actual[name] / scale, value / scale, kind, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in CAPPED_DECODING_CASES if c.backend != "reference"], ids=str)
def test_caps_when_decoding(case, dtype):
    tensors = make_tensors(1, 300, 8, 6, heads=4, key_heads=2, dtype=dtype)
    options = {"lam": lambdas(4), "mask": padded(2, 300), "softcap": 1.3}
    got = case(**tensors, sink_logit=torch.tensor([-2.0, 0.0, 3.0, 1.0]), **options)
    rounded = {name: tensor.double() for name, tensor in tensors.items()}
    options["lam"] = options["lam"].double()
    expected = case.reference(**rounded, sink_logit=torch.tensor([-2.0, 0.0, 3.0, 1.0]).double(), **options)
    if dtype == torch.float32:
        assert_close(got, expected, "float32_forward")
    else:
        torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.02)


@needs_compiler
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("cap", [0.3, 1.0, 20.0, 1e5])
def test_the_kernels_tanh_keeps_its_digits(cap, queries):
    """Logits from 0 to 12 caps, densely: weights of a value of ones each; of a large cap, tanh(x) is x."""
    points = torch.linspace(0, min(12 * cap, 30.0), 1500)
    key, value = -points[None, None, :, None].repeat(1, 2, 1, 1), torch.eye(1500).expand(1, 2, -1, -1)
    options = {"metric": "l1", "lam": 1.0, "scaling": 1.0, "softcap": cap}
    weights = distance_attention(torch.zeros(1, 2, queries, 1), key, value, **options, backend="cpp")
    logits = weights.double().log()
    logits = logits - logits[..., :1]
    exact = -cap * torch.tanh(points.double() / cap)
    # The last bit of tanh and of exp, and the rounding of cap·tanh.
    assert float((logits - exact).abs().max()) < 4e-7 * max(1.0, min(cap, 30.0)) + 4e-7


@needs_compiler
@pytest.mark.parametrize("queries", [1, 20])
def test_a_cap_bounds_what_is_infinitely_far(queries):
    """A key at infinity has a logit of -cap; a NaN reaches the rows that see it, and no others."""
    tensors = make_tensors(queries, 20, 8)
    options = {"metric": "l1", "softcap": 2.0}
    tensors["key"][0, 0, 5] = torch.inf
    got = distance_attention(**tensors, **options, backend="cpp")
    assert_close(got, distance_attention(**tensors, **options, backend="chunked"), "float32_forward")
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[:, 5] = False
    expected = distance_attention(**tensors, **options, mask=keep, backend="cpp")
    tensors["key"][0, 0, 5] = torch.nan
    assert torch.equal(distance_attention(**tensors, **options, mask=keep, backend="cpp"), expected)
    assert distance_attention(**tensors, **options, backend="cpp")[0, 0].isnan().all()


@pytest.mark.parametrize("queries", [1, 30])
@pytest.mark.parametrize("metric", ["l2", "cosine", "lifted_sqeuclidean"])
def test_a_cap_in_one_graph(metric, queries):
    """torch.compile(fullgraph=True) gives what eager gives, gradients included."""
    tensors = [t.requires_grad_() for t in make_tensors(queries, 30, 12).values()]
    sink = torch.tensor([0.5, -1.0], requires_grad=True)

    def function(query, key, value, sink):
        return distance_attention(query, key, value, metric=metric, lam=1.0, sink_logit=sink, softcap=0.8)

    torch.compiler.reset()
    results = []
    for run in (function, torch.compile(function, fullgraph=True)):
        output = run(*tensors, sink)
        results.append((output, *torch.autograd.grad(output.square().sum(), (*tensors, sink))))
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected.detach(), "float32_gradient")


def test_half_precision_keeps_the_digits_of_the_sink():
    """A column of bfloat16 would round 9.77 / scale to 1 part in 256, and the sink's weight by 4%."""
    query = torch.zeros(1, 1, 3, 8, dtype=torch.bfloat16)
    key, value = torch.zeros(1, 1, 5, 8, dtype=torch.bfloat16), torch.ones(1, 1, 5, 8, dtype=torch.bfloat16)
    sink = torch.tensor([math.log(5) + 0.001])
    for metric in ("dot", "sqeuclidean", "lifted_sqeuclidean"):
        got = distance_attention(query, key, value, metric=metric, lam=1.0, sink_logit=sink, backend="sdpa")
        assert torch.allclose(got.float(), torch.tensor(0.5), atol=2e-3)


@pytest.mark.parametrize("metric", ["l2", "cosine", "sqeuclidean"])
@pytest.mark.parametrize("backend", ["auto", "cpp", "sdpa", "chunked", "reference"])
@pytest.mark.parametrize("empty", [False, True], ids=["", "empty rows"])
def test_a_sink_of_minus_infinity_is_none(metric, backend, empty):
    if (metric, backend) in (("l2", "sdpa"), ("cosine", "cpp")):
        pytest.skip("l2 has no dot-product form, and cosine no kernel for many queries")
    tensors = make_tensors(40, 40, heads=2)
    mask = with_empty_rows(2, 40, 40, 2) if empty else None
    plain = distance_attention(**tensors, metric=metric, mask=mask)
    got = distance_attention(
        **tensors, metric=metric, mask=mask, sink_logit=torch.full((2,), -math.inf), backend=backend
    )
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("metric", list(METRICS))
def test_who_runs_caps(metric):
    """The CPU kernels run all metrics, gradients included; others say so, and an explicit one never falls back."""
    tensors = make_tensors(40, 40, heads=2)
    p = 3 if metric == "lp" else None
    for options in ({"num_queries": 40}, {"num_queries": 40, "requires_grad": True}, {"num_queries": 1}):
        choice = explain_backend(metric=metric, p=p, softcap=2.0, **options)
        assert choice.backend == "cpp"
        assert "softcap" in choice.reasons["sdpa"] or "no dot-product form" in choice.reasons["sdpa"]
    on_gpu = "triton" if metric in ("l1", "l2", "lp", "chebyshev") else "chunked"
    for sink in (False, True):  # of a device that need not be here
        given = {"num_queries": 40, "softcap": 2.0, "device": "cuda", "sink": sink}
        assert explain_backend(metric=metric, p=p, **given).backend == on_gpu
    for backend in ("sdpa", "triton"):
        with pytest.raises(ValueError, match=f"backend '{backend}' cannot run this"):
            distance_attention(**tensors, metric=metric, p=p, softcap=2.0, backend=backend)


def test_a_metric_of_ones_own_has_no_constant_that_sdpa_could_know():
    class Mine(type(METRICS.get("dot"))):
        name = "mine_with_dot_form"

    with mock.patch.dict(METRICS._entries):
        register_metric(Mine.name, Mine())
        tensors, sink = make_tensors(5, 5, heads=2), torch.zeros(2)
        with pytest.raises(ValueError, match="which is not known"):
            distance_attention(**tensors, metric=Mine.name, sink_logit=sink, backend="sdpa")
        got = distance_attention(**tensors, metric=Mine.name, sink_logit=sink)
        torch.testing.assert_close(got, distance_attention(**tensors, metric="dot", sink_logit=sink))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "softcap must be None or a positive finite number, got 0.0"),
        ({"softcap": True}, "softcap must be None"),
        ({"softcap": math.inf}, "softcap must be None"),
        ({"sink_logit": torch.zeros(3)}, r"sink_logit must be floating-point and \(H,\)=\(2,\)"),
        ({"sink_logit": torch.zeros(1, 2, 1, 5)}, "sink_logit must be"),
        ({"sink_logit": torch.zeros(2, dtype=torch.long)}, "sink_logit must be floating-point"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        distance_attention(**make_tensors(5, 5, heads=2), metric="l2", **options)
