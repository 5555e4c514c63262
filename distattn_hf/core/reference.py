"""The readable exact attention that every fast path is tested against, and that returns weights."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .absolute_logits import finish_logits, row_constant
from .inputs import AttentionInputs, add_triangle, masked_softmax
from .kernel_cpp_library import in_onnx_export
from .metrics import BUILT_IN
from .nystrom_hybrid import HEADROOM, HybridInputs, take_sinks


def attention_logits(inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
    """Return -λ·scaling·distance(q, k) + bias, and the kept entries: ((B, H, N, M), broadcastable bool or None).

    Where there is a cap or a sink (see absolute_logits.py) the lift's logits are those of q·k, its constant undone.
    """
    # Written as ONNX this is what runs, and should take the matmuls that a metric has.
    distance = inputs.distances(inputs.query, inputs.key, fast=in_onnx_export())
    if inputs.is_absolute and inputs.metric is BUILT_IN["lifted_sqeuclidean"]:
        distance = distance + row_constant(inputs.metric, inputs.query, inputs.key)
    logits = -inputs.lambda_column() * inputs.scaling * distance
    logits = finish_logits(inputs, logits, inputs.shift, inputs.bias)
    keep = inputs.keep
    if inputs.is_causal:
        keep = add_triangle(keep, inputs.query.shape[-2], inputs.key.shape[-2], inputs.query.device)
    return logits, keep


def reference_attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Compute softmax(-λ·scaling·distance(q, k) + bias)·v, with everything written out.

    Returns the output (B, H, N, d_v) and the weights (B, H, N, M) whose rows sum to 1 (or are 0 where nothing is kept;
    with a sink, to 1 less its weight). The weights are those before dropout.
    """
    logits, keep = attention_logits(inputs)
    keep = None if keep is None else keep.expand_as(logits)
    weights = masked_softmax(logits, keep, inputs.sink_logit)
    dropped = F.dropout(weights, inputs.dropout_p) if inputs.dropout_p > 0 else weights
    return torch.matmul(dropped, inputs.value), weights


def exact_keys(inputs: HybridInputs, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (key minus query position (n, M), which keys some queries see (B, 1, n, M), which of these exactly)."""
    problem, device = inputs, inputs.query.device
    key_numbers = torch.arange(problem.key.shape[2], device=device)
    relative = key_numbers - torch.arange(start, stop, device=device)[:, None]
    seen = (relative <= 0) if problem.is_causal else torch.ones_like(relative, dtype=torch.bool)
    seen = seen & problem.keep[:, None, None, :]
    position = take_sinks(replace(problem, state=None))[0].sink_position
    exact = (relative.abs() < problem.window_size) | (key_numbers == position[..., None]).any(1)[:, None, None, :]
    return relative, seen, exact & seen


def hybrid_rows(inputs: HybridInputs, start: int, stop: int) -> Tensor:
    """Return the weights (B, H, n, M) of queries start to stop: exp(q·k + bias) of the keys that `exact_keys` names,
    and Σ_a exp(far_query_ia)·far_key_ja·exp(bias) of the others, over their sum. Only without a state.
    """
    problem = inputs
    relative, seen, exact = exact_keys(problem, start, stop)
    logits, far = problem.query[:, :, start:stop] @ problem.key.mT, problem.far_query[:, :, start:stop]
    far_bias = torch.zeros_like(logits[:1])
    if problem.bias is not None:
        far_bias = problem.bias.at(relative)[None]
        logits = logits + far_bias
    sink = problem.query[:, :, start:stop, -1:] if problem.has_learned_sink else None
    shift = torch.maximum(
        logits.masked_fill(~exact, float("-inf")).amax(-1, keepdim=True),
        far.amax(-1, keepdim=True) + far_bias.amax(-1, keepdim=True) - HEADROOM,
    )
    if sink is not None:
        shift = torch.maximum(shift, sink)
    far = (far - shift).exp() @ problem.far_key.mT * far_bias.exp()
    weights = torch.where(exact, (logits - shift).exp(), far) * seen
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - shift).exp()
    return weights / torch.where(total != 0, total, 1.0)


def reference_hybrid(inputs: HybridInputs) -> tuple[Tensor, Tensor]:
    """Compute Nyström attention written out: quadratic in time and memory. Only without a state.

    Returns the output (B, H, N, d_v) and the weights (B, H, N, M), before dropout.
    """
    weights = hybrid_rows(inputs, 0, inputs.query.shape[2])
    dropped = F.dropout(weights, inputs.dropout_p) if inputs.dropout_p > 0 else weights
    return torch.matmul(dropped, inputs.value), weights
