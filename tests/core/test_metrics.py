"""Each distance against its definition in plain Python, hand-computed values, and the λ it gets by default."""

import math

import pytest
import torch

from distattn_hf.core import metrics, softening
from distattn_hf.core.metrics import METRICS, get_metric
from tests.tolerances import assert_close

from .cases import METRIC_CASES, every_metric, metric_id
from .oracles import HAND_COMPUTED, ORACLES, loop_distances


def test_every_metric_has_an_oracle_and_a_hand_computed_value():
    """A metric that is registered without them would otherwise go through the suite compared with itself only."""
    assert set(METRICS) == set(ORACLES)
    assert set(METRICS) == set(HAND_COMPUTED)


@every_metric
@pytest.mark.parametrize("form", ["distance", "fast_distance"])
def test_distance_equals_definition(metric, p, form):
    query, key = torch.randn(2, 3, 5, 7, dtype=torch.float64), torch.randn(2, 3, 4, 7, dtype=torch.float64)
    actual = getattr(get_metric(metric), form)(query, key, p)
    assert_close(actual, loop_distances(metric, query, key, p), "float64")


@every_metric
def test_distance_over_several_blocks_of_queries(metric, p):
    """Enough keys that the definition, which takes blocks of queries, takes these 7 as 6 + 1."""
    query, key = torch.randn(7, 64, dtype=torch.float64), torch.randn(40_000, 64, dtype=torch.float64)
    rows, columns = [0, 5, 6], [0, 20_000, 39_999]
    actual = get_metric(metric).distance(query, key, p)
    assert actual.shape == (7, 40_000)
    if metric == "lifted_sqeuclidean":
        # R is the largest norm of all keys, so a few keys alone have other distances, by a constant.
        columns.append(int(key.square().sum(-1).argmax()))
    expected = loop_distances(metric, query[None, None, rows], key[None, None, columns], p)[0, 0]
    assert_close(actual[rows][:, columns], expected, "float64")


@pytest.mark.parametrize("metric", list(METRICS))
@pytest.mark.parametrize("form", ["distance", "fast_distance"])
def test_distance_of_a_hand_computed_pair(metric, form):
    query, key, p, expected = HAND_COMPUTED[metric]
    query, key = torch.tensor([query], dtype=torch.float64), torch.tensor(key, dtype=torch.float64)
    actual = getattr(get_metric(metric), form)(query, key, p)
    assert_close(actual, torch.tensor([expected], dtype=torch.float64), "float64")


@every_metric
def test_dot_form_differs_from_the_distance_by_a_constant_of_the_row(metric, p):
    query, key = torch.randn(5, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    assert get_metric(metric).has_dot_form == (metric in ("sqeuclidean", "lifted_sqeuclidean", "cosine", "dot"))
    if not get_metric(metric).has_dot_form:
        return
    query_form, key_form, key_bias, factor = get_metric(metric).dot_form(query, key)
    logits = factor * query_form @ key_form.T + (0 if key_bias is None else key_bias)
    constant = logits + loop_distances(metric, query[None, None], key[None, None], p)[0, 0]
    assert_close(constant, constant[:, :1].expand_as(constant), "float64")


@every_metric
@pytest.mark.parametrize("offset", [0.0, 10.0, -100.0])
def test_fast_distance_far_from_the_origin(metric, p, offset):
    """Errors in units of what is summed: of a difference, or of ‖q‖² + ‖k‖² where the distance comes from q·k."""
    query, key = torch.randn(40, 32) + offset, torch.randn(50, 32) + offset
    actual = get_metric(metric).fast_distance(query, key, p)
    expected = loop_distances(metric, query[None, None].double(), key[None, None].double(), p)[0, 0]
    size = expected.abs().max().clamp_min(1)
    if metric in ("sqeuclidean", "l2"):
        size = query.square().sum(-1).max() + key.square().sum(-1).max()
        if metric == "l2":
            actual, expected = actual.square(), expected.square()
    assert_close(actual / size, expected / size, "float32_forward")


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("squared_l2", "sqeuclidean"), ("l2_squared", "sqeuclidean"), ("euclidean", "l2"), ("manhattan", "l1"),
        ("cityblock", "l1"), ("minkowski", "lp"), ("linf", "chebyshev"), ("L2", "l2"), ("Euclidean", "l2"),
    ],
)  # fmt: skip
def test_alias(alias, name):
    assert get_metric(alias) is get_metric(name)
    assert alias in METRICS
    assert METRICS.canonical(alias) == name


