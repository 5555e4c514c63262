"""The far field of retrieval attention: every block that a query does not read stands there as one key.

What a query q gives a block of keys is Σ_j exp(logit(q, k_j))·v_j. About a query c in place of q, with the shares
p_j = softmax_j(logit(c, k_j)) that the keys have of it, it is to first order in q - c

    exp(logit(q, k̄) + bias)·v̄,   k̄ = Σ_j p_j·k_j,   v̄ = Σ_j p_j·v_j,   bias = log Σ_j exp(logit(c, k_j)) - logit(c, k̄)

so a block that is not read takes part as a key k̄ with the value v̄, and all weights of a query still sum to 1. For a
distance in place of a dot product k̄ is the same mean, and at q = c it is exact, too.

c is the mean of a head's first BEGINNING queries, of those up to the block's own end: it depends on nothing that comes
after the block, and a cache need only keep the first queries. In both directions it is the mean of all queries. Plain
means (c = 0) do harm, and so does what a block really weighs with the plain mean of its values: in most heads a few
tokens, whatever is asked, take the weight of their block.

In blocks of alike keys they do as well (nothing is unlike its block there), and c = 0: k̄ and v̄ are the means that all
query heads of a key head share, the bias is the logarithm of the number of keys.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .inputs import AttentionInputs, masked_softmax
from .metrics import BUILT_IN
from .retrieval import PANEL, Retrieval, aligned, has_codes
from .retrieval_blocks import Layout, cut_blocks, dot_form_of, dotted, in_full
from .retrieval_cpp import summarise_keys
from .retrieval_order import in_order, units_of

# Queries whose mean blocks are expanded about.
BEGINNING = 64


@dataclass(frozen=True)
class Summaries:
    """One key for each block, PANEL blocks side by side, of each query head, or where c = 0 of each key head.

    key (B, H, g, d, 16); bias (B, H, g, 16), -inf for blocks without keys; value (B, H, g, 16, d_v).
    """

    key: Tensor
    bias: Tensor
    value: Tensor

    def lines(self, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return key (B, H, blocks, d), bias (B, H, blocks), value (B, H, blocks, d_v); zeros past the last panel."""
        lines = [t.flatten(2, 3)[:, :, :blocks] for t in (self.key.mT, self.bias[..., None], self.value)]
        key, bias, value = (F.pad(line, (0, 0, 0, blocks - line.shape[2])) for line in lines)
        return key, bias[..., 0], value


def in_panels(key: Tensor, bias: Tensor, value: Tensor) -> Summaries:
    """Return the `Summaries` of key (B, H, n, d), bias (B, H, n), value (B, H, n, d_v)."""
    fill = -key.shape[2] % PANEL
    key, value = (F.pad(t, (0, 0, 0, fill)).unflatten(2, (-1, PANEL)) for t in (key, value))
    return Summaries(
        key.mT.contiguous(), F.pad(bias, (0, fill), value=float("-inf")).unflatten(2, (-1, PANEL)), value.contiguous()
    )


