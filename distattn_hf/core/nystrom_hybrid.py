"""Nyström attention: exact nearby plus a low-rank far field, with one normaliser, in linear time and memory.

weight(i, j) = exp(q_i·k_j + b_ij)                for the sinks and for the keys within the window of query i
             = Σ_a exp(far_query_ia)·far_key_ja   for every other key j that query i may see

A learned sink, a logit of each query without a key or a value, joins the normaliser as one more of the sinks, by a last
coordinate: the logit in queries, 0 in keys and 1 in that sink.

The far field needs only Σ_j far_key_j [v_j, 1]ᵀ, an (m, d_v + 1) matrix. Where attention is causal that is a running
sum, the state of a recurrent network; `FarState` carries it from one call to the next.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .inputs import say_backend, surely
from .kernel_cpp_hybrid import cpp_hybrid_attention, cpp_supports

# Queries that share one running sum: fewer sums to keep, more work within a block.
_BLOCK = 64
# Weights (float32: 2 MB) that are worked on at a time.
_PART_ENTRIES = 2**19
# Far logarithms may stand this much above a row's shift: a landmark near the query counts for little where no key is
# near it, and must not make everything else underflow in float32. exp(60) times any sum stays finite.
HEADROOM = 60.0
# The position of a sink that is not there yet: ahead of every query.
NOWHERE = 2**60


@dataclass(frozen=True)
class FarState:
    """State that earlier calls leave to a causal attention, of a size that does not depend on the length.

    total (B, H, m, d_v) and weight (B, H, m): Σ far_key_j v_jᵀ and Σ far_key_j over the keys that left the window;
    sink_key (B, H, s, d), sink_value (B, H, s, d_v), sink_position (B, s): the first s keys that are not padding;
    length: how many keys came so far, padding and sinks included.
    """

    total: Tensor
    weight: Tensor
    sink_key: Tensor
    sink_value: Tensor
    sink_position: Tensor
    length: int


@dataclass(frozen=True)
class WindowBias:
    """An additive bias that depends on key position minus query position, and is constant from window_size on.

    near (H, 2·window_size - 1): from window_size - 1 behind the query to as many ahead; behind and ahead (H,): beyond.
    """

    near: Tensor
    behind: Tensor
    ahead: Tensor

    def at(self, relative: Tensor) -> Tensor:
        """Return the bias (H, ...) at relative positions (...)."""
        table = torch.cat([self.behind[:, None], self.near, self.ahead[:, None]], dim=-1)
        reach = table.shape[-1] // 2
        return table[:, (relative + reach).clamp(0, 2 * reach)]


@dataclass(frozen=True)
class HybridInputs:
    """Inputs of one call in at least float32, with a key head for every query head.

    query (B, H, N, d) with the scaling in it; key (B, H, M, d), value (B, H, M, d_v), keep (B, M) bool;
    far_query (B, H, N, m), logarithms; far_key (B, H, M, m) >= 0. Causal: the last N of the M keys are the queries'
    own, at most window_size - 1 stand before them, and `state` holds what went before those.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    keep: Tensor
    far_query: Tensor
    far_key: Tensor
    num_sinks: int
    window_size: int
    is_causal: bool
    bias: WindowBias | None = None
    state: FarState | None = None
    dropout_p: float = 0.0
    # The last coordinate of the queries is the logit of a learned sink, which is among num_sinks.
    has_learned_sink: bool = False


def hybrid_attention(inputs: HybridInputs) -> tuple[Tensor, FarState, Tensor]:
    """Return (output (B, H, N, d_v), the state of all but the last window_size - 1 keys, keep without the sinks).

    A query that sees nothing gets zeros.
    """
    by_kernel = cpp_supports(inputs)
    say_backend("nystrom", "cpp" if by_kernel else "operators", inputs.query, inputs.key)
    if by_kernel:
        return _by_kernel(inputs)
    if inputs.is_causal and inputs.query.shape[2] > (rows := _rows_at_once(inputs)):
        return _one_after_another(inputs, rows)
    state, near_keep, far_key = _enter(inputs)
    if inputs.is_causal or inputs.window_size:
        output = _Blocks(inputs, state, near_keep, far_key).attend()
    else:
        output = _no_window(inputs, state, far_key)
    return output, _leave(inputs, state, far_key), near_keep


