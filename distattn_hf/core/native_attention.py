"""The native family's attention module, whose mechanism the config names, and checks of which choices fit."""

from functools import partial

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.utils import logging

from .compatibility import one_cache
from .configuration_native import DEFAULT_METRICS, SPEC_MECHANISMS, DistAttnConfig, config_checks, spec_of
from .constant_cache import RecurrentLayer, RingLayer, layer_at
from .derived_cache import use_derived_cache
from .documents import Documents
from .encodings import POSITIONAL_ENCODINGS
from .inputs import split_mask
from .interface import IMPLEMENTATION, IMPLEMENTATIONS, resolve_implementation, weights_requested
from .mechanism_windows import before_ring
from .mechanisms import MECHANISMS
from .metrics import METRICS, get_metric
from .nystrom_cache import use_nystrom_cache
from .parameters import DistanceAttentionState
from .registry import nearest

logger = logging.get_logger(__name__)

# Names that mean several mechanisms.
_SEVERAL = {
    "sparse": "which may be 'nystrom', with num_landmarks, 'landmark' or 'retrieval', which read the best blocks, "
    "'strided', 'local' or 'bigbird', whose pattern is fixed",
    "block_sparse": "which may be 'bigbird', with blocks of a window, random and global ones; a mask of your own goes "
    "to 'dot' or a metric as attention_mask (B, H, N, M), or into a class by register_mechanism",
    **dict.fromkeys(
        ("hierarchical", "pyramid", "multi_resolution"),
        "which is 'retrieval': near keys one by one, of far blocks the num_blocks best, and of the others one key "
        "and value each; num_blocks=0 leaves two fixed levels",
    ),
    "flash": "which is 'dot' with attn_implementation='flash_attention_2'",
    "retention": "which sums with decay; positional_encoding='decay' has its rates, for mechanisms that take a bias",
    "topk": "which is 'retrieval' with window_size=1, num_sinks=0, block_size=1, far_field=False and num_blocks=k",
}
# Attention functions that return true weights.
_WITH_WEIGHTS = ("eager", "sdpa", *IMPLEMENTATIONS)


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, position_bias=None, **kwargs
) -> tuple[Tensor, Tensor]:
    """Run dot-product attention written out: ((B, N, H, d), weights (B, H, N, M)); masks and biases are added."""
    key, value = (repeat_kv(tensor, module.num_key_value_groups) for tensor in (key, value))
    logits = query @ key.mT * scaling
    for addend in (position_bias, attention_mask):
        if addend is not None:
            logits = logits + addend
    weights = logits.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    output = nn.functional.dropout(weights, p=dropout, training=module.training) @ value
    return output.transpose(1, 2).contiguous(), weights


def attention_choice(config: DistAttnConfig, is_cross: bool) -> tuple[str, str | None, dict]:
    """Return (mechanism, metric, options) of a config's self- or cross-attention."""
    return config.cross_choice() if is_cross else (config.mechanism, config.metric, config.mechanism_options)


def options_of_layer(options: dict, layer_idx: int) -> dict:
    """Return a mechanism's options in one layer: those that are lists have a value for each."""
    return {name: value[layer_idx] if isinstance(value, list | tuple) else value for name, value in options.items()}


def unknown_mechanism(what: str, name: str) -> ValueError:
    """Return an error with the names that a mechanism may have, and what a name of several may mean."""
    names = dict.fromkeys(("dot", *SPEC_MECHANISMS, *MECHANISMS))
    hint = _SEVERAL.get(name.lower().replace("top_k", "topk").replace("-", "_") if isinstance(name, str) else name)
    meant = "" if hint else nearest(name, [*names, *METRICS.names()])
    return ValueError(
        f"unknown {what} {name!r}{f' ({hint})' if hint else ''}; {meant}expected one of {', '.join(names)}; or a "
        f"metric: {METRICS.describe()}"
    )


def check_choices(config: DistAttnConfig) -> None:
    """Bring names of mechanisms and metrics into canonical form; raise `ValueError` for choices that do not fit.

    A metric given as mechanism becomes mechanism "distance" with that metric.
    """
    config.mechanism, config.metric = _canonical("mechanism", config.mechanism, config.metric)
    config.positional_encoding = POSITIONAL_ENCODINGS.canonical(config.positional_encoding)
    encoding = POSITIONAL_ENCODINGS.get(config.positional_encoding)
    encoding.check(config)
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"unknown hidden_act {config.hidden_act!r}; expected one of {', '.join(ACT2FN)}")
    forms = [(False, config.is_decoder)]
    if config.is_encoder_decoder:
        if config.cross_mechanism is not None:
            chosen = _canonical("cross_mechanism", config.cross_mechanism, config.cross_metric)
            config.cross_mechanism, config.cross_metric = chosen
        forms = [(False, False), (False, True), (True, False)]
    for is_cross, is_causal in forms:
        _check_form(config, encoding, is_cross, is_causal)


