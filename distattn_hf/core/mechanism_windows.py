"""Attention to the keys near a query, in overlapping blocks: time and memory O(N·window), never an (N, M) matrix.

And what mechanisms of a fixed pattern share: parts of one softmax, and global tokens.

Written here and not taken from a library, because a checkpoint must load with torch and transformers alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.integrations.sdpa_attention import repeat_kv

from .constant_cache import RingLayer, chosen_first
from .mechanism_base import MECHANISMS, Beyond, Call, Mechanism, Option, register_mechanism

# Queries in one block: more make fewer and larger products, of which more entries are masked.
_FEWEST, _MOST = 32, 256


@dataclass(frozen=True)
class Part:
    """Softmax attention to some of the keys, not yet normalised: weights are exp(logits - top).

    summed (B, H, N, d_v): Σ weight·value; total and top (B, H, N, 1): Σ weight and the largest logit.
    """

    summed: Tensor
    total: Tensor
    top: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Part":
        """Return the part with each tensor changed."""
        return Part(change(self.summed), change(self.total), change(self.top))

    def packed(self) -> Tensor:
        """Return (..., N, d_v + 2), all three side by side."""
        return torch.cat([self.summed, self.total, self.top], dim=-1)

    @classmethod
    def of(cls, packed: Tensor) -> "Part":
        """Return the part of a tensor as `packed` returns it."""
        return cls(*packed.split([packed.shape[-1] - 2, 1, 1], dim=-1))


def merge(parts: list[Part]) -> Tensor:
    """Return the attention output over the keys of all parts, which share none; queries that see nothing get zeros."""
    top = torch.stack([part.top for part in parts]).amax(0)
    factors = [(part.top - top).exp() for part in parts]
    total = sum(part.total * factor for part, factor in zip(parts, factors))
    return sum(part.summed * factor for part, factor in zip(parts, factors)) / torch.where(total != 0, total, 1.0)


def attend(logits: Tensor, seen: Tensor, value: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute softmax(logits (..., N, L) over `seen`)·value (..., L, d_v); queries that see nothing get zeros."""
    weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1)
    return (drop(weights) @ value).masked_fill(~seen.any(-1, keepdim=True), 0.0)


def weigh(logits: Tensor, seen: Tensor, value: Tensor, drop: Callable[[Tensor], Tensor]) -> Part:
    """Return the part of logits (..., N, L), `seen` (which of them count) and value (..., L, d_v); `drop`: dropout."""
    logits = logits.masked_fill(~seen, float("-inf"))
    top = logits.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    weights = (logits - top).exp()
    return Part(drop(weights) @ value, weights.sum(-1, keepdim=True), top)


class PatternAttention(Mechanism):
    """Softmax attention of each query to the keys of a pattern, and with the global tokens where a call names them.

    A global token sees every key that causality and padding leave, and every query that they leave sees it, under one
    normaliser with its pattern. G of them cost O((N + M)·G·d) besides. They have the projections of all others;
    Longformer gives their queries projections of their own.
    """

    takes_bias = True
    takes_global = True

    def _attend(self, call):
        if call.is_global is None:
            return self._by_pattern(call)
        return attend_with_global(call, self._parts(call))

    def _by_pattern(self, call: Call) -> Tensor:
        """Return the output (B, H, N, d_v) without global tokens."""
        raise NotImplementedError

    def _parts(self, call: Call) -> list[Part]:
        """Return the parts of the pattern's keys that are not global."""
        raise NotImplementedError


def attend_with_global(call: Call, parts: list[Part]) -> Tensor:
    """Return the output over the keys of all parts, none of which is global, and with the global tokens."""
    batch, heads, num_keys = call.key.shape[:3]
    place = torch.arange(num_keys, device=call.key.device)

    def rows(tensor, places):
        """Return (B, H, G, x) of (B or 1, H, n, x)."""
        index = places[:, None, :, None].expand(-1, heads, -1, tensor.shape[-1])
        return tensor.expand(batch, -1, -1, -1).gather(2, index)

    places, exists = chosen_first(call.is_global)
    logits = call.scaled_query @ rows(call.key, places).mT
    if call.bias is not None:
        logits = logits + rows(call.bias.mT, places).mT
    seen = exists if call.keep is None else exists & call.keep.gather(1, places)
    seen = seen[:, None, None]
    if call.is_causal:
        seen = seen & (places[:, None, None] <= place[call.before :, None])
    parts = [*parts, weigh(logits, seen, rows(call.value, places), call.drop)]
    if (beyond := call.beyond) is not None:
        logits = call.scaled_query @ beyond.key.mT
        if beyond.bias is not None:
            logits = logits + beyond.bias
        parts.append(weigh(logits, beyond.seen[:, None, None], beyond.value, call.drop))
    output = merge(parts)
    if not call.global_queries.any():
        return output

    places, exists = chosen_first(call.global_queries)
    logits = rows(call.scaled_query, places) @ call.key.mT
    if call.bias is not None:
        logits = logits + rows(call.bias, places)
    seen = torch.ones_like(logits[:, :1], dtype=torch.bool) if call.keep is None else call.keep[:, None, None]
    if call.is_causal:
        seen = seen & (place <= places[:, None, :, None] + call.before)
    own = torch.where(exists[:, None, :, None], attend(logits, seen, call.value, call.drop), rows(output, places))
    return output.scatter(2, places[:, None, :, None].expand_as(own), own)


