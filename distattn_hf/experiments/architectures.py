"""Tiny models of every architecture of transformers, and what the exact conversion does to each."""

import contextlib
import io
import signal
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedConfig
from transformers.models.auto import configuration_auto, modeling_auto

from ..benchmark.measure import only_errors
from ..conversion.convert import convert
from ..core.attention_spec import AttentionSpec
from ..core.discovery import find_attention_modules
from ..data.config import refuse_unknown

# Fields that are set in a config and its sub-configs, if they exist.
TINY = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "emb_dim": 32, "model_dim": 32,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 2, "num_attention_heads": 4, "num_heads": 4, "n_head": 4,
    "n_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_ff": 32, "d_kv": 8, "ffn_dim": 32,
    "hidden_dim": 64, "head_dim": 8, "vocab_size": 99, "max_position_embeddings": 64, "n_positions": 64,
    "image_size": 32, "patch_size": 8, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 0, "sliding_window": 8, "embedding_size": 32, "word_embed_proj_dim": 32,
    "attention_dropout": 0.0, "layer_types": None, "mlp_layer_types": None, "vocab_size_per_layer_input": 99,
}  # fmt: skip


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """Rebuild the config and its sub-configs with tiny sizes."""
    overrides = {name: value for name, value in TINY.items() if hasattr(config, name)}
    for key in config.sub_configs:
        sub_config = getattr(config, key, None)
        if isinstance(sub_config, PreTrainedConfig):
            overrides[key] = shrink(sub_config).to_dict()
    for name in ("layer_types", "mlp_layer_types"):
        overrides.pop(name, None)
        if isinstance(getattr(config, name, None), list):
            layer_kinds = getattr(config, name)
            overrides[name] = [layer_kinds[0], layer_kinds[-1]]
    return type(config)(**overrides)


def build(model_type: str):
    """Build a tiny model with random weights, in eval mode: the speech, causal, sequence-to-sequence or base class."""
    config = shrink(configuration_auto.CONFIG_MAPPING[model_type]())
    names = ["AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel"]
    if type(config) not in modeling_auto.AutoModelForSeq2SeqLM._model_mapping:
        # Speech models are causal ones, too, without their encoder.
        names.insert(0, "AutoModelForSpeechSeq2Seq")
    for auto_name in names:
        auto_class = getattr(modeling_auto, auto_name)
        if type(config) in auto_class._model_mapping:
            torch.manual_seed(0)
            model = auto_class.from_config(config)
            break
    else:
        raise ValueError("no Auto class has it")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and parameter.is_floating_point() and "embed" not in name:
            # Larger than the usual 0.02, so that attention is not uniform.
            parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
    return model.eval()


def inputs_for(model) -> dict:
    """Return random tokens, pixels, sound, series of numbers, or a text and a picture, by the model's main input."""
    generator, config = torch.Generator().manual_seed(1), model.config
    name, shapes = model.main_input_name, {}
    pairs = type(config) in modeling_auto.AutoModelForZeroShotImageClassification._model_mapping
    if name == "pixel_values" or pairs:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 32)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        shapes["pixel_values"] = (2, getattr(vision, "num_channels", 3), height, width)
    elif name == "input_values":
        shapes[name] = (2, 4000)
    elif name == "input_features" and hasattr(config, "num_mel_bins"):
        shapes[name] = (2, config.num_mel_bins, 2 * getattr(config, "max_source_positions", 50))
    elif name == "past_values" and hasattr(config, "context_length"):
        shapes[name] = (2, config.context_length, config.num_input_channels)
    elif name != "input_ids":
        raise ValueError(f"no inputs made for {name}")
    batch = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    if name == "input_ids":
        ids = torch.randint(3, 90, (2, 20), generator=generator)
        batch |= {name: ids, "attention_mask": torch.ones_like(ids)}
        batch["attention_mask"][0, -5:] = 0
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(3, 90, (2, 9), generator=generator)
    return batch


def run_model(model, batch) -> torch.Tensor:
    """Return the model's first output, without padding."""
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**batch)
    tensor = next(t for t in output.to_tuple() if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dim() > 1)
    mask = batch.get("attention_mask")
    if mask is not None and tensor.dim() == 3 and tensor.shape[:2] == mask.shape:
        return tensor[mask.bool()]
    return tensor


def sweep_one(model_type: str) -> dict:
    """Build, convert exactly, compare with the teacher; never raises for a model that cannot be built.

    Returns {"status", "detail"}; status: "exact" (equal to the teacher), "refused" (a clear error), "no interface"
    (nothing to convert), "not built" (no tiny model from these fields), or "wrong"; detail is the class or the error.
    Of those that run also "modules" (how many were converted), "difference" (the largest from the teacher) and
    "control" (that of a conversion by init="plain": 0 would say that attention does not matter).
    """
    try:
        model = build(model_type)
        batch = inputs_for(model)
        expected = run_model(model, batch)
        if not torch.isfinite(expected).all():
            raise ValueError("the tiny teacher gives NaN")
    except Exception as error:  # noqa: BLE001 (400 config classes raise various errors for tiny sizes)
        return _outcome("not built", error, 110)
    modules = find_attention_modules(model)
    if not modules:
        return {"status": "no interface", "detail": type(model).__name__}
    try:
        student = convert(model, AttentionSpec(), init="exact")
        actual = run_model(student, batch)
    except TimeoutError:
        raise
    except ValueError as error:
        return {"status": "refused", "detail": str(error).split("\n")[0][:160]}
    except Exception as error:  # noqa: BLE001 (reported as wrong, with its text)
        return _outcome("wrong", error, 160)
    difference, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    control = run_model(convert(model, AttentionSpec(), init="plain"), batch)
    return {
        "status": "exact" if difference <= 1e-4 * max(1.0, scale) else "wrong",
        "detail": type(model).__name__,
        "modules": len(modules),
        "difference": difference,
        "control": float((control - expected).abs().max()),
    }


def _outcome(status: str, error: Exception, length: int) -> dict:
    return {"status": status, "detail": f"{type(error).__name__}: {error}".split("\n")[0][:length]}


@dataclass(frozen=True)
class Options:
    """model_types: as configs call them; none: all that transformers has. seconds: after which one is given up."""

    model_types: tuple[str, ...] = ()
    seconds: int = 60

    def __post_init__(self):
        if self.seconds < 1:
            raise ValueError(f"seconds must be >= 1, got {self.seconds!r}")
        refuse_unknown(self.model_types, configuration_auto.CONFIG_MAPPING_NAMES, "model_types")


QUICK = {"model_types": ("gpt2", "git", "vit")}
AXES = ("model_types",)


@only_errors("transformers")
def run(options: Options, results) -> None:
    """Measure a row for each model type, and say how many there are of each outcome."""
    asked = options.model_types or sorted(configuration_auto.CONFIG_MAPPING_NAMES)
    rows = [results.row({"model_type": name}, partial(_measure, name, options.seconds)) for name in asked]
    counts = Counter(row["status"] for row in rows)
    results.echo(", ".join(f"{count} {status}" for status, count in counts.most_common()))


def _measure(model_type: str, seconds: int) -> dict:
    """Return the outcome of a model type in a process's main thread, "not built" where it takes too long."""

    def give_up(*_):
        raise TimeoutError(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sweep_one(model_type)
    except TimeoutError as error:
        return _outcome("not built", error, 110)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
