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
    rollout: list[Tensor] = []

    def add(call, keys):
        mean = torch.cat([rows.weights.mean(1) for rows in call.blocks()], dim=1)
        rollout[:] = [_step(mean, keys, rollout[0] if rollout else None, residual)]

    _run(model, batch, residual, part, add)
    return rollout[0]


@torch.no_grad()
def rollout_without_heads(model, batch: dict, *, residual: float = 0.5, part: str | None = None) -> dict[str, Tensor]:
    """Return {module: (H,)}: Σ_ij |R_ij - R_ij without the head| / 2N of `attention_rollout`, summed over the texts.

    All maps are in memory at once.
    """
    layers: list[tuple[str, Tensor, Tensor]] = []
    _run(model, batch, residual, part, lambda call, keys: layers.append((call.name, call.full(), keys)))

    def rolled(left_out: tuple[int, int] | None = None) -> Tensor:
        rollout = None
        for number, (_, maps, keys) in enumerate(layers):
            heads = [head for head in range(maps.shape[1]) if (number, head) != left_out]
            # Without any head the sum is zero, and a row keeps what came to it.
            rollout = _step(maps[:, heads].sum(1) / max(1, len(heads)), keys, rollout, residual)
        return rollout

    whole, moved = rolled(), {}
    for number, (name, maps, _) in enumerate(layers):
        changes = [(rolled((number, head)) - whole).abs().sum().double().cpu() for head in range(maps.shape[1])]
        moved[name] = torch.stack(changes) / (2 * whole.shape[-1])
    return moved


def _run(model, batch: dict, residual: float, part: str | None, add) -> None:
    """Call `add(call, keys without padding (B, N))` for each layer of the part."""
    if not 0 <= residual < 1:
        raise ValueError(f"residual must be in [0, 1), got {residual!r}")
    has_parts = model.config.is_encoder_decoder
    if part not in (None, "encoder", "decoder") or (part is not None and not has_parts):
        raise ValueError(f"part must be None{', encoder or decoder' if has_parts else ''} for this model, got {part!r}")
    names = []

    def look(call):
        if call.kind == "self" and not (has_parts and ("decoder" in call.name) != (part == "decoder")):
            names.append(call.name)
            add(call, padding_of(model, call, batch)[1])

    run_watched(model, batch, look)
    if not names:
        raise no_weights(model, "has no self-attention in that part")


def _step(mean: Tensor, keys: Tensor, previous: Tensor | None, residual: float) -> Tensor:
    """Return the rollout after one more layer, of mean weights (B, N, N)."""
    # Renormalise rows after removing weight on padding and rounding errors.
    mean = mean * keys[:, None, :]
    total = mean.sum(-1, keepdim=True)
    eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    mean = torch.where(total > 0, mean / torch.where(total > 0, total, 1.0), eye)
    previous = eye.expand_as(mean) if previous is None else previous
    return (1 - residual) * (mean @ previous) + residual * previous
