"""The fit of one group of heads: what it is judged by, which rows it sees, and what it must not do."""

import math

import pytest
import torch

from distattn_hf import AttentionSpec, CalibrationOptions
from distattn_hf.conversion.calibrate import fit_group
from distattn_hf.conversion.fit import LayerData, Rows, row_deviation
from distattn_hf.core.inputs import ModuleCall
from distattn_hf.core.parameters import HeadParameters
from tests.tolerances import assert_close

BATCH, HEADS, LENGTH, SIZE = 3, 2, 7, 4


def a_group(**options) -> HeadParameters:
    return HeadParameters(AttentionSpec("l2", **{"transform": "scalar", **options}), HEADS, SIZE)


def layer_data(**options) -> LayerData:
    query, key = torch.randn(BATCH, HEADS, LENGTH, SIZE), torch.randn(BATCH, HEADS, LENGTH, SIZE)
    return LayerData(query, key, ModuleCall(SIZE**-0.5, is_causal=True, **options), None)


def test_divergence_is_kl_from_the_teacher_to_the_student():
    """Against loops over batch, heads and rows: Σ p·log(p / q) over kept keys, p the teacher's, mean over rows."""
    query, key = torch.randn(BATCH, HEADS, 5, SIZE).double(), torch.randn(BATCH, HEADS, LENGTH, SIZE).double()
    keep, bias = torch.rand(BATCH, 1, 5, LENGTH) > 0.4, torch.randn(BATCH, HEADS, 5, LENGTH).double()
    keep[..., 0] = True
    rows, group = Rows(query, key, keep, bias, 0.7), a_group(lam=1.9, learnable_lambda=False).double()
    group.log_alpha.data[:] = torch.tensor([-0.3, -1.0])
    group.shift.data.normal_()
    expected = torch.zeros(HEADS).double()
    for b in range(BATCH):
        for h in range(HEADS):
            alpha = math.exp(group.log_alpha[h])
            for i in range(5):
                kept = keep[b, 0, i].nonzero()[:, 0]
                teacher = (0.7 * key[b, h, kept] @ query[b, h, i] + bias[b, h, i, kept]).softmax(0)
                difference = query[b, h, i] / alpha - alpha * (key[b, h, kept] - group.shift[h])
                student = (-1.9 * 0.7 * difference.norm(dim=-1) + bias[b, h, i, kept]).softmax(0)
                expected[h] += (teacher * (teacher / student).log()).sum() / (BATCH * 5)
    assert_close(rows.divergence(group).detach(), expected.detach(), "float64")


def test_the_deviation_of_a_row_is_over_its_kept_keys():
    keep = torch.rand(BATCH, 1, 5, LENGTH) > 0.4
    keep[..., 0] = True
    log_weights = torch.randn(BATCH, HEADS, 5, LENGTH).double()
    rows = [
        [log_weights[b, h, i, keep[b, 0, i]].std(correction=0) for b in range(BATCH) for i in range(5)]
        for h in range(HEADS)
    ]
    expected = torch.stack([torch.stack(head).mean() for head in rows])
    assert_close(row_deviation(log_weights.masked_fill(~keep, -1e30), keep), expected, "float64")


def test_rows_of_padding_and_rows_with_one_key_are_not_fitted():
    mask = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    mask[1, ..., :3] = False
    valid = layer_data(mask=mask).valid
    assert valid[0].tolist() == [False] + [True] * 6
    assert valid[1].tolist() == [False] * 4 + [True] * 3
    # Keys on the right of a bidirectional text: queries there see others and are padding all the same.
    data = LayerData(*torch.randn(2, BATCH, HEADS, LENGTH, SIZE), ModuleCall(0.5, mask=mask.flip(-1)), None)
    assert data.valid[1].tolist() == [True] * 4 + [False] * 3


@pytest.mark.parametrize("softening", [0, "fit"])
def test_a_fit_that_hurts_is_taken_back(softening):
    """With steps a thousand times too large, which no head survives."""
    data, group = layer_data(), a_group(softening=softening)
    result = fit_group(group, data, CalibrationOptions(steps=3, learning_rate=30.0, divergence_budget=0.0))
    assert bool((result["after"] <= result["before"] + 1e-6).all())
    assert all(bool(tensor.isfinite().all()) for tensor in group.fitted_tensors().values())


def test_within_the_budget_alpha_rises_to_one_and_no_further():
    data, group = layer_data(), a_group(softening=0)
    fit_group(group, data, CalibrationOptions(steps=5, learning_rate=0.5, divergence_budget=1e3))
    assert_close(group.log_alpha.detach(), torch.zeros(HEADS), "equal")
