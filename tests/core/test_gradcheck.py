"""Gradients of every metric on every backend against finite differences in float64."""

import pytest
import torch

from .cases import every_float64_case

OPTIONS = {
    "full": {},
    "causal": {"is_causal": True},
    "masked": {"mask": torch.tensor([[True, True, False, True]])},
}


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@every_float64_case
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_equal_finite_differences(case, options):
    """Query, key (grouped), value, λ of each head and bias at once; 18 queries are two blocks of the chunked backend.

    gradcheck's own tolerances (1e-3 relative, 1e-5 absolute) are those of a finite difference in float64.
    """
    # Only the case in blocks needs more queries than a block of 16 holds; fewer are quicker.
    num_queries = 18 if case.blocks else 5
    lam = torch.tensor([0.7, 1.4], dtype=torch.float64, requires_grad=True)
    inputs = (leaf(1, 2, num_queries, 2), leaf(1, 1, 4, 2), leaf(1, 1, 4, 1), lam, leaf(1, 2, 1, 4))

    def attention(query, key, value, lam, bias):
        return case(query, key, value, lam=lam, position_bias=bias, scaling=0.8, **OPTIONS[options])

    assert torch.autograd.gradcheck(attention, inputs)
