"""Attention whose weights are products of positive features of query and key, summed once for all queries.

Written here and not taken from a library, because a checkpoint must load with torch and transformers alone.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .constant_cache import RecurrentLayer
from .mechanism_base import Call, Mechanism, register_mechanism

# Queries of a causal problem that share one running sum: within a block the weights are written out.
_BLOCK = 64


class FeatureAttention(Mechanism):
    """weight(i, j) ∝ φ(q_i)·φ(k_j), φ > 0 in R^m: output_i = φ(q_i)·S / φ(q_i)·z, S = Σ_j φ(k_j)v_jᵀ, z = Σ_j φ(k_j).

    Causal: S and z are running sums, of which one in every `_BLOCK` queries is kept, and the last in a cache: its size
    and the time of a token do not depend on the length of the text. Rows of weights sum to 1. Dropout
    drops features of the query, as single weights are never computed; there is no position bias for the same reason.
    """

    cross = True
    complexity = "O((N + M)·m·d)"
    memory = "O((N + M)·(m + d)), causal with m·d for every 64 queries besides"

    def _features(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return φ(q) (B, H, N, m) up to a factor per query, φ(k)/exp(s) (B, H, M, m), s (B, H, M) or None.

        s, without gradient, keeps exponents small; None: φ needs none.
        """
        raise NotImplementedError

    def cache_layer(self, layer):
        return RecurrentLayer.from_layer(layer)

    def _attend(self, call):
        query, key, scale = self._kept_features(call)
        value = torch.cat([call.value, torch.ones_like(call.value[..., :1])], dim=-1)
        start = None if call.memory is None else call.memory.state
        sums = partial(_running_sums, start=start) if call.is_causal else _sums
        summed = sums(query, key, scale, value)
        total = summed[..., -1:]
        if call.dropout_p > 0:
            summed = sums(call.drop(query), key, scale, value)
        if call.memory is not None:
            count = call.memory.settled
            settled = _summary(key[:, :, :count], None if scale is None else scale[..., :count], value[:, :, :count])
            call.memory.put(_joined(start, settled))
        return summed[..., :-1] / torch.where(total != 0, total, 1.0)

    def _weights(self, call):
        query, key, scale = self._kept_features(call)
        weights = query @ key.mT
        seen = call.seen()
        if scale is not None:
            scale = scale[:, :, None].masked_fill(~seen, float("-inf"))
            weights = weights * (scale - _finite(scale.amax(-1, keepdim=True))).exp()
        weights = weights * seen
        total = weights.sum(-1, keepdim=True)
        return weights / torch.where(total != 0, total, 1.0)

    def _kept_features(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return `_features` with those of padding at zero."""
        query, key, scale = self._features(call)
        if call.keep is not None:
            keep = call.keep[:, None]
            key = key.masked_fill(~keep[..., None], 0.0)
            scale = None if scale is None else scale.masked_fill(~keep, float("-inf"))
        return query, key, scale


@register_mechanism("linear")
class LinearAttention(FeatureAttention):
    """φ(x) = elu(x) + 1, m = d.

    There is no exponential and no 1/√d: `scaling` None means 1 here, and a number multiplies the query before φ.
    Source: Katharopoulos et al., Transformers are RNNs (2020).
    """

    def _features(self, call):
        query = call.query if call.scaling is None else call.query * call.scaling
        return F.elu(query) + 1, F.elu(call.key) + 1, None


def _finite(scale: Tensor) -> Tensor:
    """Return the scale with a number where no key is seen, so that differences of it are never NaN."""
    return scale.clamp(min=torch.finfo(scale.dtype).min)


def _summary(key: Tensor, scale: Tensor | None, value: Tensor) -> tuple[Tensor, ...]:
    """Return (Σ_j φ(k_j)v_jᵀ/exp(top) (..., m, d_v), top (..., 1, 1)) over keys (..., M, m); without a scale no top."""
    if scale is None:
        return (key.mT @ value,)
    # A decoding step or a first block has no keys before it.
    top = scale.amax(-1) if scale.shape[-1] else scale.new_full(scale.shape[:-1], float("-inf"))
    top = _finite(top)[..., None, None]
    return (key * (scale[..., None] - top).exp()).mT @ value, top


def _joined(first: tuple | None, second: tuple) -> tuple:
    """Return the summary of the keys of two summaries, which share none."""
    if first is None:
        return second
    if len(first) == 1:
        return (first[0] + second[0],)
    top = torch.maximum(first[1], second[1])
    return sum(state * (own_top - top).exp() for state, own_top in (first, second)), top


def _sums(query: Tensor, key: Tensor, scale: Tensor | None, value: Tensor) -> Tensor:
    """Return φ(q)·Σ_j φ(k_j)v_jᵀ over all keys, up to a factor per head."""
    return query @ _summary(key, scale, value)[0]


def _running_sums(
    query: Tensor, key: Tensor, scale: Tensor | None, value: Tensor, start: tuple[Tensor, ...] | None = None
) -> Tensor:
    """Return φ(q_i)·Σ_{j ≤ i} φ(k_j)v_jᵀ, up to a factor per query; the last N of M keys are the queries' own.

    start: the summary of keys before all of these.
    """
    length, num_past = query.shape[2], key.shape[2] - query.shape[2]
    count = -(-length // _BLOCK)
    width = min(_BLOCK, length)

    def blocks(tensor, fill=0.0):
        tensor = F.pad(tensor, (0, 0, 0, count * width - length), value=fill)
        return tensor.unflatten(2, (count, width))

    scales = (None, None)
    if scale is not None:
        scales = scale[..., :num_past], blocks(scale[..., num_past:, None], float("-inf")).squeeze(-1)
    start = _joined(start, _summary(key[:, :, :num_past], scales[0], value[:, :, :num_past]))
    query, key, value = blocks(query), blocks(key[:, :, num_past:]), blocks(value[:, :, num_past:])
    own = _summary(key, scales[1], value)
    weights = query @ key.mT
    seen = torch.ones(width, width, dtype=torch.bool, device=query.device).tril()
    if scale is None:
        states = torch.cat([start[0][:, :, None], own[0][:, :, :-1]], dim=2).cumsum(2)
        return (query @ states + (weights * seen) @ value).flatten(2, 3)[:, :, :length]

    summaries = [start]
    # `unbind`, unlike indexing, has a gradient that costs no more than the whole, however many blocks there are.
    for block in zip(*(tensor.unbind(2)[:-1] for tensor in own)):
        summaries.append(_joined(summaries[-1], block))
    states, tops = (torch.stack(tensors, dim=2) for tensors in zip(*summaries))
    # The largest scale among the keys up to each query: one over more keys would leak the future.
    highest = torch.maximum(tops, _finite(scales[1].cummax(-1).values)[..., None])
    shifted = (scales[1][..., None, :] - highest).masked_fill(~seen, float("-inf"))
    summed = (query @ states) * (tops - highest).exp() + (weights * shifted.exp()) @ value
    return summed.flatten(2, 3)[:, :, :length]
