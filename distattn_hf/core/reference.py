"""The readable exact attention every fast path is tested against, and the one that returns weights."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .inputs import AttentionInputs
from .masks import causal_keep, masked_softmax


def attention_logits(inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
    """-λ·scaling·distance(q, k) + bias, and which entries are kept: ((B, H, N, M), broadcastable bool or None)."""
    distance = inputs.metric.distance(inputs.query, inputs.key, inputs.p)
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
