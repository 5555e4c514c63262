"""Keys of a retrieval problem in blocks, and which blocks its queries choose."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .absolute_logits import unlifted
from .inputs import AttentionInputs, masked_softmax
from .metrics import BUILT_IN
from .retrieval import CANDIDATES, PANEL, SPREADS, Retrieval, aligned, has_codes, scores_by_codes, spreads_by_codes
from .retrieval_cpp import encode_keys, order_keys
from .retrieval_order import in_order, level_of, levels_of, units_of

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


def order_of(problem: Retrieval) -> Tensor:
    """Return the order of likeness of a clustered problem's keys, at all levels (see `Retrieval`)."""
    units = units_of(problem)
    return order_of_blocks(problem, 0, units * PANEL, PANEL, levels_of(units))


@torch.no_grad()
def order_of_blocks(problem: Retrieval, start: int, stop: int, unit: int, levels: int = 1) -> Tensor:
    """Return the order of the keys of blocks start to stop, counted from the first, in segments of unit·4^l blocks."""
    size = problem.search.block_size
    key, _, keep = cut_blocks(problem, start, stop)
    if has_codes(problem.inputs):
        # Of cosine the keys' directions, in full precision as a cache has them.
        key = dot_form_of(problem.inputs, key.to(torch.promote_types(key.dtype, torch.float32)))[1]
    return order_keys(key, keep, size, unit * size, max(0, problem.search.sink_blocks - start) * size, levels)


