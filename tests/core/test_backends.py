"""Every backend against the float64 reference, output and all gradients, over a pairwise table of what a call holds."""

from itertools import product

import pytest
import torch

from tests.tolerances import assert_close

from .cases import (
    Case,
    evaluate,
    every_backend,
    every_case,
    every_float64_backend,
    lambdas,
    make_tensors,
    padded,
    some,
    with_empty_rows,
)

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
BATCH, HEADS, QUERIES, KEYS = 2, 4, 37, 23
MIN = torch.finfo(torch.float32).min


def _additive(keep, masked):
    return torch.where(keep, torch.randn(keep.shape), torch.tensor(masked))


def empty_rows():
    return with_empty_rows(BATCH, QUERIES, KEYS, 20)


# What a backend may be handed; test_oracle.py and test_masks.py say what each form of a mask means.
MASKS = {
    "none": lambda: None,
    "padding": lambda: padded(BATCH, KEYS),
    "bool (B,1,N,longer than M)": lambda: some(BATCH, 1, QUERIES, KEYS + 9),
    "bool (B,H,N,M)": lambda: some(BATCH, HEADS, QUERIES, KEYS),
    "bool (1,1,N,M)": lambda: some(1, 1, QUERIES, KEYS),
    "float (B,1,N,M), -inf": lambda: _additive(some(BATCH, 1, QUERIES, KEYS), -torch.inf),
    "float64 (B,1,1,M), finite": lambda: _additive(some(BATCH, 1, 1, KEYS), -3.0).double(),
    "empty rows": empty_rows,
    "empty rows, finfo.min": lambda: _additive(empty_rows(), MIN),
    "everything masked": lambda: torch.zeros(BATCH, 1, QUERIES, KEYS, dtype=torch.bool),
}
BIASES = {
    "(1,H,N,M)": (1, HEADS, QUERIES, KEYS),
    "(B,1,1,M)": (BATCH, 1, 1, KEYS),
    "(1,H,1,1)": (1, HEADS, 1, 1),
    "(B,H,N,1)": (BATCH, HEADS, QUERIES, 1),
}
LAMBDAS = ("default", "number", "per head")
KEY_HEADS = (4, 2, 1)

# (mask, causal, bias, λ, heads of the keys), found by a search.
TABLE = [
    ("none", False, None, "per head", 4),
    ("none", True, "(B,H,N,1)", "default", 2),
    ("padding", False, None, "number", 2),
    ("padding", True, "(1,H,1,1)", "default", 4),
    ("bool (B,1,N,longer than M)", False, "(1,H,1,1)", "per head", 2),
    ("bool (B,1,N,longer than M)", True, None, "default", 4),
    ("bool (B,H,N,M)", False, "(B,1,1,M)", "per head", 1),
    ("bool (B,H,N,M)", True, None, "number", 2),
    ("bool (1,1,N,M)", False, None, "number", 1),
    ("bool (1,1,N,M)", True, "(1,H,N,M)", "per head", 2),
    ("float (B,1,N,M), -inf", False, None, "number", 1),
    ("float (B,1,N,M), -inf", True, "(B,1,1,M)", "default", 4),
    ("float64 (B,1,1,M), finite", False, "(1,H,N,M)", "number", 1),
    ("float64 (B,1,1,M), finite", True, None, "per head", 2),
    ("empty rows", False, None, "number", 4),
    ("empty rows", True, "(1,H,1,1)", "number", 1),
    ("empty rows, finfo.min", False, "(B,H,N,1)", "per head", 4),
    ("empty rows, finfo.min", True, None, "number", 1),
    ("everything masked", False, None, "default", 1),
    ("everything masked", True, "(1,H,1,1)", "default", 2),
]
every_row = pytest.mark.parametrize("row", TABLE, ids=lambda row: ", ".join(str(each) for each in row))


