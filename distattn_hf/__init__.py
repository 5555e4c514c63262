"""Distance-based attention for Hugging Face transformers: convert a checkpoint, keep its quality, load it anywhere."""

import sys
from importlib import import_module
from pathlib import PurePath

from .moved import MovedModules

__version__ = "0.1.0"

# Imported on first use, so that importing the package costs little more than transformers' Auto classes.
_MODULES = {
    "analysis.logging_callback": ("AttentionLoggingCallback",),
    "analysis.statistics": ("analyse_weights", "measure"),
    "benchmark.self_check": ("DistanceAttentionTester", "TestConfig"),
    "training.lambda_search": ("grid_search", "optimize_lambda_parameters"),
    "conversion.calibrate": ("CalibrationOptions",),
    "storage.adapters": ("load_adapter", "save_adapter"),
    "storage.models": ("load_checkpoint",),
    "conversion.convert": ("convert", "revert"),
    "conversion.fold": ("fold_alpha",),
    "conversion.replace": ("replace_attention",),
    "conversion.report": ("ConversionReport",),
    "core.attention": ("distance_attention",),
    "core.attention_spec": ("AttentionSpec",),
    "core.configuration_native": ("DistAttnConfig", "DistAttnSeq2SeqConfig"),
    "core.encodings": ("POSITIONAL_ENCODINGS", "PositionalEncoding", "register_encoding"),
    "core.backends": ("BackendChoice", "explain_backend"),
    "layers.attention_layers": ("DistanceBasedAttention",),
    "layers.layer_settings": ("DistanceAttentionConfig", "DistanceType"),
    "layers.multihead": ("DistanceMultiheadAttention",),
    "layers.factory": ("AttentionFactory", "PositionalEncodingFactory", "create_distance_attention"),
    "layers.blocks": (
        "DistanceDecoder",
        "DistanceDecoderLayer",
        "DistanceEncoder",
        "DistanceEncoderLayer",
        "MultiHeadDistanceAttention",
    ),
    "core.mechanisms": ("MECHANISMS", "Mechanism", "register_mechanism"),
    "core.metrics": ("Metric", "register_metric"),
    "core.modeling_distattn": (
        "DistAttnForCausalLM",
        "DistAttnForMaskedLM",
        "DistAttnForMultipleChoice",
        "DistAttnForQuestionAnswering",
        "DistAttnForSequenceClassification",
        "DistAttnForTokenClassification",
        "DistAttnModel",
    ),
    "core.modeling_distattn_seq2seq": ("DistAttnForConditionalGeneration", "DistAttnSeq2SeqModel"),
    "core.native_layers": ("DistAttnPreTrainedModel",),
    "functional.nystrom": ("nystrom_attention",),
    "functional.retrieval_attention": ("retrieval_attention",),
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *_LAZY]


sys.meta_path.append(MovedModules())


def _is_command_line() -> bool:
    """Return whether this process was started as `distattn` or as `python -m distattn_hf.cli`."""
    arguments = sys.orig_argv[1:]
    if "-m" in arguments:
        return arguments[arguments.index("-m") + 1 :][:1] == ["distattn_hf.cli"]
    script = sys.argv[0] if sys.argv else ""
    return script in arguments and PurePath(script).stem == "distattn"


# The command line answers --help and bad arguments without torch; its `start` registers the classes later.
if not _is_command_line():
    from .auto_classes import register_all

    register_all()


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    # A converted class: "DistAttn" + the name of a transformers class.
    if name.startswith("DistAttn"):
        module = "configuration_distattn" if name.endswith("Config") else "modeling_converted"
        return getattr(import_module(f".core.{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