def has_far_field(problem: Retrieval) -> bool:
    """Return whether blocks that a query does not read take part, and there may be any."""
    inputs, search = problem.inputs, problem.search
    if not search.far_field or not problem.is_of_metric_alone:
        return False
    least = search.num_blocks if isinstance(search.num_blocks, int) else min(search.num_blocks)
    least = 0 if problem.min_weight else least
    if problem.is_clustered:
        return units_of(problem) > 0
    blocks = -(-inputs.key.shape[2] // search.block_size)
    return blocks > least + search.reach + 1


def centers(problem: Retrieval, blocks: int) -> Tensor:
    """Return the queries that blocks are expanded about, (B, H, blocks or 1, d), in the form of the problem's own.

    Where the problem's queries are later ones and its beginning is not known, the first of them takes its place: none
    that comes after may change what one gets.
    """
    inputs = problem.inputs
    query = inputs.query.to(torch.promote_types(inputs.query.dtype, torch.float32))
    count, num_keys = query.shape[2], inputs.key.shape[2]
    keep = torch.ones(1, num_keys, dtype=torch.bool, device=query.device)
    if inputs.keep is not None:
        keep = inputs.keep[:, 0, 0]
    own, beginning = keep[:, None, num_keys - count :, None], problem.beginning
    if not inputs.is_causal:
        return torch.where(own, query, 0.0).sum(2, keepdim=True) / own.sum(2, keepdim=True).clamp_min(1)
    if beginning is None and count < num_keys:
        first = own.int().argmax(2, keepdim=True).expand(len(query), query.shape[1], 1, query.shape[3])
        return torch.where(own.any(2, keepdim=True), query.gather(2, first), 0.0)
    if beginning is None:
        beginning = aligned(query, problem.first, 2)[:, :, :BEGINNING]
    keep = aligned(keep.expand(len(query), -1), problem.first, 1)[:, None, : beginning.shape[2], None]
    sums, counts = torch.where(keep, beginning.to(query.dtype), 0.0).cumsum(2), keep.cumsum(2)
    ends = (torch.arange(1, blocks + 1, device=query.device) * problem.search.block_size).clamp(max=keep.shape[2]) - 1
    return sums[:, :, ends] / counts[:, :, ends].clamp_min(1)


def summarise(
    inputs: AttentionInputs, key: Tensor, value: Tensor, keep: Tensor, center: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (k̄ (B, H, n, d), bias (B, H, n), v̄ (B, H, n, d_v), shares p (B, H, n·b)) of n blocks.

    key (B, H_kv, n·b, d) and value, of which keep (B, n·b) are real; center (B, H, n or 1, d); inputs: metric, λ, ε.
    """
    groups = center.shape[1] // key.shape[1]
    key, value = (t.unflatten(2, (-1, block_size)).repeat_interleave(groups, dim=1) for t in (key, value))
    keep = keep.unflatten(1, (-1, block_size))[:, None, :, None]
    epsilon, weight = inputs.softening_column(key.dtype), inputs.lambda_column() * inputs.scaling
    epsilon, weight = (t[..., None] if isinstance(t, Tensor) else t for t in (epsilon, weight))
    center = center[:, :, :, None]

    def logits(keys: Tensor) -> Tensor:
        return -weight * inputs.metric.checked_distance(center, keys, inputs.p, epsilon=epsilon)

    own, is_real = logits(key), keep.any(-1, keepdim=True)
    shares = masked_softmax(own, keep.expand_as(own))
    mean, middle = shares @ key, shares @ value
    mass = torch.where(is_real, own.masked_fill(~keep, float("-inf")), 0.0).logsumexp(-1, keepdim=True)
    bias = (mass - logits(mean)).masked_fill(~is_real, float("-inf"))
    return mean[..., 0, :], bias[..., 0, 0], middle[..., 0, :], shares[..., 0, :].flatten(2)


class FarField(NamedTuple):
    """The far field of a problem: query (B, H, N, d) and key (B, H, blocks, d), dot products where logits are.

    bias (B, H, blocks) and value (B, H, blocks, d_v) of its blocks; shares (B, H, M') of the keys in their blocks.
    """

    query: Tensor
    key: Tensor
    bias: Tensor
    value: Tensor
    shares: Tensor | None


def far_field(problem: Retrieval, key: Tensor, value: Tensor, keep: Tensor, numbers: Tensor) -> FarField:
    """Return the far field of blocks of keys of these numbers."""
    inputs, query = problem.inputs, problem.inputs.query
    about, own = _about(problem, key, numbers)
    if has_codes(inputs):
        query = dot_form_of(inputs, key)[0]
    made = summarise(about, own, value, keep, about.query, problem.search.block_size)
    return FarField(query, *(t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in made))


def _about(problem: Retrieval, key: Tensor, numbers: Tensor) -> tuple[AttentionInputs, Tensor]:
    """Return inputs whose queries are those that blocks of these numbers are expanded about, and their keys.

    Both are of dot products where logits are.
    """
    if problem.is_clustered and has_codes(problem.inputs):
        own = dot_form_of(problem.inputs, key)[1]
        nothing = own.new_zeros(1, own.shape[1], 1, own.shape[-1])
        return replace(problem.inputs, query=nothing, metric=BUILT_IN["dot"], lam=1.0, scaling=1.0, softening=None), own
    center = centers(problem, int(numbers.max()) + 1)
    about = replace(problem.inputs, query=center[:, :, numbers] if center.shape[2] > 1 else center)
    if has_codes(problem.inputs):
        about = dotted(replace(about, key=key))
        return about, about.key
    return about, key


def far_field_of(layout: Layout, needs_shares: bool) -> FarField:
    """Return the far field of a layout, by the summaries that are known if they will do."""
    inputs, known = layout.problem.inputs, layout.problem.summaries
    if known is None or needs_shares:
        return far_field(layout.problem, *layout.searched(), layout.numbers)
    query = dot_form_of(inputs, layout.key[:, :, :0])[0] if has_codes(inputs) else inputs.query
    lines = known.lines(len(layout.numbers))
    return FarField(query, *(t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in lines), None)


def summaries_of(problem: Retrieval, start: int = 0, stop: int | None = None, order: Tensor | None = None) -> Summaries:
    """Return the summaries of blocks start to stop (None: all) of a problem, in at least float32.

    order (B, H_kv, levels, n·b): which of those keys stands at each place of as many blocks at each level.
    """
    inputs, search = in_full(problem.inputs), problem.search
    problem = replace(problem, inputs=inputs)
    if stop is None:
        stop = -(-inputs.key.shape[2] // search.block_size)
    key, value, keep = cut_blocks(problem, start, stop)
    numbers = torch.arange(start, stop, device=key.device)
    if order is not None:
        numbers, order = numbers[: order.shape[3] // search.block_size].repeat(order.shape[2]), order.flatten(2)
    if has_codes(inputs):
        about, own = _about(problem, key, numbers)
        if (made := summarise_keys(about.query, own, value, keep, search.block_size, order)) is not None:
            return Summaries(*made)
    if order is not None:
        key, value, keep = in_order(key, order), in_order(value, order), keep.gather(1, order[:, 0])
    about, own = _about(problem, key, numbers)
    return in_panels(*summarise(about, own, value, keep, about.query, search.block_size)[:3])