def _by_kernel(inputs: HybridInputs) -> tuple[Tensor, FarState, Tensor]:
    state, is_sink = take_sinks(inputs)
    near_keep = inputs.keep & ~is_sink
    left = _far_from_all_to_come(inputs)
    output, total, weight = cpp_hybrid_attention(inputs, state, near_keep, left, HEADROOM)
    return output, replace(state, total=total, weight=weight, length=state.length + left), near_keep


def advance(inputs: HybridInputs) -> tuple[FarState, Tensor]:
    """Return (state, keep without the sinks) of `hybrid_attention`, without its output."""
    state, near_keep, far_key = _enter(inputs)
    return _leave(inputs, state, far_key), near_keep


def _enter(inputs: HybridInputs) -> tuple[FarState, Tensor, Tensor]:
    """Return (state with the sinks in it, keep without the sinks, far_key of what is kept)."""
    state, is_sink = take_sinks(inputs)
    near_keep = inputs.keep & ~is_sink
    return state, near_keep, inputs.far_key * near_keep[:, None, :, None]


def _leave(inputs: HybridInputs, state: FarState, far_key: Tensor) -> FarState:
    """Return the state once all but the last window_size - 1 keys are in it."""
    left = _far_from_all_to_come(inputs) if inputs.is_causal else 0
    return _absorb(state, far_key[:, :, :left], inputs.value[:, :, :left])


def _far_from_all_to_come(inputs: HybridInputs) -> int:
    """Return how many of the keys no later query sees exactly."""
    return max(0, inputs.key.shape[2] - max(0, inputs.window_size - 1))


def _reach(inputs: HybridInputs) -> int:
    """Return how far the window reaches from a query, and no further than there are keys."""
    return min(max(0, inputs.window_size - 1), inputs.key.shape[2])


