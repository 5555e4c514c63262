"""Classify what a head attends to as one of six named patterns, each with a strength from 0 to 1.

For "previous token", "first token", "diagonal", "block" and "separator" the strength is (s - c) / (1 - c), at least 0:
s is the mean weight that queries give to the keys of the pattern, c that of a uniform head. No key belongs to two
patterns. "uniform" is the mean of exp(entropy) / n, the share of the n keys in use. Patterns weaker than
`NAMED_FROM` give no name; a head without one is "mixed". After the kinds of heads of Clark et al., What does BERT look
at? (2019), and Kovaleva et al., Revealing the dark secrets of BERT (2019).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PATTERNS = ("previous token", "first token", "diagonal", "block", "separator", "uniform")
MIXED = "mixed"
# Least strength that names a head. Half-used rows are common, so "uniform" needs more.
NAMED_FROM = {**dict.fromkeys(PATTERNS, 0.3), "uniform": 0.5}
# The previous token of rows this near the first token is the first one.
_FIRST_ROWS = 2


@dataclass(frozen=True)
class Places:
    """Positions of the keys of each pattern: first (B,), separators (B, M) bool or None, segments (B, M)."""

    first: Tensor
    separators: Tensor | None
    segments: Tensor | None

    @classmethod
    def of(cls, key_keep: Tensor, separators: Tensor | None) -> "Places":
        """Find the places from masks (B, M) of keys without padding and of separators; a separator ends its segment."""
        first = key_keep.int().argmax(-1)
        if separators is None:
            return cls(first, None, None)
        separators = separators & key_keep
        return cls(first, separators, separators.cumsum(-1) - separators.long())


def pattern_masses(
    weights: Tensor, keep: Tensor, start: int, places: Places, is_self: bool
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Return ({pattern: (weight on its keys (B, H, n), its share of the keys)}, which rows count (B, 1, n)).

    weights (B, H, n, M) of queries start, start + 1, ...; keep broadcastable. Cross-attention has no diagonal, no
    previous token and no shared segments. Rows count from two tokens after the first on.
    """
    batch, heads, num_queries, num_keys = weights.shape
    device = weights.device
    query = start + torch.arange(num_queries, device=device)
    keys = torch.arange(num_keys, device=device)
    first = places.first[:, None, None]
    masks = {"first token": keys == first}
    if is_self:
        diagonal, previous = keys == query[:, None], keys == query[:, None] - 1
        masks |= {"previous token": previous[None], "diagonal": diagonal[None]}
        counted = query >= first + _FIRST_ROWS
    else:
        counted = torch.ones(batch, 1, num_queries, dtype=torch.bool, device=device)
    if places.separators is not None:
        unclaimed = ~torch.stack([m.expand(batch, num_queries, num_keys) for m in masks.values()]).any(0)
        separators = places.separators[:, None, :]
        masks["separator"] = separators & unclaimed
        if is_self:
            same_segment = places.segments[:, start : start + num_queries, None] == places.segments[:, None, :]
            masks["block"] = same_segment & unclaimed & ~separators
    total = keep.sum(-1).clamp_min(1)
    masses = {}
    for name, mask in masks.items():
        mask = mask[:, None]
        share = (mask & keep).sum(-1) / total
        masses[name] = ((weights * mask).sum(-1), share.expand(batch, heads, num_queries))
    return masses, counted


def pattern_strength(mass: float, chance: float) -> float:
    """Return (s - c) / (1 - c), at least 0; 0 where every key belongs to the pattern."""
    return max(0.0, (mass - chance) / (1 - chance)) if chance < 1 - 1e-9 else 0.0


def dominant_pattern(strengths: dict[str, float]) -> tuple[str, float]:
    """Return (name, strength) of the strongest pattern that reaches `NAMED_FROM`; if none, "mixed" and the largest."""
    named = {name: value for name, value in strengths.items() if value >= NAMED_FROM[name]}
    if not named:
        return MIXED, max(strengths.values(), default=0.0)
    name = max(named, key=named.get)
    return name, named[name]
