"""Attention layers and positional encodings by name: distances, and whatever is in the registries."""

from dataclasses import fields, replace

import torch

from ..core.attention import without_autocast
from ..core.configuration_native import DEFAULT_METRICS, DistAttnConfig, spec_of
from ..core.derived_cache import keeping_layer
from ..core.encodings import POSITIONAL_ENCODINGS, PositionalEncoding
from ..core.inputs import ModuleCall
from ..core.mechanisms import MECHANISMS
from ..core.metrics import METRICS, get_metric
from ..core.native_attention import padding_alone, unknown_mechanism
from ..core.nystrom_heads import hybrid_inputs
from ..core.nystrom_hybrid import hybrid_attention
from ..core.parameters import parameters_for
from ..core.reference import reference_hybrid
from ..core.retrieval_heads import retrieve
from .attention_layers import DistanceBasedAttention, ProjectedAttention
from .layer_settings import DistanceAttentionConfig
from .names import ALIASES, canonical


class MechanismAttention(ProjectedAttention):
    """Multi-head attention by a mechanism of the registry, projected; called as `DistanceBasedAttention`.

    attention_mask: (B, M) bool or integers, or None: mechanisms know padding and causality, and no other mask.
    """

    def __init__(
        self,
        name: str,
        hidden_size: int,
        num_heads: int,
        *,
        is_causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        key_value_size: int | None = None,
        max_length: int | None = None,
        layer_idx: int = 0,
        **options,
    ):
        kind = MECHANISMS.get(name)
        kind.check_options(max_length=max_length, **options)
        if is_causal:
            kind.check(is_causal=True)
        # The checks of sizes and dropout are those of a distance layer.
        config = DistanceAttentionConfig(hidden_size, num_heads, key_value_size=key_value_size, dropout=dropout)
        super().__init__(
            hidden_size, num_heads, is_causal=is_causal, bias=bias, key_value_size=key_value_size, layer_idx=layer_idx
        )
        self.dropout = config.dropout
        self.mechanism = kind(num_heads, config.head_dim, max_length=max_length, **options)

    def _attend(self, query, key, value, mask, position_bias, is_cross, output_attentions):
        call = {"is_cross": is_cross, "position_bias": position_bias, "return_weights": output_attentions}
        return self._by_mechanism(query, key, value, mask, dropout_p=self.dropout if self.training else 0.0, **call)


class _SpecAttention(ProjectedAttention):
    """Multi-head attention by a mechanism of `AttentionSpec`, whose fields are the options; projected."""

    mechanism_name: str

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        is_causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        key_value_size: int | None = None,
        layer_idx: int = 0,
        metric: str | None = None,
        **options,
    ):
        name = self.mechanism_name
        spec = spec_of(name, get_metric(metric or DEFAULT_METRICS[name]).name, options)
        if spec.exact_below:
            raise ValueError(f"a Nyström layer has no exact_below, got {spec.exact_below}; models have it")
        config = DistanceAttentionConfig(hidden_size, num_heads, key_value_size=key_value_size, dropout=dropout)
        super().__init__(
            hidden_size, num_heads, is_causal=is_causal, bias=bias, key_value_size=key_value_size, layer_idx=layer_idx
        )
        self.dropout = config.dropout
        self.distattn = parameters_for(spec, num_heads, {"head_dim": config.head_dim})

    def _call(self, position_bias, is_cross: bool) -> ModuleCall:
        dropout_p = self.dropout if self.training else 0.0
        return ModuleCall(self.head_dim**-0.5, None, position_bias, self.is_causal, is_cross, dropout_p)


