"""Distance-based attention for Hugging Face transformers: convert a checkpoint, keep its quality, load it anywhere."""

from transformers.utils import logging as _logging

from .core.attention import distance_attention
from .core.compatibility import is_newer_than_tested as _is_newer_than_tested
from .core.compatibility import version_note as _version_note
from .core.configuration_distattn import CLASS_PREFIX, AttentionSpec
from .core.configuration_native import DistAttnConfig, DistAttnSeq2SeqConfig
from .core.encodings import POSITIONAL_ENCODINGS, PositionalEncoding, register_encoding
from .core.explain import BackendChoice, explain_backend
from .core.layers import DistanceAttentionConfig, DistanceBasedAttention, DistanceType
from .core.layers_factory import AttentionFactory, PositionalEncodingFactory, create_distance_attention
from .core.layers_stack import (
    DistanceDecoder,
    DistanceDecoderLayer,
    DistanceEncoder,
    DistanceEncoderLayer,
    MultiHeadDistanceAttention,
)
from .core.mechanisms import MECHANISMS, Mechanism, register_mechanism
from .core.metrics import Metric, register_metric
from .core.modeling_converted import register_all_families
from .core.modeling_distattn import (
    DistAttnForCausalLM,
    DistAttnForMaskedLM,
    DistAttnForMultipleChoice,
    DistAttnForQuestionAnswering,
    DistAttnForSequenceClassification,
    DistAttnForTokenClassification,
    DistAttnModel,
)
from .core.modeling_distattn_seq2seq import DistAttnForConditionalGeneration, DistAttnSeq2SeqModel
from .core.native_layers import DistAttnPreTrainedModel, register_native_family
from .core.nystrom import nystrom_attention

__version__ = "0.1.0"

if _is_newer_than_tested():
    _logging.get_logger(__name__).warning(f"{_version_note()}: what it changed may not be known here")

register_all_families()
register_native_family()

# What needs more than core is loaded on first use, so that loading a checkpoint stays quick.
_LAZY = {
    "convert": "conversion.convert",
    "revert": "conversion.convert",
    "fold_alpha": "conversion.fold",
    "ConversionReport": "conversion.report",
    "CalibrationOptions": "conversion.calibrate",
    "load_checkpoint": "conversion.checkpoints",
    "optimize_lambda_parameters": "analysis.lambda_search",
    "grid_search": "analysis.lambda_search",
}

__all__ = [
    "MECHANISMS",
    "AttentionFactory",
    "AttentionSpec",
    "BackendChoice",
    "DistAttnConfig",
    "DistAttnForCausalLM",
    "DistAttnForConditionalGeneration",
    "DistAttnForMaskedLM",
    "DistAttnForMultipleChoice",
    "DistAttnForQuestionAnswering",
    "DistAttnForSequenceClassification",
    "DistAttnForTokenClassification",
    "DistAttnModel",
    "DistAttnPreTrainedModel",
    "DistAttnSeq2SeqConfig",
    "DistAttnSeq2SeqModel",
    "DistanceAttentionConfig",
    "DistanceBasedAttention",
    "DistanceDecoder",
    "DistanceDecoderLayer",
    "DistanceEncoder",
    "DistanceEncoderLayer",
    "DistanceType",
    "Mechanism",
    "Metric",
    "MultiHeadDistanceAttention",
    "POSITIONAL_ENCODINGS",
    "PositionalEncoding",
    "PositionalEncodingFactory",
    "create_distance_attention",
    "distance_attention",
    "explain_backend",
    "fold_alpha",
    "nystrom_attention",
    "register_encoding",
    "register_mechanism",
    "register_metric",
    "__version__",
    *_LAZY,
]


def __getattr__(name: str):
    from importlib import import_module

    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    if name.startswith(CLASS_PREFIX):
        module = "configuration_distattn" if name.endswith("Config") else "modeling_converted"
        return getattr(import_module(f".core.{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