def global_tokens(marked: Tensor | None, mechanism: str, given: Tensor | None, cache: Cache | None) -> Tensor | None:
    """Return global_attention_mask as bool (B, M) for given (B, N, ...), the last N of M tokens; None for None.

    Raises `ValueError` for what cannot be, and where it is missing beside a cache that it was given with.
    """
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    known = getattr(cache, "distattn_has_global", False)
    past = 0 if cache is None or marked is None and not known else int(cache.get_seq_length())
    if marked is None:
        if past:
            raise ValueError(
                "the cache holds global tokens: give global_attention_mask of all tokens, those in the cache included"
            )
        if known:
            # A cache that was reset.
            cache.distattn_has_global = False
        return None
    able = [name for name in MECHANISMS if MECHANISMS.get(name).takes_global]
    if mechanism not in able:
        raise ValueError(
            f"global_attention_mask needs a mechanism with a pattern ({', '.join(able)}), got {mechanism!r}"
        )
    shape = None if given is None else (given.shape[0], past + given.shape[1])
    looks = not torch.compiler.is_compiling()
    if tuple(marked.shape) != shape or looks and bool(((marked != 0) & (marked != 1)).any()):
        raise ValueError(
            f"global_attention_mask must hold 0 and 1, of shape (B, M)={shape}, one entry for each token, those in the "
            f"cache included; got shape {tuple(marked.shape)}"
            + (f" and values {marked.unique().tolist()[:5]}" if looks else "")
        )
    marked = marked != 0
    for layer in [] if cache is None else cache.layers:
        if isinstance(layer, RingLayer):
            layer.check_global(marked)
    return marked


def before_ring(
    key: Tensor, value: Tensor, places: Tensor, keep: Tensor | None, bias: Tensor | None, groups: int
) -> Beyond:
    """Return the global tokens that `RingLayer.keep_global` found before a call's keys, for all query heads.

    keep (B, M) and bias (B or 1, H, N, M) speak of the whole text.
    """
    seen, places = places >= 0, places.clamp(min=0)
    if bias is not None:
        index = places[:, None, None].expand(-1, bias.shape[1], bias.shape[2], -1)
        bias = bias.expand(len(places), -1, -1, -1).gather(-1, index)
    seen = seen if keep is None else seen & keep.gather(1, places)
    return Beyond(repeat_kv(key, groups), repeat_kv(value, groups), seen, bias)


