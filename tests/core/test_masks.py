"""What each form of mask means, and the softmax that survives rows in which nothing is kept."""

import pytest
import torch

from distattn_hf.core.inputs import AttentionInputs, add_bias, causal_keep, masked_softmax, merge_masks, split_mask
from distattn_hf.core.metrics import get_metric
from tests.tolerances import assert_close

B, H, N, M = SHAPE = (2, 3, 4, 5)
INF = float("inf")


def test_no_mask_says_nothing():
    assert split_mask(None, SHAPE) == (None, None)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.int32, torch.uint8])
@pytest.mark.parametrize(
    ("shape", "axes"), [((B, M), (B, 1, 1, M)), ((B, N, M), (B, 1, N, M)), ((1, H, 1, M), (1, H, 1, M))]
)
def test_bool_and_integer_masks_say_which_to_keep(dtype, shape, axes):
    mask = torch.rand(shape) > 0.5
    keep, bias = split_mask(mask.to(dtype), SHAPE)
    assert bias is None
    assert keep.dtype == torch.bool
    assert torch.equal(keep, mask.view(axes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_float_mask_is_added_and_its_lowest_values_mask(dtype):
    lowest = torch.finfo(dtype).min
    mask = torch.tensor([0.0, -2.5, lowest, -INF, lowest * 0.75], dtype=dtype).expand(B, 1, N, M)
    keep, bias = split_mask(mask, SHAPE)
    assert torch.equal(keep[1, 0, 2], torch.tensor([True, True, False, False, False]))
    assert torch.equal(bias[1, 0, 2], torch.tensor([0, -2.5, 0, 0, 0], dtype=dtype))


def test_mask_longer_than_the_keys_is_cut_at_the_end():
    mask = torch.rand(B, 1, N, 9) > 0.5
    assert torch.equal(split_mask(mask, SHAPE)[0], mask[..., :M])
    assert torch.equal(split_mask(mask, (B, H, N, 1))[0], mask[..., :1])


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((M,), "rank"), ((1, B, 1, N, M), "rank"), ((), "rank"), ((B, M - 1), "axis M"), ((3, M), "axis B"),
        ((B, 3, M), "axis N"), ((B, 2, N, M), "axis H"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_mask_that_does_not_fit(shape, said, dtype):
    with pytest.raises(ValueError, match="mask") as error:
        split_mask(torch.ones(shape, dtype=dtype), SHAPE)
    assert said in str(error.value)


@pytest.mark.parametrize(("num_queries", "num_keys", "offset"), [(4, 4, 0), (4, 6, 0), (6, 3, 0), (3, 8, 5), (1, 1, 0)])
def test_causal_keep_is_the_top_left_triangle(num_queries, num_keys, offset):
    keep = causal_keep(num_queries, num_keys, "cpu", offset)
    expected = [[j <= i + offset for j in range(num_keys)] for i in range(num_queries)]
    assert keep.tolist() == expected


def test_add_bias():
    left, right = torch.randn(1, H, N, M), torch.randn(B, 1, 1, M)
    assert add_bias(None, None) is None
    assert add_bias(left, None) is left
    assert add_bias(None, right) is right
    assert torch.equal(add_bias(left, right), left + right)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_mask_and_bias_both_mask_and_both_are_added(dtype):
    """T5 adds its mask to its bias: what either hides is hidden, and what both say is added once."""
    mask, bias = torch.randn(B, 1, N, M), torch.randn(1, H, N, M)
    mask[0, 0, 1, 2], bias[0, 1, 2, 3] = -INF, torch.finfo(bias.dtype).min
    keep, merged = merge_masks(mask > 0 if dtype == torch.bool else mask, bias, (B, H, N, M))
    expected = (mask > 0 if dtype == torch.bool else mask > -INF).expand(B, H, N, M).clone()
    expected[:, 1, 2, 3] = False
    assert torch.equal(keep.expand_as(expected), expected)
    wanted = bias if dtype == torch.bool else mask + bias
    assert torch.equal(merged.expand_as(expected)[expected], wanted.expand_as(expected)[expected])


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "lam", "softening", "sink_logit", "shift"])
def test_a_gradient_of_one_tensor_alone_is_asked_for(name):
    """Backends without a backward pass are chosen where this says no."""
    tensor, one = torch.ones(1, 1, 2, 2), torch.ones(1)
    tensors = {"query": tensor, "key": tensor, "value": tensor, "bias": tensor, "lam": one, "softening": one}
    tensors |= {"sink_logit": tensor[..., :1], "shift": tensor[..., :1]}
    assert not AttentionInputs(metric=get_metric("l2"), scaling=1.0, **tensors).needs_grad()
    tensors[name] = tensors[name].clone().requires_grad_()
    inputs = AttentionInputs(metric=get_metric("l2"), scaling=1.0, **tensors)
    assert inputs.needs_grad()
    with torch.no_grad():
        assert not inputs.needs_grad()


def test_masked_softmax_is_softmax_over_the_kept():
    logits = torch.randn(N, M, dtype=torch.float64)
    keep = torch.tensor([1, 0, 1, 1, 0], dtype=torch.bool).expand(N, M)
    weights = masked_softmax(logits, keep)
    assert_close(weights[:, [0, 2, 3]], logits[:, [0, 2, 3]].softmax(-1), "float64")
    assert bool((weights[:, [1, 4]] == 0).all())
    assert_close(masked_softmax(logits, None), logits.softmax(-1), "equal")


@pytest.mark.parametrize("masked", [0.0, 1e30, INF, -INF])
def test_masked_softmax_ignores_what_is_masked(masked):
    """Even an infinite logit behind the mask, and a row in which nothing is kept, in both directions."""
    logits = torch.randn(N, M)
    logits[:, 1] = masked
    keep = torch.ones(N, M, dtype=torch.bool)
    keep[:, 1] = False
    keep[2] = False
    logits.requires_grad_()
    weights = masked_softmax(logits, keep)
    (gradient,) = torch.autograd.grad((weights * torch.randn(N, M)).sum(), logits)
    assert bool((weights[2] == 0).all())
    assert_close(weights.sum(-1), torch.tensor([1.0, 1.0, 0.0, 1.0]), "weights_sum")
    assert bool((gradient[~keep] == 0).all())
    assert bool((gradient[keep] != 0).all())
    assert bool(gradient.isfinite().all())
