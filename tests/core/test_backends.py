"""Every metric on every backend against the float64 reference: output and all gradients, over shapes and masks."""

import pytest
import torch

from tests.tolerances import assert_close

from .cases import Case, evaluate, every_case, make_tensors

SHAPES = {
    "length 1": {"num_queries": 1},
    "one key": {"num_queries": 17, "num_keys": 1, "head_dim": 16},
    "63, head size 17": {"num_queries": 63, "head_dim": 17, "batch": 1},
    "130, head size 96": {"num_queries": 130, "head_dim": 96, "batch": 1},
    "more queries, narrow values": {"num_queries": 63, "num_keys": 7, "head_dim": 32, "value_dim": 5},
    "more keys, wide values": {"num_queries": 7, "num_keys": 63, "head_dim": 8, "value_dim": 40},
    "grouped keys": {"num_queries": 33, "num_keys": 20, "head_dim": 24, "value_dim": 16, "heads": 4, "key_heads": 2},
}

# More queries than one block of 16 holds, M != N, and an odd head size.
BATCH, HEADS, QUERIES, KEYS = 2, 2, 37, 23
MIN = torch.finfo(torch.float32).min


def _keep(*shape, share=0.7):
    keep = torch.rand(*shape) < share
    keep[..., 0] = True
    return keep


def _additive(keep, masked):
    return torch.where(keep, torch.randn(keep.shape), torch.tensor(masked))


def _padding():
    """(B, M): item 0 padded on the left, item 1 on the right."""
    padding = torch.ones(BATCH, KEYS, dtype=torch.long)
    padding[0, :4] = 0
    padding[1, 18:] = 0
    return padding


def _empty_rows():
    keep = _keep(BATCH, 1, QUERIES, KEYS)
    keep[0, :, 3] = False
    keep[1, :, 20:] = False
    return keep


# name -> options of distance_attention
MASKS = {
    "bool (B,1,N,M)": lambda: {"mask": _keep(BATCH, 1, QUERIES, KEYS)},
    "bool (B,H,N,M)": lambda: {"mask": _keep(BATCH, HEADS, QUERIES, KEYS)},
    "bool (1,1,N,M)": lambda: {"mask": _keep(1, 1, QUERIES, KEYS)},
    "bool (B,N,M)": lambda: {"mask": _keep(BATCH, QUERIES, KEYS)},
    "bool (B,1,N,longer than M)": lambda: {"mask": _keep(BATCH, 1, QUERIES, KEYS + 9)},
    "bool (B,M)": lambda: {"mask": _padding().bool()},
    "int (B,M)": lambda: {"mask": _padding()},
    "float, -inf": lambda: {"mask": _additive(_keep(BATCH, 1, QUERIES, KEYS), -torch.inf)},
    "float, finfo.min": lambda: {"mask": _additive(_keep(BATCH, HEADS, QUERIES, KEYS), MIN)},
    "float, finite": lambda: {"mask": _additive(_keep(BATCH, 1, 1, KEYS), -3.0)},
    "float64": lambda: {"mask": _additive(_keep(BATCH, 1, QUERIES, KEYS), -torch.inf).double()},
    "causal": lambda: {"is_causal": True},
    "causal + padding": lambda: {"is_causal": True, "mask": _padding()},
    "causal + bool": lambda: {"is_causal": True, "mask": _keep(BATCH, HEADS, QUERIES, KEYS)},
    "causal + float": lambda: {"is_causal": True, "mask": _additive(_keep(BATCH, 1, QUERIES, KEYS), -torch.inf)},
    "empty rows, bool": lambda: {"mask": _empty_rows()},
    "empty rows, -inf": lambda: {"mask": _additive(_empty_rows(), -torch.inf)},
    "empty rows, finfo.min": lambda: {"mask": _additive(_empty_rows(), MIN)},
    "everything masked": lambda: {"mask": torch.zeros(BATCH, 1, QUERIES, KEYS, dtype=torch.bool)},
}

BIASES = {
    "(1,H,N,M)": (1, HEADS, QUERIES, KEYS),
    "(B,1,1,M)": (BATCH, 1, 1, KEYS),
    "(1,H,1,1)": (1, HEADS, 1, 1),
    "(B,H,N,1)": (BATCH, HEADS, QUERIES, 1),
}


def check_against_reference(case: Case, tensors: dict, **options) -> dict:
    """Output and gradients in float32 against the reference's in float64, which test_oracle.py checks by loops."""
    expected = evaluate(case.reference, tensors, torch.float64, **options)
    actual = evaluate(case, tensors, **options)
    for name, value in expected.items():
        assert actual[name].dtype == torch.float32, name
        assert_close(actual[name], value, "float32_forward" if name == "output" else "float32_gradient", name)
    return actual


def lambdas(heads: int) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, heads)


@every_case
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_with_default_lambda(case, shape):
    check_against_reference(case, make_tensors(**SHAPES[shape]))


@every_case
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_causal_with_lambda_per_head(case, shape):
    tensors = make_tensors(**SHAPES[shape])
    check_against_reference(case, {**tensors, "lam": lambdas(tensors["query"].shape[1])}, is_causal=True)


@every_case
@pytest.mark.parametrize("mask", MASKS)
def test_masks_with_lambda_per_head(case, mask):
    tensors = make_tensors(QUERIES, KEYS, 9, 6, batch=BATCH, heads=HEADS)
    check_against_reference(case, {**tensors, "lam": lambdas(HEADS)}, **MASKS[mask]())


