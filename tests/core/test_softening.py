"""Softened distances: digits and limits of their formulas, gradients of ε, and what takes no ε.

The values themselves are in test_oracle.py (loops) and test_backends.py (every backend), as cases of their own.
"""

from functools import partial

import pytest
import torch

from distattn_hf import AttentionSpec, distance_attention, register_metric
from distattn_hf.core import backend_sdpa
from distattn_hf.core.backends import BACKENDS
from distattn_hf.core.metrics import METRICS, Euclidean, get_metric
from distattn_hf.core.softening import check_softening
from tests.tolerances import assert_close

from .cases import METRIC_CASES, Case, evaluate, make_tensors, metric_id, needs_compiler, runs, upstream_gradient

SOFT = [(metric, p) for metric, p in METRIC_CASES if get_metric(metric).softens]
every_soft = pytest.mark.parametrize(("metric", "p"), SOFT, ids=[metric_id(case) for case in SOFT])


def vectors(count=12, size=9, dtype=torch.float64):
    return torch.randn(count, size, dtype=torch.float64).mul(5).to(dtype), torch.randn(count + 3, size).to(dtype)


def pairs(values):
    """Differences along a row, in which a constant of the row cancels."""
    return values - values[..., :1]


@every_soft
def test_a_small_epsilon_is_the_plain_distance(metric, p):
    query, key = vectors()
    plain = get_metric(metric).distance(query, key, p)
    soft = get_metric(metric).softened_distance(query, key, 1e-9, p)
    torch.testing.assert_close(pairs(soft), pairs(plain), rtol=0, atol=1e-7)


@every_soft
def test_a_large_epsilon_is_the_squared_distance(metric, p):
    """Of cosine the dot product, to which ‖q - k‖² is equal but for norms."""
    query, key = vectors()
    soft = pairs(get_metric(metric).softened_distance(query, key, 1e5, p))
    expected = -query @ key.T if metric == "cosine" else (query[:, None] - key).square().sum(-1)
    expected = pairs(expected)
    factor = (soft * expected).sum() / expected.square().sum()
    assert factor > 0
    torch.testing.assert_close(soft, factor * expected, rtol=1e-4, atol=1e-4 * float(factor * expected.abs().max()))


@every_soft
def test_a_unit_of_length_does_not_matter(metric, p):
    """f(s·q, s·k, s·ε) = s·f(q, k, ε), of cosine f alone, however small s is; gradients are of a degree less."""
    points = [vector.double() for vector in vectors()]
    points[1][0] = points[0][0]
    upstream = torch.randn(12, 15, dtype=torch.float64)
    results = []
    for scale in (1.0, 1e-7):
        leaves = [(scale * point).requires_grad_() for point in points]
        distances = get_metric(metric).softened_distance(*leaves, 0.5 * scale, p)
        unit = 1.0 if metric == "cosine" else scale
        gradients = torch.autograd.grad((distances * upstream).sum(), leaves)
        results.append([distances / unit, *(gradient * scale / unit for gradient in gradients)])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)


