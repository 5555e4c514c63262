"""The readable exact attention every fast path is tested against, and the one that returns weights."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .inputs import AttentionInputs, causal_keep, masked_softmax
from .nystrom_hybrid import HEADROOM, HybridInputs, take_sinks


def attention_logits(inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
    """-λ·scaling·distance(q, k) + bias, and which entries are kept: ((B, H, N, M), broadcastable bool or None)."""
    distance = inputs.metric.checked_distance(inputs.query, inputs.key, inputs.p, fast=False)
    logits = -inputs.lambda_column() * inputs.scaling * distance
    if inputs.bias is not None:
        logits = logits + inputs.bias.to(logits.dtype)
    keep = inputs.keep
    if inputs.is_causal:
        triangle = causal_keep(inputs.query.shape[-2], inputs.key.shape[-2], inputs.query.device)
        keep = triangle if keep is None else keep & triangle
    return logits, keep


def reference_attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """softmax(-λ·scaling·distance(q, k) + bias)·v, with everything written out.

    Returns the output (B, H, N, d_v) and the weights (B, H, N, M) whose rows sum to 1 (or are 0 where nothing is kept).
    The weights are those before dropout.
    """
    logits, keep = attention_logits(inputs)
    keep = None if keep is None else keep.expand_as(logits)
    weights = masked_softmax(logits, keep)
    dropped = F.dropout(weights, inputs.dropout_p) if inputs.dropout_p > 0 else weights
    return torch.matmul(dropped, inputs.value), weights


def reference_hybrid(inputs: HybridInputs) -> tuple[Tensor, Tensor]:
    """Exact weights nearby and Σ_a exp(far_query_ia)·far_key_ja elsewhere, written out: quadratic in time and memory.

    Returns the output (B, H, N, d_v) and the weights (B, H, N, M), before dropout. Only without a state.
    """
    x, device = inputs, inputs.query.device
    num_queries, num_keys = x.query.shape[2], x.key.shape[2]
    relative = torch.arange(num_keys, device=device) - torch.arange(num_queries, device=device)[:, None]
    seen = (relative <= 0) if x.is_causal else torch.ones_like(relative, dtype=torch.bool)
    seen = seen & x.keep[:, None, None, :]
    position = take_sinks(x)[0].sink_position
    is_sink = (torch.arange(num_keys, device=device) == position[..., None]).any(1)
    exact = (relative.abs() < x.window_size) | is_sink[:, None, None, :]
    logits, far = x.query @ x.key.transpose(-1, -2), x.far_query
    far_bias = torch.zeros_like(logits[:1])
    if x.bias is not None:
        far_bias = x.bias.at(relative)[None]
        logits = logits + far_bias
    shift = torch.maximum(
        logits.masked_fill(~(exact & seen), float("-inf")).amax(-1, keepdim=True),
        far.amax(-1, keepdim=True) + far_bias.amax(-1, keepdim=True) - HEADROOM,
    )
    far = (far - shift).exp() @ x.far_key.transpose(-1, -2) * far_bias.exp()
    weights = torch.where(exact, (logits - shift).exp(), far) * seen
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total != 0, total, 1.0)
    dropped = F.dropout(weights, x.dropout_p) if x.dropout_p > 0 else weights
    return torch.matmul(dropped, x.value), weights
