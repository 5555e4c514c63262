"""`register_metric`: a user's own distance works everywhere by its name, and mistakes are told."""

import pytest
import torch

from distattn_hf import Metric, distance_attention, register_metric
from distattn_hf.core.metrics import METRICS, Euclidean, get_metric
from distattn_hf.core.registry import Registry
from tests.tolerances import assert_close

from .cases import Case, evaluate, make_tensors


@pytest.fixture(autouse=True)
def scratch_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(METRICS, "_entries", dict(METRICS._entries))
    monkeypatch.setattr(METRICS, "_aliases", dict(METRICS._aliases))


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
    with pytest.raises(ValueError, match="metric 'flat' gives distances with row deviation"):
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