@every_soft
@pytest.mark.parametrize("epsilon", [1e-6, 1e-3, 0.1, 1.0, 30.0, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float32_keeps_its_digits(metric, p, epsilon, dtype):
    """Whatever the ε, also where the two terms of a formula agree in all but their last digits."""
    query, key = (x.to(dtype) for x in vectors())
    exact = get_metric(metric).softened_distance(query.double(), key.double(), epsilon, p)
    actual = get_metric(metric).softened_distance(query.float(), key.float(), epsilon, p).double()
    largest = exact.abs().max()
    assert_close(actual / largest, exact / largest, "float32_softened")


@every_soft
def test_gradcheck_of_every_epsilon(metric, p):
    tensors = [t.requires_grad_() for t in make_tensors(4, 5, 3, heads=2, key_heads=1, dtype=torch.float64).values()]
    epsilon = torch.tensor([0.7, 2.5], dtype=torch.float64, requires_grad=True)
    lam = torch.tensor([0.6, 1.4], dtype=torch.float64, requires_grad=True)
    for backend in ("reference", "chunked"):

        def run(query, key, value, epsilon, lam, backend=backend):
            return distance_attention(
                query, key, value, metric=metric, p=p, softening=epsilon, lam=lam, backend=backend
            )

        assert torch.autograd.gradcheck(run, (*tensors, epsilon, lam))


@every_soft
@pytest.mark.parametrize("key_heads", [4, 2])
def test_each_backend_gives_the_gradient_of_epsilon(metric, p, key_heads):
    """An ε of each head, one of them 0: output and gradients as the reference in float64."""
    tensors = make_tensors(33, 70, 12, heads=4, key_heads=key_heads)
    epsilon, weights = torch.tensor([0.0, 0.4, 2.0, 9.0]), torch.randn(2, 4, 33, 12)

    def results(backend, dtype):
        own = [t.to(dtype).requires_grad_() for t in (*tensors.values(), epsilon)]
        output = distance_attention(*own[:3], metric=metric, p=p, softening=own[3], backend=backend, is_causal=True)
        return output, *torch.autograd.grad((output * weights).sum(), own)

    expected = results("reference", torch.float64)
    for backend in [b for b in BACKENDS if b != "reference" and runs(metric, p, b, grad=True, softening=1.0)]:
        *actual, of_epsilon = results(backend, torch.float32)
        for found, wanted in zip(actual, expected, strict=False):
            assert_close(found, wanted.detach(), "float32_gradient")
        assert_close(of_epsilon, expected[-1], "float32_softening_gradient")


def test_cosine_in_parts_has_an_epsilon_of_each_head(monkeypatch):
    """PyTorch's kernel gets a few heads at a time, each with its own ε."""
    for name, value in {"_PART_ROWS": 16, "_PART_LOGITS": 1, "_LEAST_LOGITS": 1}.items():
        monkeypatch.setattr(backend_sdpa, name, value)
    tensors, epsilon = make_tensors(33, 70, 16, heads=4), torch.tensor([0.1, 0.7, 2.0, 9.0])
    results = []
    for backend, dtype in (("sdpa", torch.float32), ("reference", torch.float64)):
        own = [t.to(dtype).requires_grad_() for t in tensors.values()]
        output = distance_attention(*own, metric="cosine", softening=epsilon, backend=backend)
        results.append((output, *torch.autograd.grad(output.square().sum(), own)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected.detach(), "float32_gradient")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_soft
def test_decoding_has_an_epsilon_of_each_head(metric, p, dtype):
    tensors = make_tensors(1, 70, 12, heads=4, key_heads=2, dtype=dtype)
    epsilon = torch.tensor([0.0, 0.4, 2.0, 9.0])
    actual = distance_attention(**tensors, metric=metric, p=p, softening=epsilon, backend="cpp")
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    expected = distance_attention(**exact, metric=metric, p=p, softening=epsilon.double(), backend="reference")
    # Keys are read as they are, in bfloat16, too: only the output is rounded to it.
    assert_close(actual, expected.to(dtype), "float32_forward" if dtype == torch.float32 else "autocast")


# Beside the orders of all tests: 4 has sums of its own, and powers of 20 overflow where ε is small.
KERNELS = [
    (metric, p) for metric, p in [*SOFT, ("lp", 4.0), ("lp", 20.0)] if runs(metric, p, "cpp", softening=1.0, grad=True)
]
every_kernel = pytest.mark.parametrize(("metric", "p"), KERNELS, ids=[metric_id(case) for case in KERNELS])


@every_kernel
@pytest.mark.parametrize("epsilon", [1e-12, 1e-3, 0.05, 0.3, 2.5, 300.0])
def test_kernels_of_every_epsilon(metric, p, epsilon):
    """Near and far vectors, and some that are equal: the polynomials, and what is summed from its largest term on."""
    tensors = make_tensors(70, 150, 12, heads=4, key_heads=2)
    if epsilon > 1e-12:  # where the root of l2 has no slope
        tensors["key"][:, :, :3] = tensors["query"][:, ::2, :3]
    tensors["query"][:, :, 7] *= 10
    spread = float(
        get_metric(metric).softened_distance(*(tensors[n].double()[0, 0] for n in ("query", "key")), epsilon, p).std()
    )
    tensors["lam"] = torch.tensor([0.5, 1.0, 1.5, 2.0]) / spread
    function = partial(distance_attention, metric=metric, p=p, scaling=1.0, softening=epsilon, is_causal=True)
    expected = evaluate(partial(function, backend="reference"), tensors, torch.float64)
    for name, actual in evaluate(partial(function, backend="cpp"), tensors).items():
        scale = expected[name].abs().max().clamp_min(1)
        kind = "float32_forward" if name == "output" else "float32_gradient"
        assert_close(actual / scale, expected[name] / scale, kind, name)
    last = {name: tensor[:, :, -1:] if name == "query" else tensor for name, tensor in tensors.items()}
    wanted = distance_attention(
        **{n: t.double() for n, t in last.items()},
        metric=metric,
        p=p,
        scaling=1.0,
        softening=epsilon,
        backend="reference",
    )
    decoded = distance_attention(**last, metric=metric, p=p, scaling=1.0, softening=epsilon, backend="cpp")
    assert_close(decoded, wanted, "float32_forward")


@needs_compiler
@pytest.mark.parametrize("epsilon", [1e-12, 1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 3.0, 300.0])
def test_l2_by_products_keeps_the_digits_of_differences(offset, epsilon):
    """‖q‖² + ‖k‖² - 2q·k of vectors far from 0, of near and equal ones, and of both among each other."""
    tensors = make_tensors(150, 200, 32, heads=4, key_heads=2)
    for name in ("query", "key"):
        # On a grid, so that q - k is exact in float32 and an error is one of the kernel.
        tensors[name] = ((tensors[name] * 1024).round() + 1024 * offset) / 1024
    tensors["key"][:, :, ::7] = tensors["query"][:, ::2, :29] + 2**-8 * torch.randint(1, 9, (2, 2, 29, 32))
    tensors["key"][0, :, ::3] -= offset
    query, key = (tensors[name].double()[0, 0] for name in ("query", "key"))
    spread = get_metric("l2").softened_distance(query, key[:29], epsilon).std()
    tensors["lam"] = torch.tensor([0.5, 1.0, 1.5, 2.0]) / float(spread)
    function = partial(distance_attention, metric="l2", scaling=1.0, softening=epsilon)
    expected = evaluate(partial(function, backend="reference"), tensors, torch.float64)
    for name, actual in evaluate(partial(function, backend="cpp"), tensors).items():
        scale = expected[name].abs().max().clamp_min(1)
        kind = "float32_forward" if name == "output" else "float32_gradient"
        assert_close(actual / scale, expected[name] / scale, kind, name)


@needs_compiler
def test_l2_of_a_pair_is_computed_alike_whatever_it_is_beside():
    """Masked keys near the queries change which sums their tile needs, and no bit of what the others give."""
    tensors = make_tensors(70, 150, 16)
    keep = torch.ones(2, 1, 1, 150, dtype=torch.bool)
    keep[..., 20:50] = False
    results = []
    for near in (False, True):
        if near:
            tensors["key"][:, :, 20:50] = tensors["query"][:, :, :30] + 1e-3
        results.append(evaluate(partial(distance_attention, metric="l2", softening=2.0, mask=keep), tensors))
    for name, before in results[0].items():
        if name == "key":
            before, results[1][name] = (t[:, :, keep[0, 0, 0]] for t in (before, results[1][name]))
        assert_close(results[1][name], before, "equal", name)


@every_kernel
@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("epsilon", [1e-3, 2.5])
def test_kernels_keep_what_is_not_finite_to_those_that_see_it(metric, p, queries, epsilon):
    """NaN reaches every output that sees it; a key infinitely far has no weight, and masked ones change nothing."""
    tensors = make_tensors(queries, 40, 12)
    options = {"metric": metric, "p": p, "softening": epsilon, "backend": "cpp"}
    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[:, 5] = False
    expected = distance_attention(**tensors, **options, mask=keep)
    for value in (torch.inf, torch.nan, 1e30):
        tensors["key"][0, 0, 5] = value
        assert_close(distance_attention(**tensors, **options, mask=keep), expected, "float32_forward")
        seen = distance_attention(**tensors, **options)
        assert seen[1].isfinite().all()
        assert seen[0, 1].isfinite().all()
        if value != value:
            assert seen[0, 0].isnan().all()
        elif metric != "l2":
            assert_close(seen[0, 0], expected[0, 0], "float32_forward")


@pytest.mark.parametrize(("metric", "p"), [case for case in KERNELS if get_metric(case[0]).elementwise], ids=str)
@pytest.mark.parametrize("epsilon", [0.02, 0.4, 2.5, 50.0])
def test_distances_alone(metric, p, epsilon):
    """What a calibration differentiates, ε of each head included, against float64."""
    shapes, results = ((2, 3, 70, 17), (2, 3, 77, 17)), []
    tensors = [*(torch.randn(shape) for shape in shapes), torch.tensor([1.0, 1.5, 2.0])[:, None, None] * epsilon]
    for dtype in (torch.float64, torch.float32):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        output = get_metric(metric).softened_distance(*leaves, p)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, upstream_gradient(output))])
    for number, (expected, actual) in enumerate(zip(*results, strict=True)):
        scale = expected.abs().max()
        kind = "float32_softening_gradient" if number == 3 else "float32_gradient"
        if number < 3 or epsilon > 0.1:  # the parts of ε's gradient cancel
            assert_close(actual / scale, expected / scale, kind)