@every_case
@pytest.mark.parametrize("mask", MASKS)
def test_masks_with_a_number_for_lambda_and_a_bias(case, mask):
    tensors = make_tensors(QUERIES, KEYS, 9, 6, batch=BATCH, heads=HEADS)
    bias = torch.randn(1, HEADS, QUERIES, KEYS)
    check_against_reference(case, {**tensors, "position_bias": bias}, lam=0.7, **MASKS[mask]())


@every_case
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_biases(case, bias, is_causal):
    tensors = make_tensors(QUERIES, KEYS, 9, 6, batch=BATCH, heads=HEADS)
    check_against_reference(case, {**tensors, "position_bias": torch.randn(BIASES[bias])}, is_causal=is_causal)


@every_case
@pytest.mark.parametrize("mask", ["empty rows, bool", "empty rows, -inf", "empty rows, finfo.min"])
def test_empty_rows_give_zero(case, mask):
    """Also for their queries' gradients; equality with the reference alone would allow both to be wrong."""
    result = evaluate(case, make_tensors(QUERIES, KEYS, 9, batch=BATCH, heads=HEADS), **MASKS[mask]())
    for rows in (result["output"], result["query"]):
        assert bool((rows[0, :, 3] == 0).all())
        assert bool((rows[1, :, 20:] == 0).all())
        assert bool((rows[0, :, 4] != 0).any())
    assert all(bool(t.isfinite().all()) for t in result.values())


@every_case
@pytest.mark.parametrize("heads", [(6, 1), (6, 2), (6, 3)], ids=str)
def test_head_h_uses_key_head_h_over_group(case, heads):
    """Grouped keys equal keys written out once per query head, and their gradient is the sum over the group."""
    heads, key_heads = heads
    group = heads // key_heads
    tensors = make_tensors(20, 11, 8, heads=heads, key_heads=key_heads)
    written_out = {n: t if n == "query" else t[:, torch.arange(heads) // group] for n, t in tensors.items()}
    expected, actual = evaluate(case.reference, written_out, torch.float64), evaluate(case, tensors)
    for name in ("key", "value"):
        expected[name] = expected[name].unflatten(1, (key_heads, group)).sum(2)
    for name, value in expected.items():
        assert_close(actual[name], value, "float32_gradient", name)


@every_case
def test_non_contiguous_inputs(case):
    """As models hand them over: heads transposed out of one projection, a strided value, an expanded key."""
    tensors = {
        "query": torch.randn(2, 20, 3, 12).transpose(1, 2),
        "key": torch.randn(1, 1, 13, 12).expand(2, 3, 13, 12),
        "value": torch.randn(2, 3, 13, 10)[..., ::2],
    }
    assert not any(t.is_contiguous() for t in tensors.values())
    strided = {name: t.requires_grad_() for name, t in tensors.items()}
    output = case(**strided)
    gradients = torch.autograd.grad(output.sum(), list(strided.values()))
    dense = {name: t.detach().contiguous().requires_grad_() for name, t in tensors.items()}
    expected = case(**dense)
    assert_close(output, expected, "float32_forward")
    for actual, value in zip(gradients, torch.autograd.grad(expected.sum(), list(dense.values()))):
        assert_close(actual, value, "float32_gradient")


@every_case
@pytest.mark.parametrize("head_dim", [8, 64])
def test_some_keys_equal_the_query(case, head_dim):
    """Zero distances, where a root has no slope; the gradient there is the subgradient 0, as in the reference."""
    tensors = make_tensors(20, 20, head_dim)
    tensors["key"][:, :, 5:9] = tensors["query"][:, :, 5:9]
    expected = evaluate(case.reference, tensors, torch.float64)
    actual = evaluate(case, tensors)
    rounded_root = case.metric == "l2" and case.backend == "chunked"
    for name, value in expected.items():
        kind = "float32_forward" if name == "output" else "float32_gradient"
        assert_close(actual[name], value, "float32_l2_coinciding" if rounded_root else kind, name)


@every_case
@pytest.mark.parametrize("point", ["random", "zero"])
def test_all_keys_and_queries_equal(case, point):
    """Constant tokens (padding, an all-zero start): weights are uniform and nothing is infinite."""
    tensors = make_tensors(18, 6, 8)
    same = torch.randn(8) if point == "random" else torch.zeros(8)
    tensors["query"], tensors["key"] = same.expand(2, 2, 18, 8), same.expand(2, 2, 6, 8)
    result = evaluate(case, tensors)
    assert_close(result["output"], tensors["value"].mean(-2, keepdim=True).expand(-1, -1, 18, -1), "float32_forward")
    assert all(bool(t.isfinite().all()) for t in result.values())


@every_case
def test_no_queries(case):
    tensors = {"query": torch.randn(2, 2, 0, 8), "key": torch.randn(2, 2, 3, 8), "value": torch.randn(2, 2, 3, 5)}
    assert case(**tensors).shape == (2, 2, 0, 5)


@every_case
def test_inputs_stay_as_they_were(case):
    tensors = make_tensors(20, 20, 8)
    before = {name: t.clone() for name, t in tensors.items()}
    mask = _additive(_keep(2, 1, 20, 20), -torch.inf)
    mask_before = mask.clone()
    case(**tensors, mask=mask, is_causal=True, position_bias=torch.randn(1, 2, 20, 20))
    for name, value in before.items():
        assert_close(tensors[name], value, "equal", name)
    assert_close(mask, mask_before, "equal", "mask")
