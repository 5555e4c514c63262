"""Tiny models of every architecture of transformers, and what the exact conversion does to each.

python -m distattn_hf.experiments.architectures [MODEL_TYPE ...]

tests/sweep/RESULTS.txt is what it printed of all.
"""

import contextlib
import io
import signal
import sys
import warnings
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig
from transformers.models.auto import configuration_auto, modeling_auto

from ..benchmark.measure import only_errors
from ..conversion.convert import convert
from ..core.attention_spec import AttentionSpec
from ..core.discovery import find_attention_modules

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
SECONDS = 60


@dataclass
class Outcome:
    """status: "exact" (equal to the teacher), "refused" (a clear error), "no interface" (nothing to convert),
    "not built" (no tiny model from these fields), or "wrong"; detail says why, or the largest difference."""

    model_type: str
    status: str
    detail: str


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


def run(model, batch) -> torch.Tensor:
    """Return the model's first output, without padding."""
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**batch)
    tensor = next(t for t in output.to_tuple() if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dim() > 1)
    mask = batch.get("attention_mask")
    if mask is not None and tensor.dim() == 3 and tensor.shape[:2] == mask.shape:
        return tensor[mask.bool()]
    return tensor


def sweep_one(model_type: str) -> Outcome:
    """Build, convert exactly, compare with the teacher; never raises for a model that cannot be built."""
    try:
        model = build(model_type)
        batch = inputs_for(model)
        expected = run(model, batch)
        if not torch.isfinite(expected).all():
            raise ValueError("the tiny teacher gives NaN")
    except Exception as error:  # noqa: BLE001 (400 config classes raise various errors for tiny sizes)
        return Outcome(model_type, "not built", f"{type(error).__name__}: {error}".split("\n")[0][:110])
    modules = find_attention_modules(model)
    if not modules:
        return Outcome(model_type, "no interface", type(model).__name__)
    try:
        student = convert(model, AttentionSpec(), init="exact")
        actual = run(student, batch)
    except TimeoutError:
        raise
    except ValueError as error:
        return Outcome(model_type, "refused", str(error).split("\n")[0][:160])
    except Exception as error:  # noqa: BLE001 (reported as wrong, with its text)
        return Outcome(model_type, "wrong", f"{type(error).__name__}: {error}".split("\n")[0][:160])
    difference = float((actual - expected).abs().max())
    scale = float(expected.abs().max())
    status = "exact" if difference <= 1e-4 * max(1.0, scale) else "wrong"
    control = float((run(convert(model, AttentionSpec(), init="plain"), batch) - expected).abs().max())
    detail = f"{type(model).__name__}, {len(modules)} modules, |Δ| {difference:.1e}, control {control:.1e}"
    return Outcome(model_type, status, detail)


@only_errors("transformers")
def main(names: list[str]) -> None:
    """Print one line per architecture and the counts."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("took too long")))
    counts: dict[str, int] = {}
    for model_type in names or sorted(configuration_auto.CONFIG_MAPPING_NAMES):
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                outcome = sweep_one(model_type)
        except TimeoutError as error:
            outcome = Outcome(model_type, "not built", str(error))
        finally:
            signal.alarm(0)
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
        print(f"{outcome.status:<13} {outcome.model_type:<28} {outcome.detail}", flush=True)
    print(counts)


if __name__ == "__main__":
    main(sys.argv[1:])