class Layout:
    """A problem with its keys cut into blocks: key (B, H_kv, M', d), value, keep (B, M'), M' whole blocks.

    place (B or 1, H_kv or 1, M'): where each of them stands, counted from `first`. Where they are in an order of
    likeness, the blocks that are searched come behind those where keys stand, `offset` of them; else they are the same.
    numbers: of the blocks that are searched, their numbers where keys stand or, at each level, in order.
    positions (B or 1, N): where each query stands. share: consecutive query heads that choose together.
    """

    def __init__(self, problem: Retrieval, share: int):
        self.problem, self.share = problem, share
        inputs, search = problem.inputs, problem.search
        _, self.heads, num_queries, _ = inputs.query.shape
        num_keys, device = inputs.key.shape[2], inputs.key.device
        self.blocks, self.num_keys = -(-num_keys // search.block_size), num_keys
        self.key, self.value, self.keep = cut_blocks(problem, 0, self.blocks)
        self.offset, self.numbers = 0, torch.arange(self.blocks, device=device)
        self.place = torch.arange(self.key.shape[2], device=device).expand(1, 1, -1)
        if problem.order is not None:
            self._append(problem.order)
        self.first = torch.zeros(1, dtype=torch.long, device=device) if problem.first is None else problem.first
        before = num_keys - num_queries if inputs.is_causal else 0
        self.positions = before + torch.arange(num_queries, device=device) - self.first[:, None]

    def _append(self, order: Tensor) -> None:
        """Put the blocks of an order behind those where keys stand."""
        levels, places = order.shape[2:]
        self.offset, size = self.blocks, self.problem.search.block_size
        self.numbers = torch.arange(places // size, device=order.device).repeat(levels)
        # An ε of each head makes keys of each query head's own.
        order = order.flatten(2).repeat_interleave(self.key.shape[1] // order.shape[1], dim=1)
        self.key, self.value = (torch.cat([t, in_order(t, order)], dim=2) for t in (self.key, self.value))
        self.keep = torch.cat([self.keep, self.keep.gather(1, order[:, 0])], dim=1)
        self.place = torch.cat([self.place.expand(*order.shape[:2], -1), order], dim=2)
        self.blocks += len(self.numbers)

    def searched(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return key (B, H_kv, n·b, d), value and keep (B, n·b) of the blocks that are searched."""
        start = self.offset * self.problem.search.block_size
        return self.key[:, :, start:], self.value[:, :, start:], self.keep[:, start:]

    def window(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first block of the window of queries at these positions and the one after its last, (B or 1, n).

        Without a window it is empty, at the start. Before a row's first key it ends before it begins. In an order of
        likeness it goes back to the start of its unit.
        """
        search = self.problem.search
        if not search.window_size:
            nowhere = torch.zeros_like(positions)
            return nowhere, nowhere
        own = positions.div(search.block_size, rounding_mode="floor")
        ahead = 0 if self.problem.inputs.is_causal else search.reach
        start = (own - search.reach).clamp_min(0)
        if self.problem.order is not None:
            start = start // PANEL * PANEL
        return start, (own + ahead + 1).clamp(max=self.offset or self.blocks)

    def fixed(self) -> tuple[Tensor, Tensor]:
        """Return the numbers of the blocks of sinks and window, (B or 1, N, f), and which of them each query sees."""
        search, device = self.problem.search, self.key.device
        start, stop = self.window(self.positions)
        sinks = torch.arange(min(search.sink_blocks, self.offset or self.blocks), device=device)
        causal = self.problem.inputs.is_causal
        width = (search.reach + 1 if causal else 2 * search.reach + 1) if search.window_size else 0
        if self.problem.order is not None:
            width += PANEL - 1
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
        count, choosers = min(search.most_blocks, len(self.numbers)), heads // self.share
        if not count:
            empty = torch.zeros(batch, choosers, num_queries, 0, dtype=torch.long, device=inputs.key.device)
            return empty, empty.bool()
        score = self._scores_by_codes() if has_codes(self.problem.inputs) else self._scores_by_keys
        budget = search.budget(choosers, inputs.key.device)
        results = []
        for part in self.parts(2 * batch * heads * len(self.numbers) * search.block_size):
            # Of equal ones, which keys of the same token have, the first: by topk it would be any.
            best = score(part).sort(dim=-1, descending=True, stable=True)
            within = torch.arange(count, device=best.values.device) < budget[:, None, None]
            value = best.values[..., :count]
            least = self.problem.min_weight
            large = value >= least if least else value > float("-inf")
            results.append((self.offset + best.indices[..., :count], large & within))
        return tuple(torch.cat(tensors, dim=2) for tensors in zip(*results))

    def may(self, part: slice) -> Tensor:
        """Return which of the blocks that are searched the queries of a part may choose, (B, 1, n, blocks)."""
        search, number = self.problem.search, self.numbers
        start, stop = (t[:, None, :, None] for t in self.window(self.positions[:, part]))
        may = (number >= search.sink_blocks) & (number < start)
        if (order := self.problem.order) is not None:
            levels = order.shape[2]
            level = torch.arange(levels, device=number.device).repeat_interleave(len(number) // levels)
            may = may & (level_of(number // PANEL, start // PANEL, levels) == level)
        if not self.problem.inputs.is_causal:
            may = may | ((number >= search.sink_blocks) & (number >= stop))
        if search.window_size:
            # A query of padding before the first key sees nothing.
            may = may & (self.positions[:, part] >= 0)[:, None, :, None]
        return may & self.searched()[2].unflatten(1, (-1, search.block_size)).any(-1)[:, None, None]

    def _scores_by_codes(self) -> Callable[[slice], Tensor]:
        key, _, keep = self.searched()
        query, key = dot_form_of(self.problem.inputs, key)
        codes = self.problem.codes or encode_keys(key, keep, self.problem.search.block_size)

        def score(part: slice) -> Tensor:
            own, may = query[:, :, part], self.may(part)
            scores = scores_by_codes(own, codes)[..., : len(self.numbers)]
            if self.problem.order is None:
                return self._shared(scores, may, part)
            # By means and what lies about them, and the best ones of these by their codes.
            mean = codes.mean.mT.flatten(2, 3).repeat_interleave(self.heads // key.shape[1], dim=1)
            means = (own @ mean.mT)[..., : len(self.numbers)]
            hope = means + SPREADS * spreads_by_codes(own, codes)[..., : len(self.numbers)]
            hope = self._best_shares(hope, means, may, part)
            rank = hope.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
            count = self.problem.search.budget(rank.shape[1], rank.device).clamp_min(CANDIDATES)
            looked = rank < count[:, None, None]
            closer = looked.repeat_interleave(self.share, dim=1) if self.share > 1 else looked
            return self._shared(torch.where(closer, scores, means), may, part).masked_fill(~looked, float("-inf"))

        return score

    def _scores_by_keys(self, part: slice) -> Tensor:
        inputs, (key, _, keep) = self.problem.inputs, self.searched()
        key = key.repeat_interleave(self.heads // key.shape[1], dim=1)
        logits = -inputs.lambda_column() * inputs.scaling * inputs.distances(inputs.query[:, :, part], key)
        logits = logits.masked_fill(~keep[:, None, None], float("-inf"))
        scores = logits.unflatten(-1, (len(self.numbers), -1)).amax(-1)
        return self._shared(scores, self.may(part), part)

    def _shared(self, scores: Tensor, may: Tensor, part: slice) -> Tensor:
        """Return the scores by which heads choose together, -inf where `may` forbids; shares where min_weight asks."""
        needs_shares = self.problem.min_weight > 0
        if self.share > 1 or needs_shares:
            shares = masked_softmax(scores, may.expand_as(scores), self._near(part) if needs_shares else None)
            scores = shares.unflatten(1, (-1, self.share)).amax(2)
        return scores.masked_fill(~may, float("-inf"))

    def _best_shares(self, hope: Tensor, means: Tensor, may: Tensor, part: slice) -> Tensor:
        """Return the logarithm of the largest share that blocks of these logits may have in the heads that choose
        together, beside blocks of the logits `means`; the logits where there is one head, and shares do not matter.
        """
        if self.share > 1 or self.problem.min_weight > 0:
            whole = means.masked_fill(~may, float("-inf"))
            if self.problem.min_weight > 0:
                whole = torch.cat([whole, self._near(part)], dim=-1)
            hope = (hope - whole.logsumexp(-1, keepdim=True)).unflatten(1, (-1, self.share)).amax(2)
        return hope.masked_fill(~may, float("-inf"))

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
