"""Configs of the native family, which name attention mechanism, metric and positional encoding."""

import copy
import math
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import logging

from .attention_spec import AttentionSpec
from .configuration_distattn import OwnAttentionMixin

logger = logging.get_logger(__name__)

NORM_POSITIONS = ("pre", "post")
NORM_TYPES = ("layer_norm", "rms_norm")
# Mechanisms that are an `AttentionSpec`; "dot" is transformers' own attention, all others are registered modules.
SPEC_MECHANISMS = ("distance", "nystrom", "retrieval")
DEFAULT_METRICS = {"distance": "l2", "nystrom": "sqeuclidean", "retrieval": "dot"}
# Choices that have a field of their own, or that the native family has no use for.
_NOT_OPTIONS = ("metric", "mechanism", "layers", "heads", "attention", "landmarks", "beyond")
# What transformers' own configs call the same things, and what the layers for PyTorch call a metric.
_ALIASES = {
    **dict.fromkeys(("d_model", "n_embd"), "hidden_size"),
    "d_v": "value_head_dim",
    **dict.fromkeys(("d_ff", "ffn_dim", "n_inner"), "intermediate_size"),
    **dict.fromkeys(("num_layers", "n_layer", "n_layers"), "num_hidden_layers"),
    **dict.fromkeys(("num_heads", "n_head", "n_heads"), "num_attention_heads"),
    **dict.fromkeys(("activation_function", "hidden_activation"), "hidden_act"),
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps"), "norm_eps"),
    "n_positions": "max_position_embeddings",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "init_std": "initializer_range",
    "distance_type": "metric",
    "attention_type": "mechanism",
    "positional_encoding_type": "positional_encoding",
    "positional_encoding_max_len": "max_position_embeddings",
    "positional_encoding_max_relative_position": "relative_attention_max_distance",
    "use_causal_mask": "is_decoder",
}
# What papers and the layers for PyTorch call options of a mechanism.
_OPTION_ALIASES = {
    "lambda_param": "lam",
    "p_norm": "p",
    "use_learnable_lambda": "learnable_lambda",
    "attention_window_size": "window_size",
    "attention_num_landmarks": "num_landmarks",
    "attention_max_relative_position": "max_distance",
}
# What transformers takes in every config, beside fields, settable properties and private names.
_OF_TRANSFORMERS = {
    *("model_type", "auto_map", "quantization_config", "attn_implementation", "experts_implementation", "rope_theta"),
    *("cls_token_id", "sep_token_id", "mask_token_id", "unk_token_id", "tokenizer_class", "loss_type"),
}
# What Llama's rotary embedding, which turns whole heads by one position, reads of rope_parameters.
_ROPE = sorted({*RopeParameters.__annotations__, "type"} - {"partial_rotary_factor", "mrope_section"})
_ELSEWHERE = {
    "head_dim": "it is hidden_size / num_attention_heads",
    "use_mixed_precision": "train with bf16=True of TrainingArguments",
    "enable_performance_monitoring": "call model.enable_performance_monitoring()",
    "log_attention_weights": "give Trainer AttentionLoggingCallback(), or call the model with output_attentions=True",
    "return_attention_weights": "call the model with output_attentions=True",
    "sparsity_ratio": "mechanism='retrieval' reads the num_blocks best blocks, or those with min_weight",
    "use_padding_mask": "padding is masked wherever a call gives attention_mask",
    "gradient_checkpointing": "call model.gradient_checkpointing_enable(), or give it to TrainingArguments",
}

# Called with every config that is made. The modelling files add the checks that need torch: names of mechanisms,
# metrics and encodings, and which of them go together.
config_checks: list[Callable[["DistAttnConfig"], None]] = []


