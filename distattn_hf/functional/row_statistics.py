"""Statistics of each row of attention weights: how wide, how sparse, how large, how far."""

from dataclasses import dataclass

import torch
from torch import Tensor

# A row has collapsed when its entropy is below this, or a single weight of it above that.
COLLAPSED_ENTROPY = 0.1
COLLAPSED_WEIGHT = 0.95
ROW_NUMBERS = ("entropy", "sparsity", "maximum", "distance")


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of each row of weights, each (..., N), at least float32; zeros for a row in which nothing is kept.

    entropy: -Σ_j w_j·ln w_j, in nats, from 0 (one key) to ln n (uniform over n keys).
    sparsity: (√n - ‖w‖₁/‖w‖₂) / (√n - 1) over the n kept keys (Hoyer, 2004): 0 uniform, 1 a single key; 0 for n = 1.
    maximum: max_j w_j.
    distance: Σ_j w_j·|position_i - position_j|, in tokens.
    num_keys: n, how many keys are kept.
    """

    entropy: Tensor
    sparsity: Tensor
    maximum: Tensor
    distance: Tensor
    num_keys: Tensor

    @property
    def collapsed(self) -> Tensor:
        """Which rows have collapsed (..., N): entropy < 0.1 or a weight > 0.95, where there is more than one key."""
        narrow = (self.entropy < COLLAPSED_ENTROPY) | (self.maximum > COLLAPSED_WEIGHT)
        return narrow & (self.num_keys > 1)

    def counted(self, query_keep: Tensor | None = None) -> Tensor:
        """Return which rows a mean is taken over (..., N): those with several keys, and in `query_keep` (..., N)."""
        counted = self.num_keys > 1
        return counted if query_keep is None else counted & query_keep

    def means(self, query_keep: Tensor | None = None) -> dict[str, Tensor]:
        """Return the mean of each statistic over the counted rows: each (...), NaN where there is none.

        query_keep: bool, broadcastable to (..., N): the queries that are no padding. None: all.
        """
        counted = self.counted(query_keep)
        num_rows = counted.sum(-1)
        return {name: torch.where(counted, getattr(self, name), 0.0).sum(-1) / num_rows for name in ROW_NUMBERS}


def row_statistics(
    weights: Tensor,
    keep: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> RowStatistics:
    """Compute entropy, sparsity, maximum and mean attended distance of rows of attention weights.

    Rows may be some of a map's: then query_positions says where they stand. Gradients are finite, also at weights of 0.

    Args:
        weights: (..., N, M), non-negative, rows of sum 1, or of sum 0 where nothing is kept.
        keep: bool, broadcastable to weights: the keys that a query may see; (B, 1, 1, M) for padding. Others count for
            nothing. None: all.
        query_positions: (..., N). None: 0, 1, ...
        key_positions: (..., M). None: 0, 1, ...

    Raises:
        ValueError: for a keep or positions that do not fit the weights.
    """
    if weights.dim() < 2 or not weights.is_floating_point():
        raise ValueError(f"weights must be float (..., N, M), got {weights.dtype} of shape {tuple(weights.shape)}")
    num_queries, num_keys = weights.shape[-2:]
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    if keep is None:
        counts = weights.new_full(weights.shape[:-1], num_keys)
    else:
        _check_keep(keep, weights)
        counts = keep.sum(-1).to(weights.dtype).expand(weights.shape[:-1])
        weights = weights.masked_fill(~keep, 0.0)
    query_positions = _positions("query_positions", query_positions, num_queries, weights)
    key_positions = _positions("key_positions", key_positions, num_keys, weights)
    separation = (query_positions[..., :, None] - key_positions[..., None, :]).abs()
    smallest = torch.finfo(weights.dtype).tiny
    length = torch.linalg.vector_norm(weights, dim=-1).clamp_min(smallest)
    root = counts.sqrt()
    sparsity = (root - weights.sum(-1) / length) / (root - 1).clamp_min(torch.finfo(weights.dtype).eps)
    alive = weights.detach().sum(-1) > 0
    return RowStatistics(
        entropy=-(weights * weights.clamp_min(smallest).log()).sum(-1),
        sparsity=torch.where(alive & (counts > 1), sparsity, 0.0),
        maximum=weights.amax(-1) if num_keys else weights.sum(-1),
        distance=(weights * separation).sum(-1),
        num_keys=torch.where(alive, counts, 0).long(),
    )


def _check_keep(keep: Tensor, weights: Tensor) -> None:
    """Raise `ValueError` unless keep is bool and broadcasts to the weights without making them larger."""
    fits = keep.dim() <= weights.dim() and all(
        keep_size in (1, weight_size) for keep_size, weight_size in zip(reversed(keep.shape), reversed(weights.shape))
    )
    if keep.dtype != torch.bool or not fits or keep.dim() == 0 or keep.shape[-1] != weights.shape[-1]:
        raise ValueError(
            f"keep must be bool and broadcast to the weights' shape {tuple(weights.shape)}, got {keep.dtype} of shape "
            f"{tuple(keep.shape)}"
        )


def _positions(name: str, positions: Tensor | None, length: int, weights: Tensor) -> Tensor:
    """Return positions in the weights' dtype; raises `ValueError` where they do not fit."""
    if positions is None:
        return torch.arange(length, dtype=weights.dtype, device=weights.device)
    if positions.dim() == 0 or positions.shape[-1] != length:
        raise ValueError(f"{name} must have {length} entries, got shape {tuple(positions.shape)}")
    return positions.to(weights.device, weights.dtype)