def test_zero_is_the_plain_distance_bit_for_bit():
    tensors = make_tensors(20, 30, 12)
    for metric, p in SOFT:
        plain = Case(metric, p, "auto")(**tensors)
        assert torch.equal(distance_attention(**tensors, metric=metric, p=p, softening=0), plain)


@pytest.mark.parametrize("metric", [metric for metric in METRICS if not get_metric(metric).softens])
def test_metrics_without_a_softened_form_refuse_it(metric):
    with pytest.raises(ValueError, match=f"softening must be 0 with metric '{metric}', got 2.0"):
        distance_attention(**make_tensors(3), metric=metric, softening=2.0)
    assert check_softening(get_metric(metric), 0) is None


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "fit", True, torch.tensor([1.0, -1.0])])
def test_what_is_no_epsilon(value):
    with pytest.raises(ValueError, match="softening .ε. must be a finite number >= 0"):
        distance_attention(**make_tensors(3), metric="l2", softening=value)


def test_shapes_of_a_tensor():
    with pytest.raises(ValueError, match=r"softening must be a number or a tensor \(2,\), got shape \(3,\)"):
        distance_attention(**make_tensors(3), metric="l2", softening=torch.ones(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softening": -1.0}, "finite number >= 0, 'fit' or None, got -1.0"),
        ({"softening": "fitted"}, "'fit' or None, got 'fitted'"),
        ({"softening": 1.0, "metric": "sqeuclidean"}, "softening must be None or 0 with metric 'sqeuclidean'"),
        ({"softening": "fit", "metric": "sqeuclidean", "mechanism": "nystrom"}, "None or 0 with mechanism 'nystrom'"),
    ],
)
def test_specs(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**{"metric": "l2", **options})
    assert AttentionSpec("l2", softening=0).softening == 0.0


@every_soft
@pytest.mark.parametrize("queries", [1, 30])
def test_one_graph(metric, p, queries):
    """torch.compile(fullgraph=True) gives what eager gives, the gradient of ε included."""
    tensors = [t.requires_grad_() for t in make_tensors(queries, 30, 12).values()]
    epsilon = torch.tensor([0.5, 3.0], requires_grad=True)

    def function(query, key, value, epsilon):
        return distance_attention(query, key, value, metric=metric, p=p, softening=epsilon, lam=1.0)

    torch.compiler.reset()
    results = []
    for run in (function, torch.compile(function, fullgraph=True)):
        output = run(*tensors, epsilon)
        results.append((output, *torch.autograd.grad(output.square().sum(), (*tensors, epsilon))))
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected.detach(), "float32_gradient")


def test_a_subclass_with_its_own_distance_has_not_its_parents_softened_form():
    class Doubled(Euclidean):
        def distance(self, query, key, p=None):
            return 2 * super().distance(query, key)

    register_metric("doubled", Doubled())
    with pytest.raises(ValueError, match="softening must be 0 with metric 'doubled'"):
        distance_attention(**make_tensors(3), metric="doubled", softening=1.0)