@every_metric
def test_rotation_invariance_is_stated_truly(metric, p):
    """What RoPE warnings rely on: a rotation of query and key leaves the distance alone, or it does not."""
    query, key = torch.randn(6, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    entry = get_metric(metric)
    change = (entry.distance(query @ rotation, key @ rotation, p) - entry.distance(query, key, p)).abs().max()
    assert (change < 1e-9) == entry.rotation_invariant


@every_metric
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("scaling", [None, 1.0])
def test_default_lambda_gives_logits_of_unit_row_deviation(metric, p, head_dim, scaling):
    entry = get_metric(metric)
    if metric == "dot" and scaling == 1.0:
        # The control keeps the model's own temperature instead: λ is 1 whatever the scaling.
        assert entry.default_lambda(head_dim, scaling, p) == 1.0
        return
    scaling = scaling or head_dim**-0.5
    query, key = torch.randn(256, head_dim), torch.randn(512, head_dim)
    logits = entry.default_lambda(head_dim, scaling, p) * scaling * entry.fast_distance(query, key, p)
    assert_close(logits.std(dim=-1).mean(), torch.tensor(1.0), "quadrature")


@pytest.mark.parametrize("head_dim", [16, 64])
def test_default_lambda_of_squared_euclidean_in_closed_form(head_dim):
    """The row deviation of ‖q-k‖² is √(2d + 4‖q‖²), with ‖q‖² about d."""
    assert get_metric("sqeuclidean").default_lambda(head_dim, 0.5) == pytest.approx(2 / math.sqrt(6 * head_dim))


@every_metric
def test_default_lambda_depends_on_nothing_around_it(metric, p):
    """transformers builds models on the meta device and in the checkpoint's dtype: the λ must be the same number."""
    entry = get_metric(metric)
    # Sizes no other test asks for: a remembered value would hide the measurement.
    plain = {head_dim: entry.default_lambda(head_dim, 1.0, p) for head_dim in (33, 34)}
    forget_measured_temperatures()
    with torch.device("meta"):
        assert entry.default_lambda(33, 1.0, p) == plain[33]
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert entry.default_lambda(34, 1.0, p) == plain[34]
    finally:
        torch.set_default_dtype(torch.float32)


def test_default_lambda_leaves_the_callers_random_numbers_alone():
    forget_measured_temperatures()
    before = torch.get_rng_state()
    get_metric("chebyshev").default_lambda(35, 1.0)
    assert torch.equal(torch.get_rng_state(), before)


def forget_measured_temperatures():
    metrics._measured_temperature.cache_clear()


@pytest.mark.parametrize(("p", "metric"), [(1.0, "l1"), (2.0, "l2"), (200.0, "chebyshev")])
def test_minkowski_contains_the_other_norms(p, metric):
    """For p=200 and 4 coordinates the sum is at most 4^(1/200) = 0.7% above the maximum."""
    query, key = torch.rand(5, 4, dtype=torch.float64), torch.rand(6, 4, dtype=torch.float64)
    minkowski, other = get_metric("lp").distance(query, key, p), get_metric(metric).distance(query, key)
    if p < 200:
        assert_close(minkowski, other, "float64")
    else:
        assert bool((minkowski >= other).all())
        assert bool((minkowski <= other * 4 ** (1 / p)).all())


def test_metric_cases_hold_every_metric_and_orders_on_both_sides_of_2():
    assert {metric for metric, _ in METRIC_CASES} == set(METRICS)
    assert {"lp1.5", "lp3"} <= {metric_id(case) for case in METRIC_CASES}


def clamp_of(slope: float):
    """`torch.clamp` whose slope at a bound itself is `slope`: 1 up to PyTorch 2.13, 0 since 2.14."""

    def at_bound(x, bound, beyond):
        edge = bound + slope * (x - x.detach())
        return torch.where(beyond, x, torch.where(x.detach() == bound, edge, torch.full_like(x, bound)))

    def clamp(x, min=None, max=None):  # noqa: A002
        x = x if min is None else at_bound(x, min, x > min)
        return x if max is None else at_bound(x, max, x < max)

    return clamp


@every_metric
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("distance", {}),
        ("fast_distance", {}),
        ("softened_distance", {"epsilon": 1.0}),
        ("softened_distance", {"epsilon": softening.LEAST}),
    ],
)
def test_gradients_depend_on_no_clamps_slope_at_its_bound(metric, p, form, options, monkeypatch):
    """Which PyTorch changed from a release to the next. Whole numbers: coordinates that agree, differ by one knee of
    the softened forms, or belong to the longest key lie at the bounds.
    """
    if form == "softened_distance" and not get_metric(metric).softens:
        pytest.skip("has no softened form")
    query = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    key = torch.tensor([[0.0, 1.0], [1.0, 2.0], [3.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    upstream = torch.randn(3, 4, dtype=torch.float64)
    gradients = []
    for slope in (0.0, 1.0):
        clamp = clamp_of(slope)
        monkeypatch.setattr(torch.Tensor, "clamp", clamp)
        monkeypatch.setattr(torch.Tensor, "clamp_min", lambda x, bound, clamp=clamp: clamp(x, min=bound))
        monkeypatch.setattr(torch.Tensor, "clamp_max", lambda x, bound, clamp=clamp: clamp(x, max=bound))
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key)]
        distances = getattr(get_metric(metric), form)(*leaves, p=p, **options)
        gradients.append(torch.autograd.grad((distances * upstream).sum(), leaves))
    for first, second in zip(*gradients):
        assert_close(first, second, "float64")


def test_a_power_mean_depends_on_no_clamps_slope_where_its_forms_meet(monkeypatch):
    """With p = 2 / ln 2 and a coordinate of one knee the exponent is 1 to the bit, the last of the near form."""
    p, gradients = 2 / math.log(2), []
    for slope in (0.0, 1.0):
        clamp = clamp_of(slope)
        monkeypatch.setattr(torch.Tensor, "clamp_max", lambda x, bound, clamp=clamp: clamp(x, max=bound))
        difference = torch.full((1,), softening.knee(1.0, 1, p), dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(softening.soft_power_mean(difference, 1.0, p), difference)
        gradients.append(gradient)
    assert float(gradients[0]) > 0.1
    assert_close(*gradients, "equal")
