"""What compares logits with fixed numbers: a cap on them, and a learned sink, which is a key without a value.

logit_ij = softcap·tanh((shift_i - λ·scaling·distance_ij) / softcap) + bias_ij
weight_ij = exp(logit_ij) / (exp(sink_logit_i) + Σ_j' exp(logit_ij'))

A softmax forgets what a row's logits have in common, so most of attention need not know it, and forms of a distance
that leave it out are as good. These two need it. Of the lift it is known (‖q‖² + R²), and what comes back is q·k
itself; other distances count from a fitted point (see `absolute_shift`).
"""

import math
from dataclasses import replace
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import AttentionInputs, ModuleCall
from .metrics import BUILT_IN, Metric


class MappedHeads(NamedTuple):
    """What the attention of a group of heads is computed from, as `HeadParameters` gives it.

    query, key; λ and softening ε. Where the module has a sink or a cap: origin (H, 1, d), the mapped key whose logit is
    logit_shift (H, 1, 1) or, without that, 0; None under a lift that maps no keys, where it is the key of zeros.
    """

    query: Tensor
    key: Tensor
    lam: float | Tensor
    softening: float | Tensor | None
    origin: Tensor | None = None
    logit_shift: Tensor | None = None


def absolute_shift(heads: MappedHeads, metric: Metric, p: float | None, call: ModuleCall) -> Tensor | None:
    """Return the `shift` of `AttentionInputs` that makes the logits of mapped heads absolute, for a call that asks.

    shift - λ·scaling·dist(q, k) = logit_shift + λ·scaling·(dist(q, origin) - dist(q, k)). Dot products count from a key
    of zeros, so where the origin is one and α goes to 0, logits go to the teacher's, and the module's own sink and cap
    mean what they did. Raises `ValueError` where nothing was fitted to these.
    """
    if call.sink_logit is None and call.softcap is None:
        return None
    weight = call.scaling * (heads.lam[:, None, None] if isinstance(heads.lam, Tensor) else heads.lam)
    query = heads.query.to(torch.promote_types(heads.query.dtype, torch.float32))
    if metric is BUILT_IN["lifted_sqeuclidean"]:
        return None if heads.origin is None else -2 * weight * query @ heads.origin.mT
    if heads.origin is None:
        raise ValueError(
            f"the module passes a {'softcap' if call.sink_logit is None else 'sink'} to its attention, of which its "
            f"conversion to metric {metric.name!r} knew nothing, so nothing was fitted to it; convert the model again"
        )
    epsilon = heads.softening[:, None, None] if isinstance(heads.softening, Tensor) else heads.softening
    origin = heads.origin.expand(len(query), -1, -1, -1)
    return heads.logit_shift + weight * metric.checked_distance(query, origin, p, epsilon=epsilon)


def check_absolute(
    sink_logit: Tensor | None, softcap: float | None, shape: tuple[int, int, int]
) -> tuple[Tensor | None, float | None]:
    """Return (sink_logit broadcastable to (B, H, N, 1), softcap) for shape (B, H, N), or None where there is none.

    A sink_logit of shape (H,) is one of each head. Raises `ValueError` for another shape, and for a cap that is no
    positive number.
    """
    is_number = isinstance(softcap, Real) and not isinstance(softcap, bool)
    if softcap is not None and not (is_number and 0 < softcap < math.inf):
        raise ValueError(f"softcap must be None or a positive finite number, got {softcap!r}")
    if sink_logit is not None:
        heads = shape[1]
        if sink_logit.dim() == 1:
            fits, sink_logit = sink_logit.shape == (heads,), sink_logit[None, :, None, None]
        else:
            sizes = (*shape, 1)
            fits = sink_logit.dim() == 4 and all(g in (1, s) for g, s in zip(sink_logit.shape, sizes, strict=True))
        if not fits or not sink_logit.is_floating_point():
            raise ValueError(
                f"sink_logit must be floating-point and (H,)=({heads},), or broadcast to (B, H, N, 1)={(*shape, 1)}, "
                f"got {sink_logit.dtype} of shape {tuple(sink_logit.shape)}"
            )
    return sink_logit, None if softcap is None else float(softcap)


def row_constant(metric: Metric, query: Tensor, key: Tensor, softened: bool = False) -> Tensor | float:
    """Return what the `dot_form` of a built-in metric leaves out of -distance, broadcastable to (B, H, N, 1)."""
    if metric is BUILT_IN["dot"]:
        return 0.0
    if metric is BUILT_IN["cosine"]:
        return 0.0 if softened else -1.0
    if metric is BUILT_IN["sqeuclidean"]:
        return -query.square().sum(-1, keepdim=True)
    # The lift's R², as the metric has it: without gradient.
    largest = key.detach().square().sum(-1).amax(-1)[..., None, None]
    return -query.square().sum(-1, keepdim=True) - largest.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def unlifted(inputs: AttentionInputs) -> AttentionInputs:
    """Return inputs with q·k in place of the lifted distance where something compares logits with fixed numbers.

    -λ·‖q̃ - k̃‖² = 2λ·q·k - λ·(‖q‖² + R²): the same, without the constant that would only be added again.
    """
    if not inputs.is_absolute or inputs.metric is not BUILT_IN["lifted_sqeuclidean"]:
        return inputs
    return replace(inputs, metric=BUILT_IN["dot"], lam=2 * inputs.lam)


def finish_logits(inputs: AttentionInputs, logits: Tensor, shift: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return logits with shift, cap and bias; shift and bias are those of the rows at hand."""
    if shift is not None:
        logits = logits + shift.to(logits.dtype)
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    return logits if bias is None else logits + bias.to(logits.dtype)


def row_shift(inputs: AttentionInputs, left_out: Tensor | float = 0.0) -> Tensor:
    """Return what makes logits absolute, (B, H, N, 1) in at least float32, that come from a form which leaves out
    `left_out` of -distance, as `row_constant` has it.
    """
    dtype = torch.promote_types(inputs.query.dtype, torch.float32)
    shift = torch.as_tensor(inputs.lambda_column() * inputs.scaling * left_out, dtype=dtype, device=inputs.query.device)
    if inputs.shift is not None:
        shift = shift + inputs.shift.to(dtype)
    return shift.expand(*inputs.query.shape[:3], 1)


def relative_sink(inputs: AttentionInputs, left_out: Tensor | float = 0.0) -> Tensor | None:
    """Return the sink's logit beside logits without `row_shift`, (B, H, N, 1), finite, in at least float32, or None.

    Under a cap, inside which the shift is, it stays absolute.
    """
    sink = inputs.sink_logit
    if sink is None:
        return None
    sink = sink.to(torch.promote_types(inputs.query.dtype, torch.float32))
    if inputs.softcap is None:
        sink = sink - row_shift(inputs, left_out)
    return sink.clamp_min(torch.finfo(sink.dtype).min / 8).expand(*inputs.query.shape[:3], 1)