def test_the_table_holds_every_pair():
    """All but bias by mask, λ and key heads, of which a bias or none has every one."""
    masks, causal, biases, lambdas_, heads = zip(*TABLE)
    given = [bias is not None for bias in biases]
    pairs = [(masks, causal), (masks, given), (lambdas_, causal), (heads, causal), (lambdas_, heads)]
    pairs += [(given, lambdas_), (given, heads)]
    for left, right in pairs:
        assert set(zip(left, right)) == set(product(set(left), set(right)))
    assert {pair for pair in zip(biases, causal) if pair[0]} == set(product(BIASES, (False, True)))
    assert set(masks) == set(MASKS)
    assert (set(lambdas_), set(heads)) == (set(LAMBDAS), set(KEY_HEADS))


def call_of(row) -> tuple[dict, dict]:
    """(tensors that are differentiated, the other options) of one row of the table."""
    mask, is_causal, bias, lam, key_heads = row
    tensors = make_tensors(QUERIES, KEYS, 9, 6, batch=BATCH, heads=HEADS, key_heads=key_heads)
    if bias:
        tensors["position_bias"] = torch.randn(BIASES[bias])
    if lam == "per head":
        tensors["lam"] = lambdas(HEADS)
    return tensors, {"mask": MASKS[mask](), "is_causal": is_causal, **({"lam": 0.7} if lam == "number" else {})}


def check_against_reference(case: Case, tensors: dict, dtype=torch.float32, **options) -> None:
    """Output and gradients in `dtype` against the reference's in float64, which test_oracle.py checks by loops."""
    expected = evaluate(case.reference, tensors, torch.float64, **options)
    actual = evaluate(case, tensors, dtype, **options)
    for name, value in expected.items():
        assert actual[name].dtype == dtype, name
        kind = "float32_forward" if name == "output" else "float32_gradient"
        assert_close(actual[name], value, "float64" if dtype == torch.float64 else kind, name)


@every_backend
@every_row
def test_every_pair_of_choices(case, row):
    tensors, options = call_of(row)
    check_against_reference(case, tensors, **options)


# A mask and a bias, causal and not, one λ for all and one a head.
@every_float64_backend
@pytest.mark.parametrize("row", [TABLE[6], TABLE[9], TABLE[15]], ids=lambda row: ", ".join(str(each) for each in row))
def test_in_float64(case, row):
    tensors, options = call_of(row)
    check_against_reference(case, tensors, torch.float64, **options)


@every_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(case, shape):
    tensors = make_tensors(**SHAPES[shape])
    if causal := list(SHAPES).index(shape) % 2 == 1:
        tensors["lam"] = lambdas(tensors["query"].shape[1])
    check_against_reference(case, tensors, is_causal=causal)


@every_case
def test_empty_rows_give_zero(case):
    """Also for their queries' gradients; equality with the reference alone would allow both to be wrong."""
    result = evaluate(case, make_tensors(QUERIES, KEYS, 9, batch=BATCH, heads=HEADS), mask=empty_rows())
    for rows in (result["output"], result["query"]):
        assert bool((rows[0, :, 3] == 0).all())
        assert bool((rows[1, :, 20:] == 0).all())
        assert bool((rows[0, :, 4] != 0).any())
    assert all(bool(t.isfinite().all()) for t in result.values())


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


@every_backend
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


# By the kernels in float32, and in float64, of which there are none, by PyTorch's operations.
@every_float64_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties(case, dtype):
    """Whole numbers: equal coordinates have slope 0, and those that reach the maximum share its gradient."""
    tensors = {name: tensor.round() for name, tensor in make_tensors(20, 9, 7).items()}
    if case.metric == "cosine":
        tensors["query"][..., 0] = tensors["key"][..., 0] = 1.0  # never the zero vector
    check_against_reference(case, tensors, dtype)


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
    mask = _additive(some(2, 1, 20, 20), -torch.inf)
    mask_before = mask.clone()
    case(**tensors, mask=mask, is_causal=True, position_bias=torch.randn(1, 2, 20, 20))
    for name, value in before.items():
        assert_close(tensors[name], value, "equal", name)
    assert_close(mask, mask_before, "equal", "mask")
