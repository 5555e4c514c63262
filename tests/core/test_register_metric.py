"""`register_metric`: a user's own distance works everywhere by its name, and mistakes are told."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from distattn_hf import AttentionSpec, Metric, convert, distance_attention, register_metric
from distattn_hf.core.metrics import METRICS, Euclidean, get_metric
from distattn_hf.core.registry import Registry
from tests.conversion.models import gpt2
from tests.tolerances import assert_close

from .cases import Case, evaluate, make_tensors


def weighted_l1(query, key):
    """Σ c·|q_c-k_c|, which no built-in metric is."""
    weights = torch.arange(1, query.shape[-1] + 1, dtype=query.dtype)
    return ((query[..., :, None, :] - key[..., None, :, :]).abs() * weights).sum(-1)


@pytest.mark.parametrize("backend", ["chunked", "reference", "auto"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"mask": torch.ones(2, 20).tril(14)}], ids=list)
def test_own_function_in_attention(backend, options):
    register_metric("weighted_l1", weighted_l1)
    tensors = make_tensors(20, 20, 5, dtype=torch.float64)
    logits = -0.3 * 0.5 * weighted_l1(tensors["query"], tensors["key"])
    keep = torch.ones(2, 1, 20, 20, dtype=torch.bool)
    keep = keep.tril() if "is_causal" in options else keep
    bias = options["mask"].double()[:, None, None] if "mask" in options else 0.0
    expected = (logits + bias).masked_fill(~keep, -torch.inf).softmax(-1) @ tensors["value"]
    if "mask" in options:
        options = {"mask": options["mask"].double()}
    actual = distance_attention(**tensors, metric="weighted_l1", lam=0.3, scaling=0.5, backend=backend, **options)
    assert_close(actual, expected, "float64")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_function_gets_full_precision_and_gradients(dtype):
    seen = []

    def spying(query, key):
        seen.append((query.dtype, key.dtype))
        return weighted_l1(query, key)

    register_metric("spying", spying)
    tensors = make_tensors(40, 20, 5, dtype=dtype)
    expected = evaluate(Case("spying", None, "reference"), tensors, lam=0.1)
    actual = evaluate(Case("spying", None, "chunked", blocks=True), tensors, lam=0.1)
    assert set(seen) == {(torch.float32, torch.float32)}
    for name, value in expected.items():
        assert float(value.abs().max()) > 0
        assert_close(actual[name], value, "float32_gradient", name)


def test_own_function_gets_a_default_lambda_of_unit_deviation():
    register_metric("weighted_l1", weighted_l1)
    lam = get_metric("weighted_l1").default_lambda(16, 0.25)
    deviation = lam * 0.25 * weighted_l1(torch.randn(256, 16), torch.randn(2048, 16)).std(-1).mean()
    assert_close(deviation, torch.tensor(1.0), "quadrature")
    tensors = make_tensors(5, head_dim=16)
    assert_close(
        distance_attention(**tensors, metric="weighted_l1"),
        distance_attention(**tensors, metric="weighted_l1", lam=lam),
        "equal",
    )


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_own_function_without_a_temperature(value):
    register_metric("flat", lambda query, key: value + 0 * query @ key.mT)
    with pytest.raises(ValueError, match="metric 'flat' (gives distances with row deviation|.* got NaN for finite)"):
        get_metric("flat").default_lambda(8, 1.0)


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda query, key: (query - query).sum(-1), r"\(2, 2, 5\)"),
        (lambda query, key: (query @ key.mT).mT, r"\(2, 2, 7, 5\)"),
        (lambda query, key: (query @ key.mT)[:1], r"\(1, 2, 5, 7\)"),
        (lambda query, key: 1.0, "float"),
        (lambda query, key: None, "NoneType"),
    ],
)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_own_function_of_wrong_shape(function, got, backend):
    register_metric("odd", function)
    with pytest.raises(ValueError, match=rf"metric 'odd' must return distances of shape \(2, 2, 5, 7\), got {got}"):
        distance_attention(**make_tensors(5, 7), metric="odd", lam=1.0, backend=backend)


class Similarity(Metric):
    """Not through a function: a subclass that overrides the fast form."""

    def distance(self, query, key, p=None):
        return -torch.cdist(query, key)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda query, key: query @ key.mT, "distances, which are >= 0, got -"),
        (lambda query, key: -torch.cdist(query, key, p=1), "distances, which are >= 0, got -"),
        (lambda query, key: torch.cdist(query, key) * float("-inf"), "distances, which are >= 0, got -inf"),
        (lambda query, key: (query @ key.mT).sqrt(), "distances, got NaN for finite vectors"),
        (Similarity(), "distances, which are >= 0, got -"),
    ],
    ids=["dot", "negated", "infinite", "nan", "class"],
)
@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_what_is_no_distance_is_refused(metric, message, backend):
    register_metric("odd", metric)
    with pytest.raises(ValueError, match=f"metric 'odd' must return {message}"):
        distance_attention(**make_tensors(5, 7), metric="odd", lam=1.0, backend=backend)
    teacher = gpt2()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    with pytest.raises(ValueError, match=f"metric 'odd' must return {message}"):
        convert(teacher, AttentionSpec("odd", transform="scalar"), init="plain")
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_rounding_below_zero_and_what_says_that_it_is_no_distance():
    """‖q‖² + ‖k‖² - 2q·k and 1 - cos come out below 0 where q = k; `is_distance = False` allows signs."""

    def expanded(query, key):
        return query.square().sum(-1)[..., None] + key.square().sum(-1)[..., None, :] - 2 * query @ key.mT

    register_metric("expanded", expanded)
    register_metric("angle", lambda q, k: 1 - F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT)
    tensors = {name: tensor.detach().float() for name, tensor in make_tensors(40).items()}
    tensors["key"] = tensors["query"].clone()
    assert expanded(tensors["query"], tensors["key"]).min() < 0
    for name in ("expanded", "angle"):
        distance_attention(**tensors, metric=name, lam=1.0)

    class Control(Similarity):
        is_distance = False

    register_metric("control", Control())
    distance_attention(**make_tensors(5), metric="control", lam=1.0)


SCALE = torch.nn.Parameter(torch.ones(3))


class WithNet(Metric):
    def __init__(self):
        self.nets = [torch.nn.Linear(8, 8)]

    def distance(self, query, key, p=None):
        return torch.cdist(self.nets[0](query), self.nets[0](key))


class ByGlobal(Metric):
    def distance(self, query, key, p=None):
        return SCALE.sum() * torch.cdist(query, key)


class AsModule(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, query, key):
        return self.scale * torch.cdist(query, key)

    def other(self, query, key):
        return self.forward(query, key)


def scaled(query, key, scale=None):
    return scale * torch.cdist(query, key)


def by_closure():
    weights = {"a": [torch.ones(8, requires_grad=True)]}
    return lambda query, key: torch.cdist(query * weights["a"][0], key)


def by_helper():
    def helper(query):
        return query * SCALE.sum()

    return lambda query, key: torch.cdist(helper(query), helper(key))


@pytest.mark.parametrize(
    "metric",
    [AsModule(), AsModule().other, by_closure(), by_helper(), WithNet(), ByGlobal(), partial(scaled, scale=SCALE),
     lambda query, key, scale=SCALE: scale.sum() * torch.cdist(query, key),
     lambda query, key: SCALE.sum() * torch.cdist(query, key)],
    ids=["module", "method", "closure", "helper", "class", "class with a global", "partial", "default", "global"],
)  # fmt: skip
def test_a_metric_with_parameters_is_refused(metric):
    with pytest.raises(ValueError, match="metric 'learned' refers to parameters, which no model would train or save"):
        register_metric("learned", metric)
    assert "learned" not in METRICS


def test_constants_and_modules_without_parameters_are_no_parameters():
    weights, module = torch.linspace(1, 2, 8), torch.nn.PairwiseDistance()
    register_metric("weighted", lambda query, key: torch.cdist(query * weights, key * weights))
    register_metric("pairwise", lambda query, key: module(query[..., :, None, :], key[..., None, :, :]))
    for name in ("weighted", "pairwise"):
        tensors = {key: tensor[..., :8].float() for key, tensor in make_tensors(5).items()}
        distance_attention(**tensors, metric=name, lam=1.0)


def test_own_function_cannot_run_on_sdpa_and_takes_no_order():
    register_metric("weighted_l1", weighted_l1)
    with pytest.raises(ValueError, match="metric 'weighted_l1' has no dot-product form"):
        distance_attention(**make_tensors(5), metric="weighted_l1", lam=1.0, backend="sdpa")
    with pytest.raises(ValueError, match="p=2.0 was given with metric 'weighted_l1'"):
        distance_attention(**make_tensors(5), metric="weighted_l1", lam=1.0, p=2.0)


@pytest.mark.parametrize("metric", [3, None, "l2", torch.ones(2)])
def test_neither_function_nor_metric(metric):
    with pytest.raises(ValueError, match="metric must be callable or a Metric"):
        register_metric("odd", metric)
    assert "odd" not in METRICS


@pytest.mark.parametrize("name", ["l2", "L2", "euclidean", "mine"])
def test_taken_name(name):
    register_metric("mine", weighted_l1)
    before = get_metric(name)
    with pytest.raises(ValueError, match=f"metric '{name.lower()}' is already registered; pass overwrite=True"):
        register_metric(name, weighted_l1)
    with pytest.raises(ValueError, match="is already registered"):
        register_metric("other", weighted_l1, aliases=(name,))
    assert get_metric(name) is before
    assert "other" not in METRICS


@pytest.mark.parametrize("name", ["l2", "euclidean", "mine"])
def test_overwrite(name):
    register_metric("mine", lambda query, key: -query @ key.mT)
    new = register_metric(name, weighted_l1, overwrite=True)
    assert get_metric(name) is new
    tensors = make_tensors(5)
    register_metric("same", weighted_l1)
    actual, expected = (distance_attention(**tensors, metric=metric, lam=0.1) for metric in (name, "same"))
    assert_close(actual, expected, "equal")


def test_alias_case_and_rotation_invariance():
    metric = register_metric("Mine", weighted_l1, aliases=("My_Own",), rotation_invariant=True)
    assert metric.rotation_invariant
    assert all(get_metric(name) is metric for name in ("mine", "MINE", "my_own", "MY_OWN"))
    assert not register_metric("other", weighted_l1).rotation_invariant
    assert "mine (my_own)" in METRICS.describe()


def test_own_class_answers_to_the_name_it_was_registered_under():
    """A model stores its metric's name: under its parent's it would come back as the parent."""

    class Doubled(Euclidean):
        def distance(self, query, key, p=None):
            return 2 * super().distance(query, key, p)

    class Nameless(Metric):
        def distance(self, query, key, p=None):
            return weighted_l1(query, key)

    for name, metric in (("doubled", Doubled()), ("nameless", Nameless())):
        register_metric(name, metric)
        assert get_metric(name) is metric
        assert get_metric(metric.name) is metric
    assert get_metric("l2").name == "l2"


def test_registry_on_its_own():
    """What every table of the package does, with another kind than metrics."""
    table = Registry("fruit")
    table.register("Apple", 1, aliases=("Pomme",))
    table.register("pear", 2)
    assert list(table) == ["apple", "pear"]
    assert table.get("POMME") == 1
    assert table.canonical("pomme") == "apple"
    assert "Apple" in table
    assert "plum" not in table
    assert 3 not in table
    for name in ("plum", 3, None):
        with pytest.raises(ValueError, match="fruit") as error:
            table.get(name)
        assert repr(name) in str(error.value)
        assert "apple (pomme), pear" in str(error.value)