def _rows_at_once(inputs: HybridInputs) -> int:
    """Return how many queries of a causal problem to run at once so that they fit the CPU's cache, in whole blocks."""
    batch, heads = inputs.query.shape[:2]
    reach = _reach(inputs)
    blocks = _PART_ENTRIES // max(1, batch * heads * _BLOCK * (_BLOCK + reach))
    return _BLOCK * max(1, blocks, -(-reach // _BLOCK))


def _one_after_another(inputs: HybridInputs, rows: int) -> tuple[Tensor, FarState, Tensor]:
    """Run `hybrid_attention` of a causal problem `rows` queries at a time, passing the state on as between calls."""
    whole, reach = inputs, max(0, inputs.window_size - 1)
    num_past = whole.key.shape[2] - whole.query.shape[2]
    tensors = (whole.key, whole.value, whole.far_key, whole.keep[:, None, :, None])
    previous = [t[:, :, :num_past] for t in tensors]
    new = zip(*((t[:, :, num_past:] if num_past else t).split(rows, dim=2) for t in tensors))
    outputs, keeps, state = [], [], whole.state
    for query, far_query, *parts in zip(whole.query.split(rows, dim=2), whole.far_query.split(rows, dim=2), *zip(*new)):
        key, value, far_key, keep = (torch.cat(pair, dim=2) for pair in zip(previous, parts))
        chunk = replace(
            whole, query=query, key=key, value=value, keep=keep[:, 0, :, 0], far_query=far_query, far_key=far_key,
            state=state,
        )  # fmt: skip
        output, state, near_keep = hybrid_attention(chunk)
        outputs.append(output)
        keeps.append(near_keep[:, 0 if not keeps else previous[0].shape[2] :])
        keep = near_keep[:, None, :, None]
        previous = [t[:, :, max(0, t.shape[2] - reach) :] for t in (key, value, far_key, keep)]
    return torch.cat(outputs, dim=2), state, torch.cat(keeps, dim=1)


def empty_state(inputs: HybridInputs) -> FarState:
    """Return the state before the first key."""
    (batch, heads, _, size), value_size, rank = inputs.key.shape, inputs.value.shape[-1], inputs.far_key.shape[-1]
    new = inputs.key.new_zeros
    sink_key = new(batch, heads, inputs.num_sinks, size)
    sink_position = torch.full((batch, inputs.num_sinks), NOWHERE, device=inputs.key.device)
    if inputs.has_learned_sink:
        sink_key[:, :, 0, -1] = 1
        sink_position[:, 0] = -1  # behind every query
    return FarState(
        total=new(batch, heads, rank, value_size),
        weight=new(batch, heads, rank),
        sink_key=sink_key,
        sink_value=new(batch, heads, inputs.num_sinks, value_size),
        sink_position=sink_position,
        length=0,
    )


def _absorb(state: FarState, far_key: Tensor, value: Tensor) -> FarState:
    """Return the state after further keys."""
    return FarState(
        state.total + far_key.transpose(-1, -2) @ value,
        state.weight + far_key.sum(2),
        state.sink_key,
        state.sink_value,
        state.sink_position,
        state.length + far_key.shape[2],
    )


def take_sinks(inputs: HybridInputs) -> tuple[FarState, Tensor]:
    """Return (state with the sinks among the keys in it, which keys those are (B, M))."""
    state = inputs.state or empty_state(inputs)
    if not inputs.num_sinks or (inputs.state is not None and surely((state.sink_position != NOWHERE).all())):
        return state, torch.zeros_like(inputs.keep)
    num_known = (state.sink_position != NOWHERE).sum(-1, keepdim=True)
    number = inputs.keep.cumsum(-1) - 1 + num_known
    is_sink = inputs.keep & (number < inputs.num_sinks)
    # (B, s, M): key j is sink number r.
    match = is_sink[:, None] & (number[:, None] == torch.arange(inputs.num_sinks, device=number.device)[:, None])
    is_filled, key_index = match.any(-1), match.int().argmax(-1)
    chosen = key_index[:, None, :, None]

    def fill(slots, tensor):
        sink_keys = tensor.gather(2, chosen.expand(-1, tensor.shape[1], -1, tensor.shape[-1]))
        return torch.where(is_filled[:, None, :, None], sink_keys, slots)

    sinks = fill(state.sink_key, inputs.key), fill(state.sink_value, inputs.value)
    position = torch.where(is_filled, key_index + state.length, state.sink_position)
    return FarState(state.total, state.weight, *sinks, position, state.length), is_sink


def _no_window(inputs: HybridInputs, state: FarState, far_key: Tensor) -> Tensor:
    """Run bidirectional attention without a window: one sum for all queries; the number of keys is free."""
    sinks = inputs.query @ state.sink_key.transpose(-1, -2)
    sinks = sinks.masked_fill((state.sink_position == NOWHERE)[:, None, None], float("-inf"))
    shift = torch.cat([inputs.far_query - HEADROOM, sinks], dim=-1).amax(-1, keepdim=True).detach()
    far_query, sinks = (inputs.far_query - shift).exp(), (sinks - shift).exp()
    drop = partial(_drop, inputs.dropout_p)
    output = drop(far_query) @ (far_key.transpose(-1, -2) @ inputs.value) + drop(sinks) @ state.sink_value
    total = far_query @ far_key.sum(2)[..., None] + sinks.sum(-1, keepdim=True)
    return output / torch.where(total != 0, total, 1.0)


def _drop(p: float, tensor: Tensor) -> Tensor:
    """Apply dropout to what a row is made of: exact weights, and landmarks for the far field, which has no weights."""
    return F.dropout(tensor, p) if p > 0 else tensor


class _Blocks:
    """The queries in blocks of C, each with the L = reach + C (+ reach) keys around it.

    Keys are moved right by `reach` - (keys before the first query), so that block b's keys are b·C ... b·C + L - 1 and
    local key l stands l - reach - c after local query c. All keys before b·C are far behind the whole block.
    """

    def __init__(self, inputs: HybridInputs, state: FarState, near_keep: Tensor, far_key: Tensor):
        self.inputs, self.state = inputs, state
        self.batch, self.heads, self.length, _ = inputs.query.shape
        self.width = min(_BLOCK, self.length)
        self.count = -(-self.length // self.width)
        self.reach = _reach(inputs)
        before = inputs.key.shape[2] - self.length if inputs.is_causal else 0
        self.local = self.width + self.reach * (1 if inputs.is_causal else 2)
        self.left = self.reach - before
        self.first = state.length + before
        # (C, L): key position minus query position.
        device = inputs.query.device
        relative = torch.arange(self.local, device=device) - torch.arange(self.width, device=device)[:, None]
        self.relative = relative - self.reach
        # How many of the L keys can be far from a query of the block.
        self.far_local = self.width if inputs.is_causal else self.local
        self.query, self.far_query = self._blocks(inputs.query), self._blocks(inputs.far_query)
        self.key, self.value, self.far_key = (self._windows(t) for t in (inputs.key, inputs.value, far_key))
        self.keep = self._windows(near_keep[:, None, :, None])[:, :, :, 0]  # (B, 1, blocks, L)
        self.sums = list(self._distant_sums(far_key))

    def attend(self) -> Tensor:
        """Return the output, computed for as many blocks at a time as fit the CPU's cache."""
        step = max(1, _PART_ENTRIES // (self.batch * self.heads * self.width * self.local))
        # `split`, unlike slices, has a gradient that costs no more than the whole, however many parts there are.
        whole = [self.query, self.far_query, self.key, self.value, self.far_key, self.keep]
        whole += [t for sums, masses, _ in self.sums for t in (sums, masses)]
        starts = range(0, self.count, step)
        parts = [self._part(start, *part) for start, *part in zip(starts, *(t.split(step, dim=2) for t in whole))]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).flatten(2, 3)[:, :, : self.length]

    def _part(self, start: int, query, far_query, key, value, far_key, keep, *sums: Tensor) -> Tensor:
        """Return (B, H, blocks, C, d_v) of some blocks, the first of which is number `start`."""
        inputs = self.inputs
        seen = self.relative <= 0 if inputs.is_causal else torch.ones_like(self.relative, dtype=torch.bool)
        near = (self.relative.abs() < inputs.window_size) & seen & keep[:, :, :, None]
        logits = query @ key
        if inputs.bias is not None:
            logits = logits + inputs.bias.at(self.relative)[:, None]
        logits = logits.masked_fill(~near, float("-inf"))
        sinks = self._sink_logits(query, start)
        tops = [t.amax(-1, keepdim=True) for t in (logits, sinks) if t.shape[-1]] + [self._top(far_query)]
        shift = torch.stack(tops).amax(0).detach()

        weights, sinks, far_query = ((t - shift).exp() for t in (logits, sinks, far_query))
        far = ((self.relative.abs() >= inputs.window_size) & seen)[:, : self.far_local]
        # Far keys that are not kept are zero.
        far_weights = (far_query @ far_key[..., : self.far_local]) * far
        if inputs.bias is not None:
            side = self.relative[:, : self.far_local].sign() * inputs.window_size
            far_weights = far_weights * inputs.bias.at(side).exp()[:, None]
        weights = weights + F.pad(far_weights, (0, self.local - self.far_local))
        drop = partial(_drop, inputs.dropout_p)
        output, total = drop(weights) @ value.transpose(-1, -2), weights.sum(-1, keepdim=True)
        if inputs.num_sinks:
            output = output + drop(sinks) @ self.state.sink_value[:, :, None]
            total = total + sinks.sum(-1, keepdim=True)
        for values, masses, (_, _, factor) in zip(sums[::2], sums[1::2], self.sums):
            distant = far_query if factor is None else far_query * factor
            output = output + drop(distant) @ values
            total = total + distant @ masses[..., None]
        return output / torch.where(total != 0, total, 1.0)

    def _top(self, far_query: Tensor) -> Tensor:
        """Return the largest far logarithm of a row, with the largest bias it can meet, less the headroom."""
        top = far_query.amax(-1, keepdim=True) - HEADROOM
        bias = self.inputs.bias
        return top if bias is None else top + torch.maximum(bias.behind, bias.ahead)[:, None, None, None]

    def _sink_logits(self, query: Tensor, start: int) -> Tensor:
        """Return the logits of the sinks, (B, H, blocks, C, s)."""
        state, inputs = self.state, self.inputs
        logits = query @ state.sink_key[:, :, None].transpose(-1, -2)
        position = torch.arange(query.shape[2] * self.width, device=query.device).view(-1, self.width, 1)
        relative = state.sink_position[:, None, None, None] - (position + self.first + start * self.width)
        if inputs.bias is not None:
            logits = logits + inputs.bias.at(relative.squeeze(1)).transpose(0, 1)
        hidden = relative > 0 if inputs.is_causal else (state.sink_position == NOWHERE)[:, None, None, None]
        return logits.masked_fill(hidden, float("-inf"))

    def _distant_sums(self, far_key: Tensor):
        """Return (Σ far_key vᵀ, Σ far_key, factor) of keys outside each block's own: behind it, and ahead of it."""
        inputs = self.inputs
        behind, ahead = None, None
        if inputs.bias is not None:
            behind, ahead = (b.exp()[:, None, None, None] for b in (inputs.bias.behind, inputs.bias.ahead))
        sums, masses = self._block_sums(far_key, -self.left)
        sums = torch.cat([self.state.total[:, :, None], sums[:, :, :-1]], dim=2).cumsum(2)
        masses = torch.cat([self.state.weight[:, :, None], masses[:, :, :-1]], dim=2).cumsum(2)
        yield sums, masses, behind
        if not inputs.is_causal:
            sums, masses = self._block_sums(far_key, self.local - self.left)
            yield sums.flip(2).cumsum(2).flip(2), masses.flip(2).cumsum(2).flip(2), ahead

    def _block_sums(self, far_key: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Return sums over keys start + b·C ... start + (b + 1)·C - 1 for each block b; `start` may be negative."""
        length = self.count * self.width

        def cut(tensor):
            tensor = F.pad(tensor[:, :, max(0, start) :], (0, 0, max(0, -start), 0))[:, :, :length]
            return self._blocks(tensor)

        far_key, value = cut(far_key), cut(self.inputs.value)
        return far_key.transpose(-1, -2) @ value, far_key.sum(-2)

    def _blocks(self, tensor: Tensor) -> Tensor:
        """Reshape (B, H, N, x) to (B, H, blocks, C, x), filled with zeros."""
        fill = self.count * self.width - tensor.shape[2]
        return (F.pad(tensor, (0, 0, 0, fill)) if fill else tensor).unflatten(2, (self.count, self.width))

    def _windows(self, tensor: Tensor) -> Tensor:
        """Unfold (B, H, M, x) to (B, H, blocks, x, L), filled with zeros."""
        length = (self.count - 1) * self.width + self.local
        tensor = F.pad(tensor, (0, 0, self.left, max(0, length - self.left - tensor.shape[2])))
        return tensor[:, :, :length].unfold(2, self.local, self.width)
