"""Keys of a retrieval problem in blocks, and which blocks its queries choose."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .absolute_logits import unlifted
from .inputs import AttentionInputs, masked_softmax
from .metrics import BUILT_IN
from .retrieval import Retrieval, aligned, encode, has_codes, scores_by_codes

# Entries of what is gathered (float32: 16 MB) that exist at a time.
ENTRIES = 2**22


def in_full(inputs: AttentionInputs) -> AttentionInputs:
    """Return the inputs in full precision and without a lift."""
    inputs = unlifted(inputs)
    if inputs.metric is BUILT_IN["lifted_sqeuclidean"]:
        # Its radius is that of all keys; what it stands for is not.
        inputs = replace(inputs, metric=BUILT_IN["dot"], lam=2 * inputs.lam)
    return inputs.in_full_precision()


def dotted(inputs: AttentionInputs) -> AttentionInputs:
    """Return inputs whose logits are plain dot products, for a metric whose logits are (see `has_codes`)."""
    query, key = dot_form_of(inputs, inputs.key)
    return replace(inputs, query=query, key=key, metric=BUILT_IN["dot"], lam=1.0, scaling=1.0, softening=None)


def dot_form_of(inputs: AttentionInputs, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return (query with all factors of the logits in it, key) whose dot products are the logits."""
    softened = () if inputs.softening is None else (inputs.softening_column(key.dtype),)
    query, key, _, factor = inputs.metric.dot_form(inputs.query, key, *softened)
    return query * (factor * inputs.scaling * inputs.lambda_column()), key


def cut_blocks(problem: Retrieval, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return key (B, H_kv, n·b, d), value and keep (B, n·b) of blocks start to stop; what is no key is 0."""
    inputs, block = problem.inputs, problem.search.block_size
    key, value, num_keys = inputs.key, inputs.value, inputs.key.shape[2]
    keep = torch.ones(len(key), num_keys, dtype=torch.bool, device=key.device)
    if inputs.keep is not None:
        keep = keep & inputs.keep[:, 0, 0]
        # Keys and values at padding may be anything, NaN included.
        key, value = (t.masked_fill(~keep[:, None, :, None], 0.0) for t in (key, value))
    begin, moved = start * block, problem.first
    if moved is not None and begin:
        least = int(moved.min())
        begin, moved = min(begin + least, num_keys - 1), moved - least
    length = (stop - start) * block
    key, value = (aligned(t[:, :, begin:], moved, 2)[:, :, :length] for t in (key, value))
    keep = aligned(keep[:, begin:], moved, 1)[:, :length]
    fill = length - keep.shape[1]
    return *(F.pad(t, (0, 0, 0, fill)) for t in (key, value)), F.pad(keep, (0, fill), value=False)


class Layout:
    """A problem with its keys cut into blocks: key (B, H_kv, M', d), value, keep (B, M'), M' whole blocks.

    positions (B or 1, N): where each query stands among them. share: consecutive query heads that choose together.
    """

    def __init__(self, problem: Retrieval, share: int):
        self.problem, self.share = problem, share
        inputs, search = problem.inputs, problem.search
        _, self.heads, num_queries, _ = inputs.query.shape
        num_keys, device = inputs.key.shape[2], inputs.key.device
        self.blocks, self.num_keys = -(-num_keys // search.block_size), num_keys
        self.key, self.value, self.keep = cut_blocks(problem, 0, self.blocks)
        self.first = torch.zeros(1, dtype=torch.long, device=device) if problem.first is None else problem.first
        before = num_keys - num_queries if inputs.is_causal else 0
        self.positions = before + torch.arange(num_queries, device=device) - self.first[:, None]

    def window(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first block of the window of queries at these positions and the one after its last, (B or 1, n).

        Without a window it is empty, at the start. Before a row's first key it ends before it begins.
        """
        search = self.problem.search
        if not search.window_size:
            nowhere = torch.zeros_like(positions)
            return nowhere, nowhere
        own = positions.div(search.block_size, rounding_mode="floor")
        ahead = 0 if self.problem.inputs.is_causal else search.reach
        return (own - search.reach).clamp_min(0), (own + ahead + 1).clamp(max=self.blocks)

    def parts(self, entries: int) -> list[slice]:
        """Split the queries into slices for `entries` numbers a query to stay within what may exist at a time."""
        rows = max(1, ENTRIES // max(1, entries))
        return [slice(start, start + rows) for start in range(0, self.problem.inputs.query.shape[2], rows)]

    def choose(self) -> tuple[Tensor, Tensor]:
        """Return (numbers of the chosen blocks (B, H / share, N, k), which of them exist)."""
        search, inputs = self.problem.search, self.problem.inputs
        batch, heads, num_queries, _ = inputs.query.shape
        count, choosers = min(search.most_blocks, self.blocks), heads // self.share
        if not count:
            empty = torch.zeros(batch, choosers, num_queries, 0, dtype=torch.long, device=inputs.key.device)
            return empty, empty.bool()
        score = self._scores_by_codes() if has_codes(self.problem.inputs) else self._scores_by_keys
        budget = search.budget(choosers, inputs.key.device)
        results = []
        for part in self.parts(2 * batch * heads * self.blocks * search.block_size):
            # Of equal ones, which keys of the same token have, the first: by topk it would be any.
            best = self._shared(score(part), self.may(part)).sort(dim=-1, descending=True, stable=True)
            within = torch.arange(count, device=best.values.device) < budget[:, None, None]
            results.append((best.indices[..., :count], (best.values[..., :count] > float("-inf")) & within))
        return tuple(torch.cat(tensors, dim=2) for tensors in zip(*results))

    def may(self, part: slice) -> Tensor:
        """Return which blocks the queries of a part may choose, (B, 1, n, blocks)."""
        search = self.problem.search
        start, stop = (t[:, None, :, None] for t in self.window(self.positions[:, part]))
        number = torch.arange(self.blocks, device=self.key.device)
        may = (number >= search.sink_blocks) & (number < start)
        if not self.problem.inputs.is_causal:
            may = may | ((number >= search.sink_blocks) & (number >= stop))
        if search.window_size:
            # A query of padding before the first key sees nothing.
            may = may & (self.positions[:, part] >= 0)[:, None, :, None]
        return may & self.keep.unflatten(1, (-1, search.block_size)).any(-1)[:, None, None]

    def _scores_by_codes(self) -> Callable[[slice], Tensor]:
        query, key = dot_form_of(self.problem.inputs, self.key)
        codes = self.problem.codes or encode(key, self.keep, self.problem.search.block_size)
        return lambda part: scores_by_codes(query[:, :, part], codes)[..., : self.blocks]

    def _scores_by_keys(self, part: slice) -> Tensor:
        inputs = self.problem.inputs
        key = self.key.repeat_interleave(self.heads // self.key.shape[1], dim=1)
        logits = -inputs.lambda_column() * inputs.scaling * inputs.distances(inputs.query[:, :, part], key)
        logits = logits.masked_fill(~self.keep[:, None, None], float("-inf"))
        return logits.unflatten(-1, (self.blocks, -1)).amax(-1)

    def _shared(self, scores: Tensor, may: Tensor) -> Tensor:
        """Return the scores by which heads choose together, -inf where `may` forbids."""
        if self.share > 1:
            scores = scores.unflatten(1, (-1, self.share))
            scores = masked_softmax(scores, may[:, :, None].expand_as(scores)).amax(2)
        return scores.masked_fill(~may, float("-inf"))