def _canonical(field: str, mechanism: str, metric: str | None) -> tuple[str, str | None]:
    """Return (mechanism, metric) in canonical names."""
    name = mechanism.lower()
    if name in METRICS and get_metric(name).name == "dot":
        name = "dot"
    if name != "dot" and name not in SPEC_MECHANISMS:
        if name in MECHANISMS:
            name = MECHANISMS.canonical(name)
        elif name in METRICS:
            if metric is not None and get_metric(metric) is not get_metric(name):
                raise ValueError(f"{field}={mechanism!r} is a metric, and so is the other one given, {metric!r}")
            name, metric = "distance", name
        else:
            raise unknown_mechanism(field, mechanism)
    if name in SPEC_MECHANISMS:
        metric = get_metric(metric or DEFAULT_METRICS[name]).name
    return name, metric


def _check_form(config, encoding, is_cross: bool, is_causal: bool) -> None:
    """Raise `ValueError` where one kind of attention is not possible with this mechanism and encoding."""
    mechanism, metric, options = attention_choice(config, is_cross)
    has_bias = encoding.is_bias and not is_cross
    try:
        if mechanism == "dot":
            if options:
                raise ValueError(f"mechanism 'dot' has no option {sorted(options)[0]!r}")
        elif mechanism in SPEC_MECHANISMS:
            spec = spec_of(mechanism, metric, options)
            get_metric(metric).validate(spec.p)
            if config.positional_encoding == "rotary" and not is_cross and not get_metric(metric).rotation_invariant:
                logger.warning_once(
                    f"positional_encoding='rotary' rotates query and key; {metric} is not invariant under rotation, so "
                    "its attention depends on absolute positions too"
                )
            if mechanism == "nystrom" and has_bias:
                _check_nystrom_bias(config, spec.window_size)
        else:
            kind = MECHANISMS.get(mechanism)
            if mechanism == "relative" and config.value_head_dim not in (None, config.head_dim):
                raise ValueError(
                    f"value_head_dim must be None or {config.head_dim}, the size of the embeddings that are added to "
                    f"values, got {config.value_head_dim}"
                )
            for name, value in options.items():
                depths = {config.num_hidden_layers, getattr(config, "decoder_layers", config.num_hidden_layers)}
                if isinstance(value, list | tuple) and depths != {len(value)}:
                    raise ValueError(
                        f"{name} of mechanism {mechanism!r} must be one value, or a list of one for each of "
                        f"{' and '.join(map(str, sorted(depths)))} layers, got {value!r}"
                    )
            for layer_idx in range(config.num_hidden_layers):
                kind.check_options(max_length=config.max_position_embeddings, **options_of_layer(options, layer_idx))
            kind.check(is_causal=is_causal, is_cross=is_cross, has_bias=has_bias)
    except ValueError as error:
        form = "cross-attention" if is_cross else "causal attention" if is_causal else "bidirectional attention"
        hint = "; cross_mechanism can be another one" if is_cross and config.cross_mechanism is None else ""
        raise ValueError(
            f"mechanism={mechanism!r} with positional_encoding={config.positional_encoding!r} in {form}: {error}{hint}"
        ) from None


def _check_nystrom_bias(config, window_size: int) -> None:
    if config.positional_encoding != "relative":
        raise ValueError(
            "Nyström attention takes only a position bias that is constant beyond its window: positional_encoding "
            "'relative'"
        )
    if window_size < config.relative_attention_max_distance:
        raise ValueError(
            f"window_size must be at least relative_attention_max_distance={config.relative_attention_max_distance}, "
            f"from which on the bias is constant; got {window_size}"
        )


config_checks.append(check_choices)


def resolve_native_implementation(requested, config: DistAttnConfig, crosses: bool):
    """Return transformers' attention function for this family; raises `ValueError` for one that is not possible.

    crosses: the model has cross-attention, too.
    """
    mechanisms = {attention_choice(config, is_cross)[0] for is_cross in ((False, True) if crosses else (False,))}
    if mechanisms != {"dot"}:
        return resolve_implementation(requested, nystrom=bool(mechanisms - {"dot", "distance"}))
    if requested in IMPLEMENTATIONS:
        return "eager" if "eager" in requested else "sdpa"
    takes_bias = requested in (None, "eager", "sdpa", "flex_attention")
    known = isinstance(requested, str) and ("flash" in requested or requested in ALL_ATTENTION_FUNCTIONS.valid_keys())
    if known and not takes_bias and POSITIONAL_ENCODINGS.get(config.positional_encoding).is_bias:
        raise ValueError(
            f"attn_implementation={requested!r} takes no position bias, which positional_encoding="
            f"{config.positional_encoding!r} is; use 'sdpa', 'eager' or 'flex_attention'"
        )
    return requested