class DistAttnConfig(OwnAttentionMixin, PreTrainedConfig):
    """A Transformer encoder (`is_decoder=False`) or causal decoder (`is_decoder=True`) to train from scratch.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, max_position_embeddings: sizes.
        type_vocab_size: kinds of segments (token_type_ids), whose vectors are added to the embeddings; None: there are
            none. Of an encoder-decoder: its encoder's.
        intermediate_size: of the feed-forward layer; None: 4·hidden_size.
        num_key_value_heads: key and value heads, a divisor of num_attention_heads; None: as many. value_head_dim: d_v.
        hidden_act: an activation of transformers. gated_mlp: down(act(gate(x))·up(x)) in place of down(act(up(x))).
        attention_bias, mlp_bias: whether the linear layers have a bias.
        mechanism: "dot" (transformers' own attention), "distance", "nystrom", "retrieval", a mechanism registered in
            `MECHANISMS`, or a metric's name, which means "distance" with that metric ("l2", "l1", "cosine", ...). None:
            "distance" where a metric is given, else "dot".
        metric: of "distance"; None: "l2". Of "retrieval"; None: "dot". Of "nystrom": "sqeuclidean".
        mechanism_options: the mechanism's own. "distance": p, lam, learnable_lambda, transform, lift, backend;
            "nystrom": also num_landmarks, window_size, num_sinks, exact_below; "retrieval": also window_size,
            num_sinks, block_size, num_blocks (16), min_weight (0), cluster_keys (False) (see `AttentionSpec`); λ is a
            parameter of each head from the metric's default on unless they say otherwise, and nothing is lifted.
            Options of mechanisms in `MECHANISMS` may be lists, a value for each layer: {"dilation": [1, 1, 2, 4]}.
        positional_encoding: a name registered in `POSITIONAL_ENCODINGS`: "sinusoidal", "learned", "rotary",
            "relative", "alibi", "decay", "none".
        rope_parameters: of "rotary", as transformers has them, over whole heads; rope_theta=... alone will do.
        relative_attention_num_buckets, relative_attention_max_distance: of "relative".
        scale_embedding: token embeddings times √hidden_size; None: for "sinusoidal", whose entries are of size 1.
        norm_position: "pre" (x + f(norm(x)), and a norm at the end) or "post" (norm(x + f(x))).
        norm_type: "layer_norm" or "rms_norm"; norm_eps.
        hidden_dropout, attention_dropout, classifier_dropout: probabilities; classifier_dropout None: hidden_dropout.
        initializer_range: standard deviation of initial weights.
        is_decoder: causal attention. `DistAttnForCausalLM` needs True, `DistAttnForMaskedLM` False.

    transformers' other names of these are understood, too (num_layers, n_head, d_model, ...: `attribute_map`), and
    papers' names of a mechanism's options (lambda_param, p_norm, attention_window_size, ...).

    Raises:
        ValueError: naming field, value and what is allowed; also for choices that do not go together, and for a name
            that means nothing here. In a dict or file (`from_dict`, `from_pretrained`) such a name, which a newer
            version may have written, is left out with a warning.
    """

    model_type = "distattn"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = _ALIASES
    default_theta = 10000.0
    _auto_class = "AutoConfig"
    # Its layers have Llama's names.
    peft_type = "llama"

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    value_head_dim: int | None = None
    hidden_act: str = "gelu"
    gated_mlp: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    mechanism: str | None = None
    metric: str | None = None
    mechanism_options: dict | None = None
    positional_encoding: str = "rotary"
    rope_parameters: dict | None = None
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    max_position_embeddings: int = 2048
    scale_embedding: bool | None = None
    norm_position: str = "pre"
    norm_type: str = "layer_norm"
    norm_eps: float = 1e-5
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float | None = None
    initializer_range: float = 0.02
    is_decoder: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    type_vocab_size: int | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __new__(cls, *args, **kwargs):
        # Later a field that was given at its default value looks as if it had not been.
        cls._check_names_agree(kwargs)
        return super().__new__(cls)

    def __post_init__(self, **kwargs):
        kwargs = self._by_own_names(kwargs)
        self._check_sizes()
        self._check_choices()
        super().__post_init__(**kwargs)
        # transformers' own validation says of these keys only that it does not use them.
        for name in self.rope_parameters:
            if name not in _ROPE:
                raise ValueError(f"rope_parameters has no key {name!r}; expected some of {', '.join(_ROPE)}")
        for check in config_checks:
            check(self)

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Return the config in a dict; unknown names are left out with a warning."""
        cls._check_names_agree(kwargs)
        return super().from_dict(cls._known_part(config_dict), **kwargs)

    @classmethod
    def from_json_file(cls, json_file):
        """Return the config in a JSON file, as `from_dict` reads it."""
        return cls(**cls._known_part(cls._dict_from_json_file(json_file)))

    @classmethod
    def _known_part(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(name for name in config_dict if not cls._knows(name))
        if unknown:
            logger.warning(
                f"{', '.join(map(repr, unknown))} of this {cls.__name__} mean nothing to this version of distattn_hf "
                "and are left out; a newer version may have written them"
            )
        # Older versions kept whatever they did not know, other names of fields included, and built by the fields.
        doubled = sorted(name for name, field in cls.attribute_map.items() if {name, field} <= set(config_dict))
        if ignored := [name for name in doubled if config_dict[name] != config_dict[cls.attribute_map[name]]]:
            logger.warning(
                f"{', '.join(map(repr, ignored))} of this {cls.__name__} are other names of fields that it has, too, "
                "with other values: the fields count"
            )
        return {name: value for name, value in config_dict.items() if name not in unknown and name not in doubled}

    @classmethod
    def _knows(cls, name: str) -> bool:
        if name.startswith("_") or name in (*_OF_TRANSFORMERS, *cls.attribute_map, *_OPTION_ALIASES):
            return True
        attribute = getattr(cls, name, None)
        return name in {f.name for f in fields(cls)} or (isinstance(attribute, property) and attribute.fset is not None)

    @classmethod
    def describe_unknown(cls, name: str) -> str:
        """Return an error message for an unknown field: the nearest names, or where to set it instead."""
        if name in _ELSEWHERE:
            return f"{cls.__name__} has no field {name!r}: {_ELSEWHERE[name]}"
        common = {f.name for f in fields(PreTrainedConfig)}
        known = {f.name: f.name for f in fields(cls) if f.name not in common}
        known |= {alias: f"{alias} ({field})" for alias, field in cls.attribute_map.items()}
        options = [f.name for f in fields(AttentionSpec) if f.name not in (*_NOT_OPTIONS, *known)]
        known |= {option: f"mechanism_options={{{option!r}: ...}}" for option in options}
        nearest = [known[match] for match in get_close_matches(name, known, n=3)]
        hint = f"did you mean {', '.join(nearest)}?" if nearest else f"its fields are {', '.join(known.values())}"
        return f"{cls.__name__} has no field {name!r}; {hint}"

    def _by_own_names(self, given: dict[str, Any]) -> dict[str, Any]:
        """Set the fields that `given` names by alias and return the rest; raises `ValueError` for a name that means
        nothing.
        """
        unaliased = {}
        for name, value in given.items():
            if not self._knows(name):
                raise ValueError(self.describe_unknown(name))
            if name in _OPTION_ALIASES:
                self._add_option(name, value)
            elif name in self.attribute_map:
                setattr(self, self.attribute_map[name], value)
            else:
                unaliased[name] = value
        return unaliased

    def _add_option(self, name: str, value) -> None:
        """Put an option that has another name into mechanism_options."""
        option, options = _OPTION_ALIASES[name], self.mechanism_options or {}
        if not isinstance(options, dict) or options.get(option, value) != value:
            raise ValueError(f"{name} is another name of mechanism_options[{option!r}]: got {value!r} and {options!r}")
        self.mechanism_options = {**options, option: value}

    @classmethod
    def _check_names_agree(cls, given: dict[str, Any]) -> None:
        """Raise `ValueError` where two names of one field are given with different values."""
        first = {name: name for name in given}
        for name, field in cls.attribute_map.items():
            if name in given and given[name] != given[other := first.setdefault(field, name)]:
                raise ValueError(f"{name} is another name of {other}: got {given[name]!r} and {given[other]!r}")

    def _check_sizes(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "relative_attention_num_buckets",
            "relative_attention_max_distance",
        ):
            check_integer(name, getattr(self, name))
        for name in ("intermediate_size", "num_key_value_heads", "value_head_dim", "type_vocab_size"):
            check_integer(name, getattr(self, name), optional=True)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads} heads"
            )
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            whole = f"num_attention_heads={self.num_attention_heads}"
            raise ValueError(f"num_key_value_heads must divide {whole}, got {self.num_key_value_heads}")
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id must be None or below vocab_size={self.vocab_size}, got {self.pad_token_id}"
            )
        for name in ("hidden_dropout", "attention_dropout", "classifier_dropout"):
            value = getattr(self, name)
            if value is not None or name != "classifier_dropout":
                check_number(name, value, "in [0, 1)", lambda v: 0 <= v < 1)
        for name in ("initializer_range", "norm_eps"):
            check_number(name, getattr(self, name), "positive and finite", lambda v: 0 < v < math.inf)

    def _check_choices(self) -> None:
        for name, allowed in (("norm_position", NORM_POSITIONS), ("norm_type", NORM_TYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("gated_mlp", "attention_bias", "mlp_bias", "is_decoder"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.scale_embedding is None:
            self.scale_embedding = self.positional_encoding == "sinusoidal"
        if self.mechanism is None:
            self.mechanism = "dot" if self.metric is None else "distance"
        for name in ("mechanism", "positional_encoding", "hidden_act"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name} must be a name (str), got {getattr(self, name)!r}")
        self.mechanism = self.mechanism.lower()
        self.mechanism_options = {} if self.mechanism_options is None else self.mechanism_options
        if not isinstance(self.mechanism_options, dict):
            raise ValueError(f"mechanism_options must be a dict, got {self.mechanism_options!r}")
        self.metric = self.metric or DEFAULT_METRICS.get(self.mechanism)
        if self.metric is not None and self.mechanism not in SPEC_MECHANISMS:
            raise ValueError(
                f"metric belongs to mechanism='distance' or 'retrieval', got {self.metric!r} with {self.mechanism!r}"
            )


class DistAttnSeq2SeqConfig(DistAttnConfig):
    """An encoder and a causal decoder with cross-attention; fields are those of `DistAttnConfig`, for both, and these.

    Args:
        decoder_layers: None: as many as the encoder has (num_hidden_layers).
        cross_mechanism, cross_metric, cross_options: of cross-attention, as mechanism, metric and mechanism_options;
            cross_mechanism None: the same, with the same options.
        decoder_start_token_id: what the decoder starts from.
    """

    model_type = "distattn_seq2seq"
    attribute_map = {**_ALIASES, "encoder_layers": "num_hidden_layers", "num_decoder_layers": "decoder_layers"}

    decoder_layers: int | None = None
    cross_mechanism: str | None = None
    cross_metric: str | None = None
    cross_options: dict | None = None
    decoder_start_token_id: int | None = 0
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs):
        kwargs = self._by_own_names(kwargs)
        check_integer("decoder_layers", self.decoder_layers, optional=True)
        if self.decoder_layers is None:
            self.decoder_layers = self.num_hidden_layers
        if not isinstance(self.cross_options, dict | None):
            raise ValueError(f"cross_options must be a dict or None, got {self.cross_options!r}")
        for name in ("cross_metric", "cross_options"):
            if self.cross_mechanism is None and getattr(self, name):
                raise ValueError(f"{name} belongs to cross_mechanism, which is None; got {getattr(self, name)!r}")
        super().__post_init__(**kwargs)

    def part(self, is_decoder: bool) -> "DistAttnSeq2SeqConfig":
        """Return a copy of the config for the encoder or the decoder."""
        config = copy.deepcopy(self)
        config.is_decoder = is_decoder
        if is_decoder:
            config.num_hidden_layers, config.type_vocab_size = self.decoder_layers, None
        else:
            config.use_cache = False
        return config

    def cross_choice(self) -> tuple[str, str | None, dict]:
        """Return (mechanism, metric, options) of cross-attention."""
        if self.cross_mechanism is None:
            return self.mechanism, self.metric, self.mechanism_options
        return self.cross_mechanism, self.cross_metric, self.cross_options or {}


def spec_of(mechanism: str, metric: str | None, options: dict) -> AttentionSpec | None:
    """Return the spec of "distance", "nystrom" or "retrieval" with these options; None for every other mechanism.

    Raises `ValueError` for an option that the mechanism does not have, or a value it cannot take.
    """
    if mechanism not in SPEC_MECHANISMS:
        return None
    if field_names := sorted(set(options) & set(_NOT_OPTIONS)):
        raise ValueError(f"mechanism_options: {field_names[0]!r} is no option of mechanism {mechanism!r}")
    defaults = {"lift": False, "transform": "none"}
    if mechanism == "retrieval":
        # What a model is trained with is what it reads.
        defaults |= {"num_blocks": 16, "min_weight": 0.0, "cluster_keys": False}
    return AttentionSpec.from_dict({**defaults, **options, "mechanism": mechanism, "metric": metric})


def check_integer(name: str, value, optional: bool = False) -> None:
    """Raise `ValueError` for anything but an integer >= 1 (None is allowed where it is optional)."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1{' or None' if optional else ''}, got {value!r}")


def check_number(name: str, value, allowed: str, holds: Callable[[float], bool]) -> None:
    """Raise `ValueError` for anything but a number for which `holds` is true."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
        raise ValueError(f"{name} must be a number, {allowed}; got {value!r}")
