"""Attention layers for models written in PyTorch: projections, a KV cache and distance attention between them."""

import math
import warnings
from dataclasses import dataclass
from enum import StrEnum
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, EncoderDecoderCache

from ..core.attention import distance_attention, without_autocast
from ..core.backends import validate_backend
from ..core.configuration_native import check_integer
from ..core.constant_cache import RecurrentLayer, RingLayer
from ..core.families import Monitored
from ..core.inputs import add_bias, causal_keep, masked_softmax, split_mask
from ..core.metric_checks import check_distances
from ..core.metrics import get_metric
from ..core.native_attention import AttentionHeads
from ..core.softening import check_softening
from ..functional.row_statistics import COLLAPSED_ENTROPY, COLLAPSED_WEIGHT, row_statistics
from .names import with_aliases


class DistanceType(StrEnum):
    """The built-in distances; each is also the name that `metric` takes."""

    SQUARED_EUCLIDEAN = "sqeuclidean"
    EUCLIDEAN = "l2"
    MANHATTAN = "l1"
    MINKOWSKI = "lp"
    COSINE = "cosine"
    CHEBYSHEV = "chebyshev"
    SQEUCLIDEAN, L2, L1, LP = SQUARED_EUCLIDEAN, EUCLIDEAN, MANHATTAN, MINKOWSKI

    @classmethod
    def _missing_(cls, value):
        """Return the member of an alias of its metric, such as "manhattan" or "linf"."""
        canonical = get_metric(value).name
        return next((member for member in cls if member.value == canonical), None)


@with_aliases
@dataclass
class DistanceAttentionConfig:
    """Settings of a distance-attention layer: softmax(-λ·distance(q_i, k_j) / (√d·temperature) + bias_ij)·v.

    Args:
        hidden_size: E, a multiple of num_heads. num_heads: H; each head has d = E / H.
        metric: a `DistanceType`, a metric's name or alias, or a name from `register_metric`; "dot" is dot-product
            attention. p: order of "lp"; None: 2.
        lam: λ > 0 of every head at the start; None: the metric's default, at which logits of N(0, I) vectors have unit
            deviation. learnable_lambda: whether λ trains, one per head.
        softening: ε >= 0 of every head at the start, below which the distance is quadratic (see softening.py); 0: the
            plain distance. learnable_softening: whether ε trains, one per head; from 0 it cannot.
        temperature: > 0; larger is nearer to uniform weights.
        dropout: of the weights (and of what a block adds to its residual), in training.
        is_causal: whether a token sees itself and earlier ones only. bias: of the projections.
        key_value_size: size of the other sequence's vectors in cross-attention; None: hidden_size.
        logit_clip: None, or the most that a logit may stay below the largest of its row, so that no weight is less than
            e^-logit_clip of another. Runs written out, quadratic in memory.
        detect_collapse: warn once for each head in which a row has an entropy below 0.1 nats or a weight above 0.95.
            Runs written out, as it looks at all weights.
        backend: as in `distance_attention`.
        use_residual, use_layer_norm, norm_first, layer_norm_eps: of blocks around attention; norm_first: before it
            rather than after the sum.
        intermediate_size: of feed-forward parts; None: 4·hidden_size. activation: its name in transformers.

    Other names of these are understood, too: distance_type, lambda_param, p_norm, use_learnable_lambda, d_model, ...
    (`names.ALIASES`).

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    hidden_size: int = 768
    num_heads: int = 12
    metric: str = "l2"
    p: float | None = None
    lam: float | None = None
    learnable_lambda: bool = False
    temperature: float = 1.0
    dropout: float = 0.0
    is_causal: bool = False
    bias: bool = True
    key_value_size: int | None = None
    logit_clip: float | None = None
    detect_collapse: bool = False
    backend: str = "auto"
    use_residual: bool = True
    use_layer_norm: bool = True
    norm_first: bool = True
    layer_norm_eps: float = 1e-5
    intermediate_size: int | None = None
    activation: str = "gelu"
    softening: float = 0.0
    learnable_softening: bool = False

    def __post_init__(self):
        for name in ("hidden_size", "num_heads", "key_value_size", "intermediate_size"):
            check_integer(name, getattr(self, name), optional=name in ("key_value_size", "intermediate_size"))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}")
        metric = get_metric(self.metric)
        p = 2.0 if metric.name == "lp" and self.p is None else self.p
        self.metric, self.p = metric.name, metric.validate(p)
        if isinstance(self.softening, Tensor):
            raise ValueError(
                "softening must be a number, got a tensor; learnable_softening=True gives each head its own"
            )
        self.softening = check_softening(metric, self.softening) or 0.0
        if self.learnable_softening and not self.softening:
            raise ValueError("learnable_softening=True needs a softening > 0 to start from, got softening=0")
        self.backend = validate_backend(self.backend)
        for name in ("lam", "temperature", "logit_clip", "layer_norm_eps"):
            value = getattr(self, name)
            optional = name in ("lam", "logit_clip")
            is_valid = isinstance(value, Real) and not isinstance(value, bool) and 0 < value < math.inf
            if not is_valid and not (optional and value is None):
                raise ValueError(f"{name} must be a positive finite number{' or None' * optional}, got {value!r}")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, Real) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.logit_clip is not None and self.backend not in ("auto", "reference"):
            raise ValueError(
                f"logit_clip runs written out: backend must be 'auto' or 'reference', got {self.backend!r}"
            )

    @property
    def head_dim(self) -> int:
        """d = hidden_size / num_heads."""
        return self.hidden_size // self.num_heads


def config_of(config: DistanceAttentionConfig | None, given: dict) -> DistanceAttentionConfig:
    """Return the config of a layer that was made by one or by its fields; raises `ValueError` for both."""
    if config is None:
        return DistanceAttentionConfig(**given)
    if not isinstance(config, DistanceAttentionConfig):
        raise ValueError(f"config must be a DistanceAttentionConfig, got {config!r}; give sizes by name: hidden_size=")
    if given:
        raise ValueError(f"a config and {sorted(given)[0]}= were given; set it in the config")
    return config


class ProjectedAttention(Monitored, AttentionHeads):
    """The native models' heads as a PyTorch layer; a subclass's `_attend` runs the attention between.

    layer_idx: this layer's place in a cache that several layers share.
    """

    gives_weights_on_request = True

    def __init__(
        self, hidden_size: int, num_heads: int, *, is_causal=False, bias=True, key_value_size=None, layer_idx: int = 0
    ):
        super().__init__(hidden_size, num_heads, layer_idx, bias, key_value_size)
        self.hidden_size, self.key_value_size = hidden_size, key_value_size or hidden_size
        self.is_causal = is_causal

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
        need_weights: bool = False,
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
            need_weights: PyTorch's name of output_attentions. key_padding_mask: (B, M) bool, True = padding, as PyTorch
                has it; in the place of attention_mask.

        Raises:
            ValueError: for tensors, masks and caches that do not fit.
        """
        self._check(hidden_states, key_value_states)
        output_attentions = output_attentions or need_weights
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
            key_value_size=config.key_value_size, layer_idx=layer_idx,
        )  # fmt: skip
        self.config = config
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