class AttentionHeads(nn.Module):
    """Projections to heads and back, rotary positions, and a cache of keys and values; subclasses put attention
    between.

    The native models' attention is one, and so is each of the package's layers for PyTorch.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, layer_idx: int, bias: bool, key_value_size=None, key_value_heads=None,
        value_head_dim=None,
    ):  # fmt: skip
        super().__init__()
        self.mechanism = None
        self.num_heads, self.head_dim, self.layer_idx = num_heads, hidden_size // num_heads, layer_idx
        self.value_head_dim = value_head_dim or self.head_dim
        self.num_key_value_groups = num_heads // (key_value_heads or num_heads)
        inputs, kv_heads = key_value_size or hidden_size, num_heads // self.num_key_value_groups
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.k_proj = nn.Linear(inputs, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(inputs, kv_heads * self.value_head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.value_head_dim, hidden_size, bias=bias)

    def _project(self, hidden_states, key_value_states, position_embeddings, cache) -> tuple[Tensor, Tensor, Tensor]:
        """Return query (B, H, N, d), and key and value (B, H_kv, M, d) of all tokens so far or of another sequence."""
        query = self._heads(self.q_proj, hidden_states)
        cross = isinstance(cache, EncoderDecoderCache) and key_value_states is not None
        if cross and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return query, layer.keys, layer.values
        key_value_inputs = hidden_states if key_value_states is None else key_value_states
        key = self._heads(self.k_proj, key_value_inputs)
        value = self._heads(self.v_proj, key_value_inputs, self.value_head_dim)
        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cross:
            cache.is_updated[self.layer_idx] = True
            return query, *cache.cross_attention_cache.update(key, value, self.layer_idx)
        if cache is not None:
            self_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            key, value = self._extend(self_cache, key, value)
        return query, key, value

    def _heads(self, projection: nn.Linear, states: Tensor, size: int | None = None) -> Tensor:
        """Project states to (B, heads, length, size); None: d."""
        return projection(states).unflatten(-1, (-1, size or self.head_dim)).transpose(1, 2)

    def _extend(self, cache: Cache, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add to the cache and return keys and values of all tokens so far, or of those that the mechanism needs."""
        self.keep_less(cache)
        return cache.update(key, value, self.layer_idx)

    def keep_less(self, cache: Cache) -> None:
        """Give a `DynamicCache` the layer that the mechanism needs; other kinds keep every key, as they say."""
        if self.mechanism is None or not self.is_causal or getattr(cache, "offloading", False):
            return
        if type(layer := layer_at(cache, self.layer_idx)) is DynamicLayer:
            cache.layers[self.layer_idx] = self.mechanism.cache_layer(layer)

    def _by_mechanism(self, query, key, value, mask, **call) -> tuple[Tensor, Tensor | None]:
        """Return (output (B, H, N, d), weights or None) of the module's mechanism; `call` as its forward takes it."""
        layer = getattr(key, "distattn_layer", None)
        if isinstance(layer, RecurrentLayer):
            call["memory"] = layer
        elif isinstance(layer, RingLayer):
            # Mask and bias speak of the keys of the layer that keeps most, beside global tokens of the whole text.
            num_keys = key.shape[2]
            if (marked := call.get("is_global")) is not None:
                if (found := layer.keep_global(marked, key, value, query.shape[2])) is not None:
                    keep = padding_alone(self.mechanism.name, mask, query, marked.shape[1])
                    call["beyond"] = before_ring(*found, keep, call["position_bias"], self.num_key_value_groups)
                call["is_global"] = marked[:, -num_keys:]
            mask = mask if mask is None else mask[..., -num_keys:]
            bias = call["position_bias"]
            call["position_bias"] = bias if bias is None else bias[..., -num_keys:]
        elif mask is not None and mask.shape[-1] < key.shape[2] and mask.dim() == 4:
            # A static cache: the places behind are not filled yet.
            key, value = (tensor[:, :, : mask.shape[-1]] for tensor in (key, value))
            if call["position_bias"] is not None:
                call["position_bias"] = call["position_bias"][..., : mask.shape[-1]]
        keep = padding_alone(self.mechanism.name, mask, query, key.shape[2])
        key, value = (repeat_kv(tensor, self.num_key_value_groups) for tensor in (key, value))
        return self.mechanism(query, key, value, keep=keep, is_causal=self.is_causal, **call)


