"""Every tolerance of the test-suite, in one table, each with its reason. Nothing loosens them from outside."""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """|actual - expected| <= atol + rtol·|expected|, entry by entry."""

    rtol: float
    atol: float
    reason: str


TOLERANCES = {
    "equal": Tolerance(0.0, 0.0, "the same operations on the same numbers: not one bit may differ"),
    "float64": Tolerance(1e-11, 1e-11, "2.2e-16 rounding, over sums of at most 200 terms of size 1 to 100"),
    "float32_forward": Tolerance(1e-5, 1e-5, "6e-8 rounding in distances of size 1 to 100, then λ·scaling, then exp"),
    "float32_gradient": Tolerance(2e-5, 3e-5, "as forward; each entry also sums over up to 130 queries or keys"),
    "float32_softening_gradient": Tolerance(
        2e-4, 2e-4, "sums over all queries and keys of one head, where the parts of ε's gradient by q, k and λ cancel"
    ),
    "float32_softened": Tolerance(
        0.0, 3e-6, "relative to the largest: 6e-8 rounding in six operations of a softened distance"
    ),
    "float32_l2_coinciding": Tolerance(
        5e-3, 5e-3, "√(‖q‖²+‖k‖²-2q·k) at q = k is the root of a rounding error: √6e-8·‖q‖ instead of 0"
    ),
    "weights_sum": Tolerance(0.0, 1e-6, "float32 sum of up to 40 weights"),
    "quadrature": Tolerance(
        0.03, 0.0, "temperatures are limits of high dimension (E‖q‖ is 1.6% below √d at d=16); the test samples, too"
    ),
    "autocast": Tolerance(
        0.0, 0.015, "norm of the error relative to the result: bfloat16 rounds by 0.4% at most, on the way in and out"
    ),
    "autocast_jumps": Tolerance(
        0.0, 0.05, "as above, and rounding turns a few slopes of l1 (sign) and chebyshev (largest coordinate) over"
    ),
}

# Half precision: our error in units of PyTorch's own on the same inputs. The root mean square stays below 1 and the
# largest entry, one draw of many, reaches 1.7.
HALF_ERROR_RATIO = 2.0

# Sampled means may lie this many standard errors from the truth: 1 of 500 million does by chance.
STANDARD_ERRORS = 6.0

# Bytes kept for the backward pass when the length doubles: 2 is linear, 4 quadratic; the offset of small tensors blurs.
LINEAR_GROWTH = 2.2


def assert_close(actual: torch.Tensor, expected: torch.Tensor, kind: str, message: str = "") -> None:
    """Compare in the expected tensor's dtype by the named row of the table; NaN is never close to anything."""
    tolerance = TOLERANCES[kind]
    torch.testing.assert_close(
        actual.to(expected.dtype),
        expected,
        rtol=tolerance.rtol,
        atol=tolerance.atol,
        msg=lambda text: f"{message or 'values'} differ by more than {kind!r} ({tolerance.reason}):\n{text}",
    )


# Whole models, float32 logits of size 0.1 to 10.
# The exact conversion calls the same kernel on the same numbers, so this is generous.
EXACT_LOGITS = 1e-4
# The literal lift in float64: 2e-16 rounding of ‖q‖² + R², of size up to 1e4 in T5, through the softmax and two layers.
LIFT_FLOAT64 = 1e-9
# Other block sizes and orders of summation: rounding through two layers.
CACHED_LOGITS = 5e-5