def windows(call: Call, window_size: int, dilation: int, beyond: int = 0) -> tuple[Tensor, Tensor, Tensor, Callable]:
    """Return (logits, seen, value, back) of the keys 0, dilation, ..., (window_size - 1)·dilation behind a query.

    Bidirectional: also ahead. Only keys at least `beyond` away. `back` puts rows in the order of the queries again.
    Queries and keys are sorted by position modulo dilation: within one class a dilated window is a window. Each block
    of C queries of a class meets the L = reach + C (+ reach) keys around it.
    """
    length, device = call.query.shape[2], call.query.device
    reach = window_size - 1
    ahead = 0 if call.is_causal else reach
    rows = -(-length // dilation)
    count = -(-rows // min(_MOST, max(_FEWEST, reach)))
    width = -(-rows // count)
    local = reach + width + ahead
    # Keys are moved so that the first query of a class stands `reach` after its first key.
    left_padding = reach * dilation - call.before

    def queries(tensor):
        tensor = F.pad(tensor, (0, 0, 0, count * width * dilation - length))
        return tensor.unflatten(2, (count, width, dilation)).movedim(4, 2)

    def around(tensor):
        size = (count * width + reach + ahead) * dilation
        tensor = F.pad(tensor, (0, 0, left_padding, size - left_padding - tensor.shape[2]))
        return tensor.unflatten(2, (-1, dilation)).transpose(2, 3).unfold(3, local, width)

    # (C, L): key's class position minus query's.
    offset = torch.arange(local, device=device) - torch.arange(width, device=device)[:, None] - reach
    seen = (offset.abs() < window_size) & (offset.abs() * dilation >= beyond)
    if call.is_causal:
        seen = seen & (offset <= 0)
    keep = call.pattern_keep
    keep = keep if keep is not None else torch.ones(1, call.key.shape[2], dtype=torch.bool, device=device)
    seen = seen & around(keep[:, None, :, None])
    logits = queries(call.scaled_query) @ around(call.key)
    if call.bias is not None:
        start = torch.arange(count, device=device)[:, None] * width
        remainder = torch.arange(dilation, device=device)[:, None, None]
        query_at = (start + torch.arange(width, device=device)) * dilation + remainder
        key_at = (start + torch.arange(local, device=device)) * dilation + remainder - left_padding
        query_at, key_at = query_at.clamp(max=length - 1), key_at.clamp(0, call.key.shape[2] - 1)
        logits = logits + call.bias[:, :, query_at[..., :, None], key_at[..., None, :]]

    def back(tensor):
        return tensor.movedim(2, 4).flatten(2, 4)[:, :, :length]

    return logits, seen, around(call.value).mT, back


def looked_up(call: Call, offsets: Tensor) -> Tensor | None:
    """Return the output of causal queries to the keys `offsets` (L,) behind each, where that reads fewer than all keys.

    None where it reads more: many queries share their keys, which blocks read once.
    """
    count, num_keys = call.query.shape[2], call.key.shape[2]
    if not call.is_causal or count * len(offsets) > num_keys:
        return None
    place = torch.arange(count, device=offsets.device)[:, None] + call.before - offsets
    seen, place = (place >= 0)[None], place.clamp(min=0)
    if call.keep is not None:
        seen = seen & call.keep[:, place]
    logits = (call.scaled_query[..., None, :] @ call.key[:, :, place].mT).squeeze(-2)
    if call.bias is not None:
        logits = logits + call.bias.gather(-1, place.expand(*call.bias.shape[:2], -1, -1))
    return attend(logits[..., None, :], seen[:, None, :, None], call.value[:, :, place], call.drop).squeeze(-2)


def distances(call: Call) -> Tensor:
    """Return how many positions lie between each query and each key, (N, M)."""
    query = torch.arange(call.query.shape[2], device=call.query.device) + call.before
    return (query[:, None] - torch.arange(call.key.shape[2], device=call.query.device)).abs()


@register_mechanism("local", aliases=("window", "sliding_window", "longformer"))
class LocalAttention(PatternAttention):
    """Softmax attention to the keys j with |i - j| = 0, D, 2·D, ..., (W - 1)·D, W = window_size and D = dilation.

    Causal: W keys, the query's own among them. Bidirectional: W - 1 more ahead, so that every query has as many on
    either side. A position bias is read at those keys only, but the caller has made all of it. A cache keeps the last
    (W - 1)·D keys.

    Source: Beltagy et al., Longformer (2020).
    """

    complexity = "O(N·W·d)"
    memory = "O(N·(W + d))"
    options = {"window_size": Option(128), "dilation": Option(1)}

    def cache_layer(self, layer):
        return RingLayer.from_layer(layer, (self.window_size - 1) * self.dilation)

    def _by_pattern(self, call):
        offsets = torch.arange(self.window_size, device=call.query.device) * self.dilation
        if (output := looked_up(call, offsets)) is not None:
            return output
        *problem, to_query_order = windows(call, self.window_size, self.dilation)
        return to_query_order(attend(*problem, call.drop))

    def _parts(self, call):
        *problem, to_query_order = windows(call, self.window_size, self.dilation)
        return [weigh(*problem, call.drop).map(to_query_order)]

    def _visible(self, call):
        distance = distances(call)
        return (distance % self.dilation == 0) & (distance < self.window_size * self.dilation)


@register_mechanism("strided")
class StridedAttention(PatternAttention):
    """Softmax attention to the keys j with |i - j| < W and those with |i - j| = s, 2·s, ..., T·s, under one normaliser.

    W = window_size, s = stride, T = num_strides. Child et al. let the second kind go back to the first token, which is
    N²/s entries; here their number is fixed, so time and memory are linear, and T·s is how far one layer sees.
    Bidirectional: as many on either side. Their other pattern ("fixed") is not here. A cache keeps the last T·s keys
    (W - 1 if those are more): each of them is s, 2·s, ... behind some later query.

    Source: Child et al., Generating Long Sequences with Sparse Transformers (2019).
    """

    complexity = "O(N·(W + T)·d)"
    memory = "O(N·(W + T + d))"
    options = {"window_size": Option(64), "stride": Option(64), "num_strides": Option(64)}

    def cache_layer(self, layer):
        return RingLayer.from_layer(layer, max(self.window_size - 1, self.num_strides * self.stride))

    def _by_pattern(self, call):
        offsets = sorted({*range(self.window_size), *range(0, self.num_strides * self.stride + 1, self.stride)})
        if (output := looked_up(call, torch.tensor(offsets, device=call.query.device))) is not None:
            return output
        return merge(self._parts(call))

    def _parts(self, call):
        parts = []
        for size, dilation, beyond in ((self.window_size, 1, 0), (self.num_strides + 1, self.stride, self.window_size)):
            *problem, to_query_order = windows(call, size, dilation, beyond)
            parts.append(weigh(*problem, call.drop).map(to_query_order))
        return parts

    def _visible(self, call):
        distance = distances(call)
        columns = (distance % self.stride == 0) & (distance <= self.num_strides * self.stride)
        return columns | (distance < self.window_size)
