"""Attention rollout: how much of each input token reaches each position through all layers."""

import torch
from torch import Tensor

from .samples import padding_of
from .watch import no_weights, run_watched


@torch.no_grad()
def attention_rollout(model, batch: dict, *, residual: float = 0.5, part: str | None = None) -> Tensor:
    """Return R_L = (1 - r)·A_L·R_{L-1} + r·R_{L-1}, R_0 = I, A_l the mean of layer l's heads: (B, N, N), rows sum to 1.

    residual r: the share that skips the attention; ½ as in Abnar & Zuidema, Quantifying attention flow in transformers
    (2020). part: of an encoder-decoder, "encoder" (None, too) or "decoder". A query that sees nothing keeps its row.

    Raises `ValueError` for a residual outside [0, 1), another part, or a model without attention weights.
    """
    if not 0 <= residual < 1:
        raise ValueError(f"residual must be in [0, 1), got {residual!r}")
    has_parts = model.config.is_encoder_decoder
    if part not in (None, "encoder", "decoder") or (part is not None and not has_parts):
        raise ValueError(f"part must be None{', encoder or decoder' if has_parts else ''} for this model, got {part!r}")
    rollout: list[Tensor] = []

    def add(call):
        if call.kind != "self" or (has_parts and ("decoder" in call.name) != (part == "decoder")):
            return
        keys = padding_of(model, call, batch)[1]
        mean = torch.cat([rows.weights.mean(1) for rows in call.blocks()], dim=1)
        # Renormalise rows after removing weight on padding and rounding errors.
        mean = mean * keys[:, None, :]
        total = mean.sum(-1, keepdim=True)
        eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        mean = torch.where(total > 0, mean / torch.where(total > 0, total, 1.0), eye)
        previous = rollout.pop() if rollout else eye.expand_as(mean)
        rollout.append((1 - residual) * (mean @ previous) + residual * previous)

    run_watched(model, batch, add)
    if not rollout:
        raise no_weights(model, "has no self-attention in that part")
    return rollout[0]
