"""What callers and transformers hand over as a mask -> one meaning: True = keep, plus an additive bias."""

import torch
from torch import Tensor


def split_mask(mask: Tensor | None, shape: tuple[int, int, int, int]) -> tuple[Tensor | None, Tensor | None]:
    """Split a mask into (keep, bias), both broadcastable to (B, H, N, M), or None where there is nothing to say.

    Accepted: bool (True = keep); integer 0/1; float (added to the logits; values at or below half the dtype's minimum,
    -inf included, mean "masked"). Rank 2 is a padding mask (B, M), rank 3 is (B, N, M), rank 4 is (B, H, N, M).
    A last axis longer than M is cut to its first M columns, as transformers' own attention functions do.

    Raises `ValueError` when the shape cannot be broadcast.
    """
    if mask is None:
        return None, None
    if mask.dim() == 2:
        mask = mask[:, None, None, :]
    elif mask.dim() == 3:
        mask = mask[:, None, :, :]
    elif mask.dim() != 4:
        raise ValueError(f"mask must have rank 2 (B, M), 3 (B, N, M) or 4 (B, H, N, M), got shape {tuple(mask.shape)}")
    if mask.shape[-1] > shape[-1]:
        mask = mask[..., : shape[-1]]
    for axis, name in enumerate("BHNM"):
        if mask.shape[axis] not in (1, shape[axis]):
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} does not broadcast to (B, H, N, M)={tuple(shape)}: axis {name}"
            )
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        return mask != 0, None
    keep = mask > torch.finfo(mask.dtype).min / 2
    return keep, torch.where(keep, mask, torch.zeros_like(mask))


def surely(condition: Tensor) -> bool:
    """Whether a bool tensor of one entry is True; False under torch.compile, whose graph the question would cut.

    For shortcuts: what follows must be right either way.
    """
    return not torch.compiler.is_compiling() and bool(condition)


def causal_keep(num_queries: int, num_keys: int, device, offset: int = 0) -> Tensor:
    """(N, M) bool, True where key j <= query i + offset: the top-left triangle, as in PyTorch's own `is_causal`."""
    rows = torch.arange(num_queries, device=device)[:, None] + offset
    return rows >= torch.arange(num_keys, device=device)[None, :]


def add_bias(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """The sum of two optional additive biases."""
    if left is None or right is None:
        return left if right is None else right
    return left + right


def masked_softmax(logits: Tensor, keep: Tensor | None) -> Tensor:
    """Row softmax over the kept entries; a row with none of them is all zeros, with zero gradients, never NaN."""
    if keep is None:
        return logits.softmax(dim=-1)
    alive = keep.any(dim=-1, keepdim=True)
    logits = logits.masked_fill(~keep, float("-inf"))
    weights = torch.where(alive, logits, torch.zeros_like(logits)).softmax(dim=-1)
    return torch.where(keep, weights, torch.zeros_like(weights))
