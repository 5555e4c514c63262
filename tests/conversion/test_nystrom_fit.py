"""The fit of Nyström heads: its gradients and its figures are those of the formulas, written out row by row."""

import pytest
import torch

from distattn_hf import AttentionSpec, CalibrationOptions
from distattn_hf.conversion import calibrate_nystrom
from distattn_hf.conversion.calibrate_nystrom import NystromData, fit_nystrom
from distattn_hf.core.inputs import ModuleCall
from distattn_hf.core.parameters import NystromParameters
from tests.tolerances import assert_close

BATCH, HEADS, LENGTH, SIZE, LANDMARKS, SINKS, WINDOW, SCALING = 5, 2, 14, 4, 3, 1, 3, 0.5


def a_problem(lift: bool, causal: bool, biased: bool, sink: bool) -> tuple[NystromParameters, NystromData]:
    options = {"num_landmarks": LANDMARKS, "num_sinks": SINKS, "window_size": WINDOW, "exact_below": 0, "lift": lift}
    group = NystromParameters(AttentionSpec(mechanism="nystrom", **options), HEADS, SIZE, has_origin=sink)
    with torch.no_grad():
        for parameter in group.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    mask = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    mask[1, ..., :4] = False
    call = ModuleCall(
        SCALING, mask=mask, is_causal=causal,
        position_bias=torch.randn(1, HEADS, LENGTH, LENGTH) if biased else None,
        sink_logit=torch.randn(1, HEADS, 1, 1) if sink else None,
    )  # fmt: skip
    return group, NystromData(*torch.randn(3, BATCH, HEADS, LENGTH, SIZE), call, None)


def row(group: NystromParameters, data: NystromData, b: int, h: int, i: int) -> tuple[torch.Tensor, ...]:
    """(teacher's weights, student's, sinks' and window's alone), over the keys that row i sees, and their values.

    A module's own sink is the last of them, with a value of 0.
    """
    own = {name: tensor.double() for name, tensor in group.fitted_tensors().items()}
    lam = own["log_lambda"][h].exp() if "log_lambda" in own else group.constant_lambda
    alpha = own["log_alpha"][h].exp() if "log_alpha" in own else 1.0
    centre = own["shift"][h] if "shift" in own else 0.0
    query, weight = data.query[b, h, i].double(), lam * SCALING
    sinks = data.keep[b].nonzero()[:SINKS, 0].tolist()
    keys = [j for j in range(LENGTH) if data.keep[b, j] and (j <= i or not data.call.is_causal)]
    teacher, student, alone, values = [], [], [], []
    for j in keys:
        key = data.key[b, h, j].double()
        bias = 0.0 if data.call.position_bias is None else data.call.position_bias[0, h, i, j].double()
        mapped_query, mapped_key = query / alpha, alpha * (key - centre)
        # exp(-w‖q - k‖²), but for a factor of the row; under the lift exp(2w q·k).
        gain = 0.0 if group.spec.lift else -weight * mapped_key.square().sum()
        shares = (own["interpolation_map"][h] @ mapped_key + own["interpolation_bias"][h]).softmax(0)
        shares = shares * (mapped_key @ own["key_gain"][h] + gain).exp()
        at_landmarks = 2 * weight * own["landmarks"][h] @ mapped_query + own["landmark_bias"][h]
        far, near = (at_landmarks.exp() * shares).sum().log(), 2 * weight * mapped_query @ mapped_key + gain
        is_near = j in sinks or abs(i - j) < WINDOW
        teacher.append(SCALING * query @ key + bias)
        student.append((near if is_near else far) + bias)
        alone.append(student[-1] if is_near else torch.tensor(-1e4).double())
        values.append(data.value[b, h, j].double())
    if (sink := data.call.sink_logit) is not None:
        sink = sink[0, h, 0, 0].double()
        teacher.append(sink)
        values.append(torch.zeros(SIZE).double())
        if not group.spec.lift:
            origin = alpha * (own["origin"][h] - centre)
            sink = sink - own["logit_shift"][h] + 2 * weight * (query / alpha) @ origin - weight * origin.square().sum()
        student.append(sink)
        alone.append(sink)
    return *(torch.stack(logits).softmax(0) for logits in (teacher, student, alone)), torch.stack(values)


CASES = [
    pytest.param((lift, causal, biased, sink), id=f"{lift=} {causal=} {biased=} {sink=}")
    for lift, causal, biased, sink in (
        (True, True, False, False), (False, True, False, False), (True, False, True, False), (False, False, True, True),
        (True, True, False, True),
    )
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_loss(case):
    """Σ_h ‖teacher's outputs - student's‖² / ‖teacher's‖², over all rows together, + 0.1 · the mean divergence."""
    group, data = a_problem(*case)
    items, rows = [0, 1, 3], torch.tensor([[13, 7, 9], [12, 6, 13], [5, 5, 1]])
    loss = 0.0
    for h in range(HEADS):
        error, size, divergence = 0.0, 0.0, 0.0
        for b, drawn in zip(items, rows.tolist()):
            for i in drawn:
                teacher, student, _, values = row(group, data, b, h, i)
                error = error + ((teacher - student) @ values).square().sum()
                size = size + (teacher @ values).square().sum()
                divergence = divergence + (teacher * (teacher / student).log()).sum() / rows.numel()
        loss = loss + error / size + 0.1 * divergence
    loss.backward()
    expected = {name: p.grad.clone() for name, p in group.named_parameters() if p.grad is not None}
    group.zero_grad()
    calibrate_nystrom._add_gradients(group, data, items, rows)
    assert expected.keys() >= {"landmarks", "landmark_bias", "interpolation_map", "interpolation_bias", "key_gain"}
    for name, parameter in group.named_parameters():
        if name in expected:
            assert_close(parameter.grad, expected[name], "float32_gradient")


@pytest.mark.parametrize("reported", [1024, 4])
@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_held_out_rows(case, reported, monkeypatch):
    """Of all of them, some at a time, or of every so-many-th of a long text."""
    monkeypatch.setattr(calibrate_nystrom, "_REPORTED", reported)
    monkeypatch.setattr(calibrate_nystrom, "_ENTRIES", 3 * HEADS * LENGTH)
    group, data = a_problem(*case)
    # With no steps the fit only chooses landmarks.
    figures = fit_nystrom(group, data, CalibrationOptions(steps=0))
    assert data.report_sequences
    for h in range(HEADS):
        found = {"after": [], "output_error": [], "window_error": []}
        for b in data.report_sequences:
            rows = [i for i in range(LENGTH) if data.valid[b, i]]
            rows = rows[:: -(-len(rows) // reported)]
            parts = [row(group, data, b, h, i) for i in rows]
            size = sum((teacher @ values).square().sum() for teacher, _, _, values in parts)
            found["after"].append(sum((t * (t / s).log()).sum() for t, s, _, _ in parts) / len(rows))
            for name, number in (("output_error", 1), ("window_error", 2)):
                error = sum(((part[0] - part[number]) @ part[3]).square().sum() for part in parts)
                found[name].append((error / size).sqrt())
        for name, values in found.items():
            assert_close(figures[name][h], torch.stack(values).mean().detach(), "float32_forward")
