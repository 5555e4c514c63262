"""What the models of the native family share: layers, initial weights, attention functions, saving."""

import functools
import inspect
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import TransformersKwargs

from .attention_spec import OPTIONS
from .compatibility import CACHE_NAME, check_transformers, one_cache
from .configuration_native import DistAttnConfig
from .encodings import PositionalEncoding
from .families import Heads, KeepsLoadedWeights, Monitored, auto_map_for, register_models
from .inputs import refuse_where
from .interface import IMPLEMENTATIONS, say_what_sdpa_means
from .mechanism_base import Mechanism
from .native_attention import DistAttnAttention, check_choices, resolve_native_implementation
from .nystrom_cache import RefusesAssistance
from .parameters import HeadParameters, with_options


def make_norm(config: DistAttnConfig) -> nn.Module:
    """Return a normalisation layer of the config's kind."""
    kind = {"layer_norm": nn.LayerNorm, "rms_norm": LlamaRMSNorm}[config.norm_type]
    return kind(config.hidden_size, eps=config.norm_eps)


class DistAttnMLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x))·up(x)) where the config says so (Shazeer, "GLU Variants", 2020)."""

    def __init__(self, config: DistAttnConfig):
        super().__init__()
        size, intermediate_size, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, intermediate_size, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        up = self.up_proj(hidden_states)
        intermediate = self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(hidden_states)) * up
        return self.down_proj(intermediate)


class DistAttnLayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention where there is an encoder, and the feed-forward layer, each with a residual."""

    def __init__(self, config: DistAttnConfig, layer_idx: int, has_cross_attention: bool = False):
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.self_attn, self.self_attn_norm = DistAttnAttention(config, layer_idx), make_norm(config)
        if has_cross_attention:
            self.cross_attn = DistAttnAttention(config, layer_idx, is_cross=True)
            self.cross_attn_norm = make_norm(config)
        self.mlp, self.mlp_norm = DistAttnMLP(config), make_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values=None,
        cache=None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> Tensor:
        """Map hidden states (B, N, D) -> (B, N, D). What gradients flow through is positional (see transformers)."""
        # Under transformers' own name, by which gradient checkpointing and offloading know it.
        kwargs[CACHE_NAME] = one_cache(past_key_values, cache)
        hidden_states = self._add(
            self.self_attn,
            self.self_attn_norm,
            hidden_states,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            position_bias=position_bias,
            **kwargs,
        )
        if encoder_hidden_states is not None:
            hidden_states = self._add(
                self.cross_attn,
                self.cross_attn_norm,
                hidden_states,
                attention_mask=encoder_attention_mask,
                key_value_states=encoder_hidden_states,
                **kwargs,
            )
        return self._add(self.mlp, self.mlp_norm, hidden_states)

    def _add(self, part: nn.Module, norm: nn.Module, hidden_states: Tensor, **arguments) -> Tensor:
        """Return x + f(norm(x)), or norm(x + f(x))."""
        output = part(norm(hidden_states) if self.pre_norm else hidden_states, **arguments)
        total = hidden_states + self.dropout(output[0] if isinstance(output, tuple) else output)
        return total if self.pre_norm else norm(total)


class CallArguments(TransformersKwargs, total=False):
    """Keyword arguments beside those a forward names: of losses, output classes, generation and tokenizers."""

    ignore_index: int
    shift_labels: Tensor
    return_dict: bool
    cache_position: Tensor
    token_type_ids: Tensor
    # `generate` hands its own on to every call.
    tokenizer: Any
    assistant_tokenizer: Any
    global_attention_mask: Tensor


# Of these, (B, N) tensors that a data set may have a column of.
COLUMNS = ("token_type_ids", "global_attention_mask")
_CALL_NAMES = {*inspect.signature(DistAttnLayer.forward).parameters, *CallArguments.__annotations__}
# Attention functions that take no arguments of their own; one that somebody registered may.
_WITHOUT_ARGUMENTS = (None, "eager", "sdpa", "flex_attention", *IMPLEMENTATIONS)


def check_arguments(model: "DistAttnPreTrainedModel", arguments: dict) -> None:
    """Raise `ValueError` for an argument of a call that would have no effect, or not the one it says."""
    given = {name: value for name, value in arguments.items() if value is not None}
    unknown = [name for name in given if name not in _CALL_NAMES]
    if unknown and model.config._attn_implementation in _WITHOUT_ARGUMENTS:
        known = {*_CALL_NAMES, *inspect.signature(model.forward).parameters, "labels"}
        suggestions = get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {suggestions[0]!r}?" if suggestions else ", which would do nothing"
        raise ValueError(f"{type(model).__name__} takes no argument {unknown[0]!r}{hint}")
    config, is_causal = model.config, given.get("is_causal")
    # transformers makes the mask that the flag asks for where the model is a decoder; all its attention gets the flag.
    if is_causal is not None and not (
        config.is_decoder and not model._has_cross_attention
        if is_causal
        else not config.is_decoder or config.mechanism in ("dot", "distance")
    ):
        raise ValueError(
            f"is_causal={is_causal!r} cannot be honoured here, with is_decoder={config.is_decoder} and mechanism="
            f"{config.mechanism!r} in the config; make a model with the is_decoder you want"
        )
    segments = given.get("token_type_ids")
    if isinstance(segments, Tensor):
        refuse_where(
            segments.any(),
            "token_type_ids mark a second segment, for which this model has no vectors: give its config "
            "type_vocab_size=2, or leave them out (return_token_type_ids=False of the tokenizer) and mark the border "
            "by a token of its own",
        )


