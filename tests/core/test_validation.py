"""What `distance_attention` refuses: a `ValueError` that names the field, the value and what is allowed."""

import math

import pytest
import torch

from distattn_hf import distance_attention
from distattn_hf.core.metrics import METRICS

from .cases import make_tensors

NAN, INF = math.nan, math.inf


def refused(match: str, tensors: dict | None = None, **options) -> str:
    with pytest.raises(ValueError, match=match) as error:
        distance_attention(**(tensors or make_tensors(5, head_dim=8)), **{"metric": "sqeuclidean", **options})
    return str(error.value)


@pytest.mark.parametrize("metric", ["l7", "", "euclid", None, 2, ["l2"]])
def test_unknown_metric_lists_what_exists(metric):
    message = refused("metric", metric=metric)
    assert repr(metric) in message
    for name in METRICS:
        assert name in message
    assert "manhattan" in message, "aliases help whoever guessed one"


@pytest.mark.parametrize("p", [0.5, 0, -1.0, 0.999, NAN, INF, True, "3"])
def test_order_out_of_range(p):
    assert repr(p) in refused("p must be a finite number >= 1", metric="lp", p=p)


def test_order_missing():
    refused("metric 'lp' needs its order: p must be a number >= 1", metric="lp")


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric != "lp"])
def test_order_given_to_another_metric(metric):
    assert "only 'lp'" in refused(f"p=3.0 was given with metric '{metric}'", metric=metric, p=3.0)


@pytest.mark.parametrize("p", [1, 1.0, 7.5])
def test_order_in_range(p):
    assert distance_attention(**make_tensors(5), metric="lp", p=p).isfinite().all()


@pytest.mark.parametrize("lam", [0, 0.0, -1.0, NAN, INF, True, "1", [1.0, 1.0]])
def test_lambda_out_of_range(lam):
    assert repr(lam) in refused("lam .λ. must be a positive finite number", lam=lam)


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF])
def test_lambda_of_one_head_out_of_range(bad):
    refused("lam .λ. must be positive and finite", lam=torch.tensor([1.0, bad]))


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), (1, 2, 1, 1), (0,)])
def test_lambda_of_wrong_shape(shape):
    message = refused(r"lam must be a number or a tensor of shape \(2,\)", lam=torch.ones(shape))
    assert str(shape) in message


def test_lambda_as_a_tensor_without_axes_is_a_number():
    tensors = make_tensors(5)
    actual = distance_attention(**tensors, metric="l2", lam=torch.tensor(0.7))
    torch.testing.assert_close(actual, distance_attention(**tensors, metric="l2", lam=0.7))


@pytest.mark.parametrize("scaling", [0, 0.0, -0.1, NAN, INF, -INF])
def test_scaling_out_of_range(scaling):
    assert repr(scaling) in refused("scaling must be a positive finite number", scaling=scaling)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, 1.5, NAN])
def test_dropout_out_of_range(dropout_p):
    assert repr(dropout_p) in refused(r"dropout_p must be in \[0, 1\)", dropout_p=dropout_p)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("shape", [(2, 5, 8), (5, 8), (1, 2, 2, 5, 8)])
def test_wrong_rank(name, shape):
    message = refused(f"{name} must be .batch, heads, length, head_dim.", {**make_tensors(5), name: torch.ones(shape)})
    assert str(shape) in message


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_wrong_kind_of_number(name, dtype):
    tensors = make_tensors(5)
    assert str(dtype) in refused(f"{name} must be a floating-point tensor", {**tensors, name: tensors[name].to(dtype)})


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_mixed_dtypes(name):
    tensors = make_tensors(5)
    message = refused("must share a dtype", {**tensors, name: tensors[name].half()})
    assert f"{name} torch.float16" in message.rpartition("got")[2]


@pytest.mark.parametrize(
    ("query", "key", "value", "match"),
    [
        ((2, 2, 5, 8), (2, 2, 6, 8), (2, 2, 7, 8), "key .* and value .* must agree"),
        ((2, 2, 5, 8), (2, 2, 6, 8), (2, 1, 6, 8), "key .* and value .* must agree"),
        ((2, 2, 5, 8), (2, 2, 6, 8), (1, 2, 6, 8), "key .* and value .* must agree"),
        ((1, 2, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8), "query .* and key .* must agree in batch and head_dim"),
        ((2, 2, 5, 8), (2, 2, 6, 9), (2, 2, 6, 8), "query .* and key .* must agree in batch and head_dim"),
        ((2, 3, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8), "query heads .3. must be a multiple of key heads .2."),
        ((2, 2, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8), "query heads .2. must be a multiple of key heads .4."),
        ((2, 2, 5, 8), (2, 0, 6, 8), (2, 0, 6, 8), "query heads .2. must be a multiple of key heads .0."),
    ],
)
def test_shapes_that_do_not_fit(query, key, value, match):
    refused(match, {"query": torch.ones(query), "key": torch.ones(key), "value": torch.ones(value)})


@pytest.mark.parametrize("shape", [(5,), (2, 6, 5), (2, 4), (3, 5), (2, 3, 5, 5), (2, 1, 4, 5), (1, 1, 1, 2, 5)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_mask_of_wrong_shape(shape, dtype):
    assert str(shape[-1]) in refused("mask", mask=torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 5, 5), (5, 5), (2, 3, 5, 5), (1, 1, 5, 4), (3, 1, 1, 5)])
def test_position_bias_of_wrong_shape(shape):
    assert str(shape) in refused("position_bias", position_bias=torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_position_bias_of_wrong_dtype(dtype):
    """An integer bias must not be read as a mask."""
    assert str(dtype) in refused("position_bias", position_bias=torch.zeros(1, 1, 1, 1, dtype=dtype))


def test_what_is_refused_is_refused_before_anything_runs():
    """Also by a backend that would not look at the field."""
    for backend in ("sdpa", "chunked", "reference"):
        refused("dropout_p", backend=backend, dropout_p=2.0)
        refused("lam", backend=backend, lam=-1.0)


@pytest.mark.parametrize("name", ["key", "value", "lam", "mask", "position_bias"])
def test_another_device(name):
    tensors = {
        **make_tensors(5),
        "lam": torch.ones(2),
        "mask": torch.ones(1, 1, 5, 5, dtype=torch.bool),
        "position_bias": torch.zeros(1, 2, 5, 5),
    }
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} must be on the query's device cpu, got meta"):
        distance_attention(metric="l1", **tensors)
