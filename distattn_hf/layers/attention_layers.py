"""Attention layers for models written in PyTorch: projections, a KV cache and distance attention between them."""

import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, EncoderDecoderCache

from ..core.attention import distance_attention, without_autocast
from ..core.constant_cache import RecurrentLayer, RingLayer
from ..core.families import Monitored
from ..core.inputs import add_bias, causal_keep, masked_softmax, split_mask
from ..core.metric_checks import check_distances
from ..core.metrics import get_metric
from ..core.native_attention import AttentionHeads
from ..functional.row_statistics import COLLAPSED_ENTROPY, COLLAPSED_WEIGHT, row_statistics
from .layer_settings import DistanceAttentionConfig, config_of, initialize
from .names import with_words_at_call


class ProjectedAttention(Monitored, AttentionHeads):
    """The native models' heads as a PyTorch layer; a subclass's `_attend` runs the attention between.

    layer_idx: this layer's place in a cache that several layers share.
    """

    gives_weights_on_request = True

    def __init__(
        self, hidden_size: int, num_heads: int, *, is_causal=False, bias=True, key_value_size=None, layer_idx: int = 0,
        value_head_dim=None,
    ):  # fmt: skip
        super().__init__(hidden_size, num_heads, layer_idx, bias, key_value_size, value_head_dim=value_head_dim)
        self.hidden_size, self.key_value_size = hidden_size, key_value_size or hidden_size
        self.is_causal = is_causal
        self.output_dropout = 0.0

    @with_words_at_call
    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_bias: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Map (B, N, E) -> (B, N, E); with `output_attentions` also the weights (B, H, N, M) before dropout.

        Args:
            hidden_states: (B, N, E), the queries.
            key_value_states: (B, M, key_value_size) of another sequence, for cross-attention; None: self-attention.
            attention_mask: which keys count: (B, M), (B, N, M) or broadcastable to (B, H, N, M); bool (True = keep),
                integers 0/1, or float added to the logits. With a cache, M counts the cached keys.
            position_bias: float (B or 1, H or 1, N, M), added to the logits.
            position_embeddings: (cos, sin) of rotary positions, each (B or 1, N, d).
            past_key_values: a transformers cache that keeps every key (`DynamicCache`, or `EncoderDecoderCache`, which
                also keeps those of another sequence); it is filled in place. Mechanisms that need less make its layer
                one of constant size.
            key_padding_mask: (B, M) bool, True = padding, as PyTorch has it; in the place of attention_mask.

        Other words: need_weights (output_attentions), mask (attention_mask), and query, key and value, of which key and
        value are one tensor (`DistanceMultiheadAttention` takes three).

        Raises:
            ValueError: for tensors, masks and caches that do not fit.
        """
        self._check(hidden_states, key_value_states)
        if key_padding_mask is not None:
            if attention_mask is not None or key_padding_mask.dtype != torch.bool or key_padding_mask.dim() != 2:
                raise ValueError(
                    "key_padding_mask must be bool (B, M), True = padding, in the place of attention_mask, got "
                    f"{key_padding_mask.dtype} of shape {tuple(key_padding_mask.shape)}"
                )
            attention_mask = ~key_padding_mask
        is_cross = key_value_states is not None
        # Only an `EncoderDecoderCache` has room for another sequence's keys; any other is of self-attention.
        cache = None if is_cross and not isinstance(past_key_values, EncoderDecoderCache) else past_key_values
        query, key, value = self._project(hidden_states, key_value_states, position_embeddings, cache)
        num_keys = key.shape[2] if cache is None or is_cross else cache.get_seq_length(self.layer_idx)
        if attention_mask is not None and attention_mask.shape[-1] != num_keys:
            raise ValueError(
                f"attention_mask must speak of {num_keys} keys (M, those in the cache included), got shape "
                f"{tuple(attention_mask.shape)}"
            )
        # Of the keys that are left of them.
        attention_mask, position_bias = (
            each if each is None else each[..., num_keys - key.shape[2] :] for each in (attention_mask, position_bias)
        )
        output, weights = self._attend(query, key, value, attention_mask, position_bias, is_cross, output_attentions)
        output = self.o_proj(output.transpose(1, 2).flatten(2))
        output = F.dropout(output, self.output_dropout, self.training)
        return (output, weights) if output_attentions else output

    def _attend(self, query, key, value, mask, position_bias, is_cross, output_attentions):
        """Return (output (B, H, N, d), weights (B, H, N, M) or None); query (B, H, N, d), key, value (B, H, M, d)."""
        raise NotImplementedError

    def _extend(self, cache: Cache, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of all tokens so far; raises `ValueError` for a cache of another length."""
        total = cache.get_seq_length(self.layer_idx) + key.shape[2]
        key, value = super()._extend(cache, key, value)
        if key.shape[2] != total and not isinstance(cache.layers[self.layer_idx], RecurrentLayer | RingLayer):
            raise ValueError(
                f"past_key_values must keep every key and no empty places (DynamicCache does), got "
                f"{type(cache).__name__} with {key.shape[2]} keys after {total} tokens"
            )
        return key, value

    def _check(self, hidden_states: Tensor, key_value_states: Tensor | None) -> None:
        """Raise `ValueError` naming the tensor that does not fit."""
        named = [("hidden_states", hidden_states, self.hidden_size)]
        if key_value_states is None:
            if self.key_value_size != self.hidden_size:
                raise ValueError(
                    f"this layer was made for cross-attention (key_value_size={self.key_value_size}): pass "
                    "key_value_states"
                )
        else:
            if self.is_causal:
                raise ValueError("a causal layer takes no key_value_states: another sequence has no future")
            named.append(("key_value_states", key_value_states, self.key_value_size))
        for name, tensor, size in named:
            if tensor.dim() != 3 or tensor.shape[-1] != size or len(tensor) != len(hidden_states):
                raise ValueError(
                    f"{name} must have shape (B={len(hidden_states)}, length, {size}), got {tuple(tensor.shape)}"
                )