class NystromAttention(_SpecAttention):
    """Multi-head Nyström attention in linear time: exact nearby, landmarks beyond; projected.

    Options are those of `AttentionSpec` with mechanism "nystrom": num_landmarks, window_size, num_sinks, lam, ...
    attention_mask: (B, M) bool or integers, or None. past_key_values is refused: its keys would have to be sums, as in
    the native models' cache. output_attentions is quadratic.
    """

    mechanism_name = "nystrom"

    def _extend(self, cache, key, value):
        raise ValueError("a Nyström layer takes no past_key_values; the native models generate with it")

    def _attend(self, query, key, value, mask, position_bias, is_cross, output_attentions):
        keep = padding_alone("nystrom", mask, query, key.shape[2])
        if keep is None:
            keep = torch.ones(len(query), key.shape[2], dtype=torch.bool, device=query.device)
        call = self._call(position_bias, is_cross)
        with without_autocast(query.device.type):
            inputs = hybrid_inputs(self.distattn, query, key, value, keep, call, key.shape[2])
            output = hybrid_attention(inputs)[0].to(value.dtype)
            weights = reference_hybrid(inputs)[1].to(value.dtype) if output_attentions else None
        return output, weights


class RetrievalAttention(_SpecAttention):
    """Multi-head attention that reads sinks, window and the best few blocks of all other keys; projected.

    Options are those of `AttentionSpec` with mechanism "retrieval": window_size, num_sinks, block_size, num_blocks,
    min_weight, lam, ...; `metric`: "dot" unless another is given. attention_mask: (B, M) bool or integers, or None.
    past_key_values: a transformers cache that keeps every key. output_attentions is quadratic.
    """

    mechanism_name = "retrieval"

    def _extend(self, cache, key, value):
        keeping_layer(cache, self.layer_idx)
        return super()._extend(cache, key, value)

    def _attend(self, query, key, value, mask, position_bias, is_cross, output_attentions):
        keep = padding_alone("retrieval", mask, query, key.shape[2])
        call = replace(self._call(position_bias, is_cross), return_weights=output_attentions)
        layer = getattr(key, "distattn_layer", None)
        first_queries = None if layer is None else layer.first_queries_for_call()
        return retrieve(self.distattn, query, key, value, keep, call, layer, first_queries)


_OF_SPECS = {kind.mechanism_name: kind for kind in (NystromAttention, RetrievalAttention)}


def create_distance_attention(
    hidden_size: int | DistanceAttentionConfig = 768,
    num_heads: int | None = None,
    metric: str | None = None,
    *,
    layer_idx: int = 0,
    **options,
) -> DistanceBasedAttention:
    """Create a `DistanceBasedAttention` by a `DistanceAttentionConfig`, or by its fields (see there, and for aliases).

    Raises:
        ValueError: for a field that does not exist or a value that is not allowed.
    """
    positional = {"num_heads": num_heads, "metric": metric}
    options = {name: value for name, value in positional.items() if value is not None} | options
    if isinstance(hidden_size, DistanceAttentionConfig):
        return DistanceBasedAttention(hidden_size, layer_idx, **options)
    known = [field.name for field in fields(DistanceAttentionConfig)]
    options = canonical(options, known, "a distance-attention layer")
    return DistanceBasedAttention(layer_idx=layer_idx, **{"hidden_size": hidden_size, **options})


def _named(name: str | None, options: dict, num_heads: int, words: dict[str, str]) -> dict:
    """Return the arguments of a factory's `create`, under its own names; sizes have defaults."""
    if twice := [word for word, own in words.items() if word in options and own in options]:
        raise ValueError(f"{twice[0]!r} is another name of {words[twice[0]]!r}, which is given, too")
    options = {words.get(word, word): value for word, value in options.items()}
    given = {"hidden_size": 768, "num_heads": num_heads}
    options = canonical(options, [*options.keys() - ALIASES, *ALIASES.values()], "a factory")
    if name is not None and "name" in options:
        raise ValueError(f"a factory got two names of what to create, {name!r} and {options['name']!r}")
    given |= options if name is None else {**options, "name": name}
    if "name" not in given:
        raise ValueError("a factory needs the name of what to create: name=, attention_type= or encoding_type=")
    return given