def padding_alone(mechanism: str, mask: Tensor | None, query: Tensor, num_keys: int) -> Tensor | None:
    """Return (B, M) bool from a mask of padding only; raises `ValueError` for any other mask."""
    if mask is None:
        return None
    keep, bias = split_mask(mask, (*query.shape[:3], num_keys))
    if bias is not None or keep.shape[1:3] != (1, 1):
        raise ValueError(
            f"mechanism {mechanism!r} takes a padding mask (B, M), got {mask.dtype} of shape {tuple(mask.shape)}; "
            "padding is bool or integers"
        )
    return keep[:, 0, 0].expand(len(query), num_keys)


class DistAttnAttention(AttentionHeads):
    """Multi-head attention of hidden states (B, N, D), to themselves or to another sequence (B, M, D)."""

    def __init__(self, config: DistAttnConfig, layer_idx: int, is_cross: bool = False):
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        super().__init__(
            config.hidden_size, heads, layer_idx, config.attention_bias, key_value_heads=kv_heads,
            value_head_dim=config.value_head_dim,
        )  # fmt: skip
        self.config = config
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_cross_attention = is_cross
        self.is_causal = config.is_decoder and not is_cross
        mechanism, metric, options = attention_choice(config, is_cross)
        if mechanism in SPEC_MECHANISMS:
            entry = {"num_heads": self.num_heads, "head_dim": self.head_dim, "kind": "cross" if is_cross else "self"}
            entry["groups"] = [{"spec": 0, "heads": None}]
            self.distattn = DistanceAttentionState([spec_of(mechanism, metric, options)], entry)
            self.distattn.has_teacher = False
            if mechanism == "nystrom" and self.is_causal:
                self.register_forward_pre_hook(use_nystrom_cache, with_kwargs=True)
            if self.distattn.derives_from_keys and self.is_causal:
                self.register_forward_pre_hook(use_derived_cache, with_kwargs=True)
        elif mechanism != "dot":
            length = config.max_position_embeddings
            own = options_of_layer(options, layer_idx)
            self.mechanism = MECHANISMS.get(mechanism)(self.num_heads, self.head_dim, max_length=length, **own)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Documents | None = None,
        key_value_states: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output (B, N, D), weights (B, H, N, M) where they are asked for)."""
        cache = one_cache(past_key_values, cache)
        heads = self._project(hidden_states, key_value_states, position_embeddings, cache)
        if isinstance(attention_mask, Documents):
            output, weights = attention_mask.apart(partial(self._attend_part, kwargs), *heads, position_bias)
        else:
            output, weights = self._attend(*heads, attention_mask, position_bias, kwargs)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def _attend_part(self, kwargs, number: int, *call) -> tuple[Tensor, Tensor | None]:
        """Return `_attend` of a batch of documents, of which several make up one call of the module."""
        if self.mechanism is None:
            return self._attend(*call, kwargs)
        self.mechanism.holds_still = number > 0
        try:
            return self._attend(*call, kwargs)
        finally:
            self.mechanism.holds_still = False

    def _attend(self, query, key, value, mask, position_bias, kwargs) -> tuple[Tensor, Tensor | None]:
        """Return ((B, N, H, d), weights or None) by the mechanism's module or by transformers' attention interface."""
        dropout_p = self.attention_dropout if self.training else 0.0
        implementation, return_weights = self.config._attn_implementation, weights_requested(kwargs)
        uses_own_attention = self.mechanism is not None or hasattr(self, "distattn")
        if uses_own_attention and implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"config._attn_implementation was set to {implementation!r}, which would run dot-product attention in "
                "place of the config's mechanism; call set_attn_implementation('sdpa' or 'eager') on the model"
            )
        if self.mechanism is not None:
            call = {"is_cross": self.is_cross_attention, "position_bias": position_bias, "dropout_p": dropout_p}
            if (marked := kwargs.get("global_attention_mask")) is not None:
                call["is_global"] = marked
            output, weights = self._by_mechanism(query, key, value, mask, return_weights=return_weights, **call)
            return output.transpose(1, 2), weights
        if return_weights and implementation not in _WITH_WEIGHTS:
            raise ValueError(
                f"output_attentions: attn_implementation={implementation!r} returns no weights; use 'sdpa' or 'eager'"
            )
        if return_weights and implementation == "sdpa":
            implementation = IMPLEMENTATION  # the same attention, written out where weights are asked for
        if position_bias is not None:
            kwargs = {**kwargs, "position_bias": position_bias}
            if isinstance(position_bias, Tensor):
                kwargs["position_bias"] = position_bias.to(query.dtype)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        return attend(self, query, key, value, mask, dropout=dropout_p, scaling=self.scaling, **kwargs)