# {model type: its head classes}, filled by the modelling files.
NATIVE_HEADS: dict[str, Heads] = {}


class DistAttnPreTrainedModel(KeepsLoadedWeights, RefusesAssistance, Monitored, PreTrainedModel):
    """Base class of the native family."""

    config_class = DistAttnConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DistAttnLayer"]
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # transformers reads the source of each class's file to decide this, and ours has its attention in another one.
    _can_set_attn_implementation_cached_value = True
    _has_cross_attention = False

    def __init__(self, config, *args, **kwargs):
        check_transformers()
        check_choices(config)
        if type(config) not in AutoModel._model_mapping and type(config).__name__ == self.config_class.__name__:
            # A checkpoint's own code: transformers imports its config file and its modelling file as two packages, and
            # its heads ask AutoModel for the base model of a config.
            register_models(type(config), NATIVE_HEADS[config.model_type])
        super().__init__(config, *args, **kwargs)

    def post_init(self):
        # λ and landmarks stay in float32 when the model is loaded in half precision.
        if any(isinstance(module, HeadParameters) for module in self.modules()):
            self._keep_in_fp32_modules_strict = {"distattn"}
        # Its cache cannot be cropped, which transformers checks before assisted generation.
        self._is_stateful = any(
            module.is_causal and getattr(module, "distattn", None) is not None and module.distattn.is_nystrom
            for module in self.attention_modules().values()
        )
        super().post_init()

    def get_correct_attn_implementation(self, requested_attention, is_init_check: bool = False):
        """Check an implementation as transformers does, after ours: own mechanisms run by own functions."""
        requested = resolve_native_implementation(requested_attention, self.config, self._has_cross_attention)
        if not is_init_check and requested in IMPLEMENTATIONS:
            say_what_sdpa_means(requested_attention, self)
        return super().get_correct_attn_implementation(requested, is_init_check)

    def init_continuous_batching(self, *args, **kwargs):
        """Raise `ValueError`: transformers would log an error of its thread and return empty texts."""
        raise ValueError(f"continuous batching (generate_batch) is not implemented for {type(self).__name__}")

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, HeadParameters | Mechanism | PositionalEncoding):
            module.reset_parameters()

    def attention_modules(self) -> dict[str, nn.Module]:
        """Return all attention modules by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, DistAttnAttention)}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        # Now, and not at the first call: assisted generation tells the layers before to record what it may take back.
        cache = model_kwargs.get(CACHE_NAME)
        cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if cache is not None:
            for module in self.attention_modules().values():
                module.keep_less(cache)
            if generation_config.is_assistant:
                cache.activate_past_recording()

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False: transformers would initialise custom code only in part (see `KeepsLoadedWeights`)."""
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load as the base class does; options of `set_attention_options` are taken, too (`min_weight=0.01`)."""
        chosen = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        result = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if chosen:
            (result[0] if isinstance(result, tuple) else result).set_attention_options(**chosen)
        return result

    def set_attention_options(self, **options) -> None:
        """Set options of "distance", "nystrom" and "retrieval" that no weight depends on, in modules and config.

        They are those of converted models (`OPTIONS`: min_weight, num_blocks, exact_below, backend, ...). Options of
        the other mechanisms are the config's: `from_pretrained(..., mechanism_options={...})`. Raises `ValueError`,
        before anything is changed.
        """
        states = [m.distattn for m in self.attention_modules().values() if getattr(m, "distattn", None) is not None]
        groups = [group for state in states for group in state.groups]
        if not groups and options:
            own = {**self.config.mechanism_options, **options}
            raise ValueError(
                f"mechanism {self.config.mechanism!r} has no options to set on a model: load it with "
                f"from_pretrained(..., mechanism_options={own!r})"
            )
        with_options([group.spec for group in groups], options)
        for group in groups:
            group.spec = with_options([group.spec], {n: v for n, v in options.items() if group.spec.has_option(n)})[0]
        for part in self.modules():
            if isinstance(part, DistAttnPreTrainedModel):
                _set_options(part.config, options)

    def save_pretrained(self, save_directory, *args, **kwargs):
        self.config.auto_map = auto_map_for(self, NATIVE_HEADS[self.config.model_type])
        return super().save_pretrained(save_directory, *args, **kwargs)


def _naming_columns(forward):
    """Return a forward with `COLUMNS` in its signature, where Trainer looks which columns a model reads."""

    @functools.wraps(forward)
    def named(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    own = inspect.signature(forward)
    columns = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in COLUMNS]
    *parameters, keywords = own.parameters.values()
    named.__signature__ = own.replace(parameters=[*parameters, *columns, keywords])
    return named


def _set_options(config: DistAttnConfig, options: dict) -> None:
    """Put options of the mechanisms that have them into a config."""
    for field, mechanism in (
        ("mechanism_options", config.mechanism), ("cross_options", getattr(config, "cross_mechanism", None)),
    ):  # fmt: skip
        if own := {name: value for name, value in options.items() if mechanism in OPTIONS[name]}:
            setattr(config, field, {**(getattr(config, field) or {}), **own})


def register_heads(config_class: type[DistAttnConfig], **kinds: type[PreTrainedModel]) -> None:
    """Register head classes of the native family by the name of their Auto class."""
    for auto_name, kind in kinds.items():
        kind._auto_class, kind.forward = auto_name, _naming_columns(kind.forward)
    NATIVE_HEADS[config_class.model_type] = {auto_name: (kind,) for auto_name, kind in kinds.items()}
    register_models(config_class, NATIVE_HEADS[config_class.model_type])