_OF_RELATIVE = {
    **dict.fromkeys(("max_relative_position", "max_relative_distance"), "relative_attention_max_distance"),
    "num_buckets": "relative_attention_num_buckets",
}


class AttentionFactory:
    """Attention layers by the name of a metric or mechanism."""

    @staticmethod
    def create(name: str, hidden_size: int, num_heads: int, **options) -> ProjectedAttention:
        """Create a layer (B, N, E) -> (B, N, E) by a metric ("l2", "cosine", "dot", ...) or mechanism ("local", ...).

        Options: those of `DistanceAttentionConfig` for a metric, else of `MechanismAttention` and the mechanism, or of
        `NystromAttention` or `RetrievalAttention`.

        Raises:
            ValueError: for an unknown name, listing what exists, or an option that the layer does not have.
        """
        if isinstance(name, str) and name.lower() in _OF_SPECS:
            return _OF_SPECS[name.lower()](hidden_size, num_heads, **options)
        if name in METRICS:
            return create_distance_attention(hidden_size, num_heads, name, **options)
        if name in MECHANISMS:
            return MechanismAttention(name, hidden_size, num_heads, **options)
        raise unknown_mechanism("attention", name)

    @classmethod
    def create_attention(cls, name: str | None = None, **options) -> ProjectedAttention:
        """Create as `create` does, by keywords and by their other names: attention_type, d_model, ..."""
        return cls.create(**_named(name, options, 12, {"max_relative_position": "max_distance"}))

    @staticmethod
    def names() -> list[str]:
        """Return the names that `create` knows."""
        return [*METRICS, *_OF_SPECS, *MECHANISMS]


class PositionalEncodingFactory:
    """Positional encodings by name."""

    # Fields of the native config that belong to one encoding.
    options = ("rope_parameters", "relative_attention_num_buckets", "relative_attention_max_distance")

    @classmethod
    def create(
        cls,
        name: str,
        hidden_size: int,
        num_heads: int,
        *,
        max_length: int = 2048,
        is_causal: bool = False,
        dropout: float = 0.0,
        **options,
    ) -> PositionalEncoding:
        """Create an encoding for layers of E = hidden_size and H = num_heads; use the method that it implements.

        `embed(x, position_ids)` adds to embeddings; `rotation(x, position_ids)` gives a layer's `position_embeddings`;
        `bias(num_queries, num_keys, past)` gives a layer's `position_bias`. Called, it adds to or turns whole sequences
        (B, N, E). max_length: of "learned", and of `encoding_matrix`. dropout: of what a call gives, in training.

        Raises:
            ValueError: for an unknown name, an option that does not exist, or an encoding impossible at these sizes.
        """
        name = POSITIONAL_ENCODINGS.canonical(name)
        unknown = sorted(set(options) - set(cls.options))
        if unknown:
            raise ValueError(f"an encoding has no option {unknown[0]!r}; the options are: {', '.join(cls.options)}")
        config = DistAttnConfig(
            hidden_size=hidden_size, num_attention_heads=num_heads, max_position_embeddings=max_length,
            positional_encoding=name, is_decoder=is_causal, **options,
        )  # fmt: skip
        kind = POSITIONAL_ENCODINGS.get(name)
        kind.check(config)
        encoding = kind.from_config(config)
        encoding.dropout_p = DistanceAttentionConfig(dropout=dropout).dropout
        if encoding.is_bias and dropout:
            raise ValueError(f"encoding {name!r} adds to the logits, where there is nothing to drop; got {dropout=}")
        return encoding

    @classmethod
    def create_positional_encoding(cls, name: str | None = None, **options) -> PositionalEncoding:
        """Create as `create` does, by keywords and by their other names: encoding_type, d_model, max_len, ..."""
        return cls.create(**_named(name, options, 1, _OF_RELATIVE))

    @staticmethod
    def names() -> list[str]:
        """Return the names that `create` knows."""
        return list(POSITIONAL_ENCODINGS)
