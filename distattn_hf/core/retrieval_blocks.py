"""Keys of a retrieval problem in blocks, and which blocks its queries choose."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .absolute_logits import unlifted
from .inputs import AttentionInputs, masked_softmax
from .metrics import BUILT_IN
from .retrieval import Retrieval, aligned, has_codes, scores_by_codes
from .retrieval_cpp import encode_keys

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

    def fixed(self) -> tuple[Tensor, Tensor]:
        """Return the numbers of the blocks of sinks and window, (B or 1, N, f), and which of them each query sees."""
        search, device = self.problem.search, self.key.device
        start, stop = self.window(self.positions)
        sinks = torch.arange(min(search.sink_blocks, self.blocks), device=device)
        causal = self.problem.inputs.is_causal
        width = (search.reach + 1 if causal else 2 * search.reach + 1) if search.window_size else 0
        near = start[..., None] + torch.arange(width, device=device)
        # A sink within the window is the window's; one behind a causal query does not exist yet.
        sees_sink = sinks < start[..., None]
        if not causal:
            sees_sink = sees_sink | (sinks >= stop[..., None])
        number = torch.cat([sinks.expand(*start.shape, -1), near], dim=-1)
        exists = torch.cat([sees_sink, near < stop[..., None]], dim=-1) & (self.positions >= 0)[..., None]
        return torch.where(exists, number, 0), exists

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
            best = self._shared(score(part), self.may(part), part).sort(dim=-1, descending=True, stable=True)
            within = torch.arange(count, device=best.values.device) < budget[:, None, None]
            value = best.values[..., :count]
            least = self.problem.min_weight
            large = value >= least if least else value > float("-inf")
            results.append((best.indices[..., :count], large & within))
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
        codes = self.problem.codes or encode_keys(key, self.keep, self.problem.search.block_size)
        return lambda part: scores_by_codes(query[:, :, part], codes)[..., : self.blocks]

    def _scores_by_keys(self, part: slice) -> Tensor:
        inputs = self.problem.inputs
        key = self.key.repeat_interleave(self.heads // self.key.shape[1], dim=1)
        logits = -inputs.lambda_column() * inputs.scaling * inputs.distances(inputs.query[:, :, part], key)
        logits = logits.masked_fill(~self.keep[:, None, None], float("-inf"))
        return logits.unflatten(-1, (self.blocks, -1)).amax(-1)

    def _shared(self, scores: Tensor, may: Tensor, part: slice) -> Tensor:
        """Return the scores by which heads choose together, -inf where `may` forbids; shares where min_weight asks."""
        needs_shares = self.problem.min_weight > 0
        if self.share > 1 or needs_shares:
            shares = masked_softmax(scores, may.expand_as(scores), self._near(part) if needs_shares else None)
            scores = shares.unflatten(1, (-1, self.share)).amax(2)
        return scores.masked_fill(~may, float("-inf"))

    def _near(self, part: slice) -> Tensor:
        """Return the log-sum of the exponentials of the logits of sinks and window, (B, H, n, 1)."""
        inputs, size = self.problem.inputs, self.problem.search.block_size
        query, key = inputs.query, self.key
        if has_codes(inputs):
            query, key = dot_form_of(inputs, key)
        query, (blocks, exists) = query[:, :, part], (t[:, part] for t in self.fixed())
        place = (blocks[..., None] * size + torch.arange(size, device=key.device)).flatten(2)
        place = place.expand(len(key), -1, -1)
        seen = exists.repeat_interleave(size, dim=-1) & self.keep[:, None].expand(-1, place.shape[1], -1).gather(
            2, place
        )
        if inputs.is_causal:
            seen = seen & (place <= self.positions[:, part, None])
        rows = place.flatten(1)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[-1])
        key = key.gather(2, rows).unflatten(2, place.shape[1:])
        query = query.unflatten(1, (key.shape[1], -1)).transpose(2, 3)
        if has_codes(inputs):
            logits = query @ key.mT
        else:
            weight = torch.as_tensor(inputs.lam, dtype=query.dtype, device=query.device).expand(self.heads)
            weight = weight.view(key.shape[1], 1, -1, 1) * inputs.scaling
            logits = -weight * inputs.metric.checked_distance(query, key, inputs.p, epsilon=inputs.softening)
        logits = logits.masked_fill(~seen[:, None, :, None], float("-inf"))
        return logits.logsumexp(-1, keepdim=True).transpose(2, 3).flatten(1, 2)
