"""bfloat16 and float16 against float64, with PyTorch's own attention in the same precision as the yardstick."""

import pytest
import torch
from torch.nn import functional as F

from tests.tolerances import HALF_ERROR_RATIO, assert_close

from .cases import evaluate, every_case, make_tensors

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
OPTIONS = {
    "full": {},
    "causal": {"is_causal": True},
    "masked": {"mask": torch.ones(1, 1, 40, 40, dtype=torch.bool).triu(-20)},
}

# Their gradient is not continuous in query and key.
JUMPING_SLOPES = ("l1", "chebyshev")


def errors(actual: dict, expected: dict) -> dict[str, tuple[float, float]]:
    """{name: (root mean square, largest)} of the error, each relative to the same of the expected tensor."""
    result = {}
    for name, value in expected.items():
        error = actual[name].double() - value
        result[name] = (
            float(error.square().mean().sqrt() / value.square().mean().sqrt()),
            float(error.abs().max() / value.abs().max()),
        )
    return result


def pytorch_errors(tensors: dict, options: dict) -> dict[str, tuple[float, float]]:
    options = {"is_causal": options.get("is_causal", False), "attn_mask": options.get("mask")}
    expected = evaluate(F.scaled_dot_product_attention, tensors, torch.float64, **options)
    return errors(evaluate(F.scaled_dot_product_attention, tensors, **options), expected)


@every_case
@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.bfloat16, "full"), (torch.float16, "causal"), (torch.bfloat16, "masked")], ids=str
)
def test_error_is_within_twice_pytorchs(case, dtype, options):
    """Truth is the float64 reference on the same rounded inputs; the yardstick is PyTorch's error on them."""
    tensors, options = make_tensors(40, head_dim=32, dtype=dtype), OPTIONS[options]
    expected = evaluate(case.reference, tensors, torch.float64, **options)
    actual = evaluate(case, tensors, **options)
    assert all(tensor.dtype == dtype for tensor in actual.values())
    ours, theirs = errors(actual, expected), pytorch_errors(tensors, options)
    for name in expected:
        for kind, mine, budget in zip(("root mean square", "largest"), ours[name], theirs[name]):
            assert mine <= HALF_ERROR_RATIO * budget, f"{name}: {kind} error {mine:.2e}, PyTorch's {budget:.2e}"


@every_case
@DTYPES
def test_lambda_and_bias_stay_in_float32(case, dtype):
    """They come in float32 beside half-precision tensors; rounded on the way in, their gradients lose 3 digits of 6."""
    tensors = make_tensors(20, head_dim=32, dtype=dtype)
    extra = {"lam": torch.tensor([0.7013, 1.3027]), "position_bias": torch.randn(1, 2, 20, 20)}
    expected = evaluate(case.reference, {**tensors, **extra}, torch.float64)
    actual = evaluate(case, {**tensors, **extra})
    for name in extra:
        assert actual[name].dtype == torch.float32
        assert_close(actual[name], expected[name], "float32_gradient", name)


@every_case
def test_autocast_changes_nothing_inside(case):
    """Under autocast a matmul of float32 tensors would run in bfloat16; distances and softmax must not."""
    tensors = make_tensors(20, head_dim=16)
    expected = evaluate(case, tensors)

    def under_autocast(**tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return case(**tensors)

    # The backward pass runs outside, as in every training loop; recomputed blocks must find their own way.
    actual = evaluate(under_autocast, tensors)
    for name, value in expected.items():
        assert_close(actual[name], value, "equal", name)


@every_case
def test_autocast_training_step_is_close_to_float32(case):
    """Projections in bfloat16 by autocast, attention on what they give: finite, and near the step in float32."""
    tokens, weight = torch.randn(2, 20, 32), torch.randn(96, 32) / 32**0.5

    def step():
        leaf = weight.clone().requires_grad_()
        query, key, value = F.linear(tokens, leaf).view(2, 20, 3, 2, 16).permute(2, 0, 3, 1, 4)
        output = case(query, key, value, is_causal=True)
        return output, leaf

    def gradient(output, leaf):
        return torch.autograd.grad(output.float().square().mean(), leaf)[0]

    expected, expected_leaf = step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, leaf = step()
    assert output.dtype == torch.bfloat16
    for actual, truth in ((output, expected), (gradient(output, leaf), gradient(expected, expected_leaf))):
        error = (actual.detach() - truth.detach()).norm() / truth.detach().norm()
        assert_close(error, torch.tensor(0.0), "autocast_jumps" if case.metric in JUMPING_SLOPES else "autocast")


@every_case
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 30.0), (torch.float16, 200.0), (torch.bfloat16, 200.0)])
def test_large_activations_stay_finite(case, dtype, scale):
    """‖q‖² of large activations overflows float16 (65,504) and the distances must not be formed in it."""
    tensors = make_tensors(20, head_dim=64, dtype=dtype)
    tensors = {**tensors, "query": tensors["query"] * scale, "key": tensors["key"] * scale}
    if case.metric in ("dot", "lifted_sqeuclidean") and case.backend == "sdpa":
        # These are PyTorch's attention and nothing else, so its own result is the measure.
        factor = 2 if case.metric == "lifted_sqeuclidean" else 1
        expected = F.scaled_dot_product_attention(**tensors, scale=factor * 0.01 * 64**-0.5)
        assert_close(case(**tensors, lam=0.01), expected, "equal")
        return
    result = evaluate(case, tensors, lam=0.01)
    assert all(bool(tensor.isfinite().all()) for tensor in result.values())
    assert bool((result["output"] != 0).any())
