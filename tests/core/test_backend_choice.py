"""Which backend runs: "auto" takes the first able one, an explicit one runs or raises, and never another one."""

import pytest
import torch

from distattn_hf import distance_attention
from distattn_hf.core.backends import BACKENDS, Backend, validate_backend
from distattn_hf.core.kernel_cpp_library import unavailable

from .cases import METRIC_CASES, Case, every_metric, make_tensors, metric_id, needs_compiler, runs

PAIRS = [(metric, p, backend) for metric, p in METRIC_CASES for backend in BACKENDS]


@pytest.fixture
def used(monkeypatch):
    """The names of the backends that run during the test, in order."""
    names = []

    def recording(backend):
        def run(inputs):
            names.append(backend.name)
            return backend.run(inputs)

        return Backend(backend.name, run, backend.unsupported, backend.declined)

    monkeypatch.setattr(BACKENDS, "_entries", {name: recording(BACKENDS.get(name)) for name in BACKENDS})
    return names


@pytest.mark.parametrize(
    ("metric", "p", "backend"), PAIRS, ids=[f"{metric_id((metric, p))}-{backend}" for metric, p, backend in PAIRS]
)
def test_explicit_backend_runs_or_raises(metric, p, backend, used):
    case = Case(metric, p, backend)
    if runs(metric, p, backend):
        case(**make_tensors(5))
        assert used == [backend]
        return
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot run this") as error:
        case(**make_tensors(5))
    no_compiler = backend == "cpp" and unavailable() is not None
    assert repr(metric) in str(error.value) or backend == "triton" or no_compiler
    alternatives = str(error.value).rpartition("use one of ")[2]
    for other in BACKENDS:
        assert (other in alternatives) == runs(metric, p, other)
    assert "auto" in alternatives
    assert used == []


def test_sdpa_runs_exactly_the_metrics_with_a_dot_product_form():
    able = {metric for metric, p in METRIC_CASES if runs(metric, p, "sdpa")}
    assert able == {"sqeuclidean", "lifted_sqeuclidean", "cosine", "dot"}


# What "auto" takes on the CPU with a compiler, by what is asked of it.
ELEMENTWISE = ["l1", "lp", "chebyshev", "l2"]
EXPECTED = [
    (ELEMENTWISE, {}, "cpp"),
    (ELEMENTWISE, {"is_causal": True, "grad": True}, "cpp"),
    (ELEMENTWISE, {"dropout_p": 0.1}, "chunked"),
    (ELEMENTWISE, {"dtype": torch.float64}, "chunked"),
    (["sqeuclidean"], {}, "sdpa"),
    (["sqeuclidean"], {"mask": torch.ones(2, 33)}, "sdpa"),
    (["sqeuclidean"], {"mask": torch.ones(2, 33, 33)}, "cpp"),
    (["sqeuclidean"], {"is_causal": True}, "cpp"),
    (["sqeuclidean"], {"grad": True}, "cpp"),
    (["sqeuclidean"], {"grad": True, "dropout_p": 0.1}, "sdpa"),
    (["cosine", "lifted_sqeuclidean", "dot"], {}, "sdpa"),
    (["cosine", "lifted_sqeuclidean", "dot"], {"grad": True, "is_causal": True}, "sdpa"),
    (["cosine", "sqeuclidean", *ELEMENTWISE], {"num_queries": 1}, "cpp"),
    (["lifted_sqeuclidean", "dot"], {"num_queries": 1}, "sdpa"),
]


@needs_compiler
@pytest.mark.parametrize(
    ("metric", "options", "expected"), [(m, o, e) for metrics, o, e in EXPECTED for m in metrics], ids=str
)
def test_auto_takes(metric, options, expected, used):
    options = dict(options)
    dtype, grad = options.pop("dtype", torch.float32), options.pop("grad", False)
    tensors = make_tensors(options.pop("num_queries", 33), 33, dtype=dtype)
    for tensor in tensors.values():
        tensor.requires_grad_(grad)
    distance_attention(**tensors, metric=metric, p=3 if metric == "lp" else None, **options)
    assert used == [expected]


def test_the_reference_is_tried_last():
    assert list(BACKENDS)[-1] == "reference"


@every_metric
def test_weights_come_from_the_reference(metric, p, monkeypatch):
    monkeypatch.setattr(BACKENDS, "_entries", dict.fromkeys(BACKENDS))
    for backend in ("auto", "reference"):
        _, weights = Case(metric, p, backend)(**make_tensors(5), return_weights=True)
        assert weights.shape == (2, 2, 5, 5)


@pytest.mark.parametrize("backend", ["sdpa", "chunked"])
def test_weights_from_another_backend(backend):
    with pytest.raises(ValueError, match=f"return_weights needs backend 'reference' or 'auto', got '{backend}'"):
        distance_attention(**make_tensors(5), metric="sqeuclidean", backend=backend, return_weights=True)


@pytest.mark.parametrize("backend", ["flash", "", None, 3])
def test_unknown_backend_lists_what_exists(backend):
    with pytest.raises(ValueError, match="backend") as error:
        distance_attention(**make_tensors(5), metric="l2", backend=backend)
    assert repr(backend) in str(error.value)
    for name in (*BACKENDS, "auto"):
        assert name in str(error.value)


@pytest.mark.parametrize("name", ["SDPA", "Auto", "Chunked"])
def test_backend_names_ignore_case(name):
    assert validate_backend(name) == name.lower()


@pytest.mark.parametrize("metric", ["l2", "sqeuclidean"])
def test_no_able_backend_is_no_fallback(metric, monkeypatch):
    """A backend's refusal counts even if it could have run: the caller asked for this one."""
    monkeypatch.setattr(
        BACKENDS, "_entries", {**BACKENDS._entries, "chunked": Backend("chunked", None, lambda inputs: "it is Sunday")}
    )
    with pytest.raises(ValueError, match="backend 'chunked' cannot run this: it is Sunday"):
        distance_attention(**make_tensors(5), metric=metric, backend="chunked")