class DistanceBasedAttention(ProjectedAttention):
    """Multi-head attention by distances: softmax(-λ_h·distance(q_i, k_j) / (√d·temperature) + bias_ij)·v, projected.

    Made by a `DistanceAttentionConfig` or by its fields: `DistanceBasedAttention(hidden_size=768, num_heads=12)`.
    A subclass may override `compute_distance_matrix`; attention is then written out, quadratic in memory.
    """

    def __init__(self, config: DistanceAttentionConfig | None = None, layer_idx: int = 0, **fields):
        config = config_of(config, fields)
        super().__init__(
            config.hidden_size, config.num_heads, is_causal=config.is_causal, bias=config.bias,
            key_value_size=config.key_value_size, layer_idx=layer_idx, value_head_dim=config.value_head_dim,
        )  # fmt: skip
        initialize(self, config.initializer)
        self.config, self.output_dropout = config, config.output_dropout or 0.0
        lam = config.lam
        if lam is None:
            lam = get_metric(config.metric).default_lambda(self.head_dim, self.head_dim**-0.5, config.p)
        self.log_lambda = nn.Parameter(torch.full((self.num_heads,), math.log(lam)))
        self.set_learnable_lambda(config.learnable_lambda)
        if config.softening:
            log_softening = torch.full((self.num_heads,), math.log(config.softening))
            self.log_softening = nn.Parameter(log_softening, requires_grad=config.learnable_softening)
        self._collapsed_heads: set[int] = set()

    @property
    def lam(self) -> Tensor:
        """λ > 0 of each head, (H,)."""
        return self.log_lambda.to(torch.promote_types(self.log_lambda.dtype, torch.float32)).exp()

    @property
    def softening(self) -> float | Tensor:
        """ε > 0 of each head, (H,); 0.0 for the plain distance."""
        if not self.config.softening:
            return 0.0
        return self.log_softening.to(torch.promote_types(self.log_softening.dtype, torch.float32)).exp()

    @property
    def learnable_lambda(self) -> bool:
        """Whether λ trains."""
        return self.log_lambda.requires_grad

    def set_learnable_lambda(self, learnable: bool) -> None:
        """Let λ train, or keep it fixed; make the optimiser afterwards."""
        self.log_lambda.requires_grad_(learnable)

    def compute_distance_matrix(self, query: Tensor, key: Tensor) -> Tensor:
        """Return distances (B, H, N, M) >= 0 of query (B, H, N, d) and key (B, H, M, d), in at least float32.

        Smaller is nearer. Negative ones are refused unless the config's metric is "dot", which is no distance, or
        softened cosine, which leaves out the 1 of 1 - cos.
        """
        epsilon = self.softening
        epsilon = epsilon.to(query.dtype)[:, None, None] if isinstance(epsilon, Tensor) else None
        return get_metric(self.config.metric).checked_distance(query, key, self.config.p, epsilon=epsilon)

    def _attend(self, query, key, value, mask, position_bias, is_cross, output_attentions):
        config, num_queries, num_keys = self.config, query.shape[2], key.shape[2]
        dropout_p = config.dropout if self.training else 0.0
        is_causal = self.is_causal and num_queries > 1
        scaling = self.head_dim**-0.5 / config.temperature
        custom = type(self).compute_distance_matrix is not DistanceBasedAttention.compute_distance_matrix
        needs_weights = output_attentions or config.detect_collapse
        keep = None
        if custom or config.logit_clip is not None or config.detect_collapse or (is_causal and num_queries != num_keys):
            keep, bias = split_mask(mask, (*query.shape[:3], num_keys))
            if is_causal:
                triangle = causal_keep(num_queries, num_keys, query.device, offset=num_keys - num_queries)[None, None]
                keep, is_causal = triangle if keep is None else keep & triangle, False
            mask, position_bias = keep, add_bias(position_bias, bias)
        if custom or config.logit_clip is not None:
            output, weights = self._written_out(query, key, value, keep, position_bias, scaling, dropout_p)
        else:
            result = distance_attention(
                query, key, value, metric=config.metric, lam=self.lam, p=config.p, scaling=scaling, mask=mask,
                position_bias=position_bias, is_causal=is_causal, dropout_p=dropout_p,
                backend="auto" if needs_weights else config.backend, return_weights=needs_weights,
                softening=self.softening,
            )  # fmt: skip
            output, weights = result if needs_weights else (result, None)
        if config.detect_collapse:
            self._warn_of_collapse(weights.detach(), keep)
        return output, weights

    def _written_out(self, query, key, value, keep, bias, scaling: float, dropout_p: float):
        """Return (output, weights) by the whole matrix of distances."""
        with without_autocast(query.device.type):
            dtype = torch.promote_types(query.dtype, torch.float32)
            distance = self.compute_distance_matrix(query.to(dtype), key.to(dtype))
            metric = get_metric(self.config.metric)
            signed = not metric.is_distance or (metric.scale_free and bool(self.config.softening))
            check_distances(f"{type(self).__name__}.compute_distance_matrix", distance, query, key, signed)
            expected = distance.shape
            logits = -self.lam[:, None, None] * scaling * distance
            if bias is not None:
                # A bias may mask, too: -inf and the dtype's minimum.
                open_entries, bias = split_mask(bias, expected)
                keep = open_entries if keep is None else keep & open_entries
                logits = logits + bias
            if self.config.logit_clip is not None:
                kept_logits = logits if keep is None else logits.masked_fill(~keep, float("-inf"))
                row_maximum = kept_logits.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min / 2)
                logits = torch.maximum(logits, row_maximum - self.config.logit_clip)
            weights = masked_softmax(logits, None if keep is None else keep.expand(expected))
            output = F.dropout(weights, dropout_p) @ value.to(dtype)
        return output.to(value.dtype), weights

    def _warn_of_collapse(self, weights: Tensor, keep: Tensor | None) -> None:
        rows = row_statistics(weights, keep).collapsed.transpose(0, 1).flatten(1)
        share = rows.float().mean(-1)
        for head in (share > 0).nonzero().flatten().tolist():
            if head not in self._collapsed_heads:
                self._collapsed_heads.add(head)
                warnings.warn(
                    f"{type(self).__name__} (layer {self.layer_idx}): attention of head {head} collapsed in "
                    f"{100 * float(share[head]):.3g}% of its rows (entropy < {COLLAPSED_ENTROPY} nats or a weight > "
                    f"{COLLAPSED_WEIGHT}); a larger temperature, a smaller lam or a logit_clip widens it",
                    stacklevel=4,
                )

    def extra_repr(self) -> str:
        return f"metric={self.config.metric}, heads={self.num_heads}, is_causal={self.is_causal}"
