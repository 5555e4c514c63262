"""Save only what a conversion and its training changed, a few kilobytes, and put it on its base model again."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..connection import hub_arguments
from ..core.base_weights import ADAPTER_NAME, digest, tied_names
from ..core.modeling_converted import DistAttnModelMixin, model_class_for
from .embedded import EMBEDDED
from .folders import staging_folder
from .models import check_weights, load_checkpoint


def save_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    base: PreTrainedModel | str | None = None,
    base_name: str | None = None,
    tokenizer=None,
    overwrite: bool = False,
) -> dict:
    """Save what a converted model has beside its base model's weights, and which base that is.

    `AutoModelForCausalLM.from_pretrained(folder)`, or `load_adapter`, loads the base, checks its weights and puts this
    on; `save_pretrained` of the result writes the full checkpoint.

    Args:
        model: what `convert` returned, trained or not.
        folder: replaced only with `overwrite`.
        base: the teacher, or where to load it from: a folder, a Hub name or an embedded checkpoint's name; None: where
            the model says that it came from.
        base_name: a name of that kind to record in place of the base's own.
        tokenizer: saved beside.

    Returns:
        {"base", "tensors", "bytes", "changed": names of the base's own tensors that are saved, too}.

    Raises:
        ValueError: no converted model, adapters or quantised weights in it, a base of another class or without a name,
            or the base's own folder to save to.
        OSError: where the base cannot be loaded.
    """
    if not isinstance(model, DistAttnModelMixin):
        raise ValueError(f"{type(model).__name__} is not a converted model; save_adapter takes what convert returned")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(f"{type(model).__name__} holds PEFT adapters; merge them first (merge_and_unload)")
    check_weights(model, "saving an adapter of it")
    if not isinstance(base, PreTrainedModel):
        if str(base) in EMBEDDED:
            base_name = base_name or str(base)
        base = _load(model, base)
    if type(base) is not model.base_class:
        raise ValueError(f"base must be a {model.base_class.__name__}, got {type(base).__name__}")
    name = str(base_name or base.config.name_or_path or "")
    if not name:
        raise ValueError("base has no name_or_path to load it by again; give base_name=, a Hub name or a folder")
    if Path(name).is_dir() and Path(name).resolve() == Path(folder).resolve():
        raise ValueError(f"{str(folder)!r} is the base's own folder, which the adapter needs; give another one")
    original, tied = base.state_dict(), tied_names(model)
    kept = {
        key: tensor.detach().cpu().contiguous().clone()
        for key, tensor in model.state_dict().items()
        if key not in tied and not _same(original.get(key), tensor)
    }
    entry = {"name": name, "class": type(base).__name__, "dtype": str(model.dtype).removeprefix("torch.")}
    entry["sha256"] = digest(base, model.dtype)
    if base_name is None and (revision := getattr(base.config, "_commit_hash", None)):
        entry["revision"] = revision
    block, own_name = model.config.distattn, model.config.name_or_path
    with staging_folder(folder, overwrite) as out:
        try:
            model.config.distattn = {**block, "base": entry}
            # The config, the code and the report; of weights what is replaced just below.
            model.save_pretrained(out, state_dict={key: kept[key] for key in kept if ".distattn." in key})
        finally:
            model.config.distattn = block
            model.name_or_path = model.config.name_or_path = own_name or str(folder)
        # Not there where nothing is fitted: an exact conversion, or retrieval's.
        (out / "model.safetensors").unlink(missing_ok=True)
        save_file(kept, out / ADAPTER_NAME, {"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(out)
        size = (out / ADAPTER_NAME).stat().st_size
    changed = sorted(key for key in kept if key in original)
    return {"base": name, "tensors": len(kept), "bytes": size, "changed": changed}


def load_adapter(model: PreTrainedModel, folder: str | Path, **arguments) -> PreTrainedModel:
    """Return a converted model: a folder of `save_adapter` (or its Hub name) put on this base model.

    The model is not touched. Further arguments are those of `from_pretrained`. Raises `ValueError` for another base
    than the adapter's, by its weights.
    """
    if isinstance(model, DistAttnModelMixin):
        raise ValueError(f"{type(model).__name__} is converted already; an adapter goes on the model it came from")
    check_weights(model, "putting an adapter on it")
    return model_class_for(type(model)).from_pretrained(folder, base_model=model, **arguments).eval()


def _load(model: PreTrainedModel, base: str | None) -> PreTrainedModel:
    name = str(base or model.converted_from or model.config.name_or_path or "")
    if base is None and name and name not in EMBEDDED and _is_converted(name):
        # It was loaded from a full checkpoint, whose report may know the teacher.
        name = (model.report_as_it_is() or {}).get("base_model") or ""
    if not name:
        raise ValueError("base: this model does not know what it was converted from; give base=, the teacher")
    if name in EMBEDDED:
        return load_checkpoint(name, dtype=model.dtype)[0]
    if _is_converted(name):
        raise ValueError(f"base must be the teacher, got {name!r}, which is a converted checkpoint itself")
    try:
        return model.base_class.from_pretrained(name, dtype=model.dtype, **hub_arguments(name))
    except OSError as error:
        raise OSError(
            f"the base {name!r} could not be loaded; give base=, the teacher itself or a folder: {error}"
        ) from error


def _is_converted(name: str) -> bool:
    try:
        return bool(PreTrainedConfig.get_config_dict(name, **hub_arguments(name))[0].get("distattn"))
    except OSError:
        return False  # loading it says what is wrong


def _same(own: Tensor | None, tensor: Tensor) -> bool:
    """Return whether the base has this very tensor, in value."""
    return own is not None and own.shape == tensor.shape and own.to(tensor).equal(tensor)
