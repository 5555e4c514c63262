"""What both families of model classes share: registration, protection of loaded weights, and monitoring."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

# A family's head classes by the name of the Auto class that finds them.
Heads = dict[str, tuple[type[PreTrainedModel], ...]]


def register_models(config_class: type[PreTrainedConfig], heads: Heads) -> None:
    """Register classes with the Auto classes, by config class, and in transformers' lists of models by task.

    Trainer (label smoothing), the pipelines and others ask those lists by class name what a model is.
    """
    for auto_name, classes in heads.items():
        mapping = getattr(modeling_auto, auto_name)._model_mapping
        mapping.register(config_class, classes[0] if len(classes) == 1 else classes, exist_ok=True)
        names = tuple(kind.__name__ for kind in classes)
        mapping._model_mapping.setdefault(config_class.model_type, names[0] if len(names) == 1 else names)


def auto_map_for(model: PreTrainedModel, heads: Heads) -> dict[str, str]:
    """Return config.auto_map: where trust_remote_code finds the config and every head class of the family.

    Of several classes that an Auto class lists it names the model's own, else the first.
    """
    kinds = {"AutoConfig": type(model.config)}
    for name, classes in heads.items():
        kinds[name] = next((kind for kind in type(model).__mro__ if kind in classes), classes[0])
    return {name: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" for name, kind in kinds.items()}


def _storages(tensor: Tensor) -> Iterator[int]:
    """Yield identifiers of a tensor's memory, or of those that a sharded or quantised tensor is made of."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            # Beside tensors, a DTensor names its mesh.
            if isinstance(part := getattr(tensor, name), Tensor):
                yield from _storages(part)
    else:
        yield tensor.untyped_storage()._cdata


class _WritesToCopies(TorchDispatchMode):
    """Dispatch mode in which writing into one of these tensors, or a view of it, writes into a copy."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self.storages = {storage for tensor in tensors for storage in _storages(tensor)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            args, kwargs = tree_map_only(Tensor, self._to_write, (args, kwargs))
        return func(*args, **kwargs)

    def _to_write(self, tensor: Tensor) -> Tensor:
        return tensor if self.storages.isdisjoint(_storages(tensor)) else tensor.clone()


@contextmanager
def loaded_kept(model: nn.Module):
    """Keep loaded parameters and buffers unchanged within this context, even by `weight.data.normal_()`.

    transformers' own `initialization` functions leave them alone, too, but a subclass need not use those.
    """
    loaded_tensors = [
        (table, name, tensor, tensor.detach())
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if getattr(tensor, "_is_hf_initialized", False)
    ]
    with _WritesToCopies([tensor for *_, tensor, _ in loaded_tensors]):
        yield
    for table, name, tensor, data in loaded_tensors:
        # A new tensor may have replaced it, or a part of it.
        table[name] = tensor
        if list(_storages(tensor)) != list(_storages(data)):
            tensor.data = data


class KeepsLoadedWeights:
    """Mixin before `PreTrainedModel`: a subclass's own `_init_weights` sets only what the checkpoint lacks."""

    @torch.no_grad()
    def initialize_weights(self):
        with loaded_kept(self):
            super().initialize_weights()

    def mark_tied_weights_as_initialized(self, loading_info):
        super().mark_tied_weights_as_initialized(loading_info)
        # Where a class uses one module twice, one name of its weights is missing from the checkpoint, and is loaded.
        loading_info.missing_keys = {
            key
            for key in loading_info.missing_keys
            if key in self.all_tied_weights_keys
            or not getattr(self.get_parameter_or_buffer(key), "_is_hf_initialized", False)
        }


class Monitored:
    """Mixin of models and layers that can be monitored; `attention_modules` names the modules to watch."""

    _monitor = None

    def attention_modules(self) -> dict[str, nn.Module]:
        """Return {name: attention module}: all layers in it that give weights on request."""
        layers = {n: m for n, m in self.named_modules() if getattr(m, "gives_weights_on_request", False)}
        return {name or type(module).__name__: module for name, module in layers.items()}

    def enable_performance_monitoring(self, statistics: bool = False, flops: bool = False, every: int = 1) -> None:
        """Count time and memory (and FLOPs) of every attention module from now on, starting anew if it was on.

        every: measure the first of so many calls of each module; the others pass as they would without.

        See `distattn_hf.analysis.monitor.PerformanceMonitor`.
        """
        try:
            # Absolute, so that transformers does not copy it: a checkpoint's own code needs it only beside the package.
            from distattn_hf.analysis.monitor import PerformanceMonitor
        except ImportError as error:
            raise ImportError("performance monitoring needs the package: pip install distattn_hf") from error
        monitor = PerformanceMonitor(self.attention_modules(), statistics, flops, every)
        self.disable_performance_monitoring()
        # Not an attribute that torch would register or copy as a submodule.
        object.__setattr__(self, "_monitor", monitor)

    def disable_performance_monitoring(self) -> None:
        """Stop counting and discard the statistics."""
        if self._monitor is not None:
            self._monitor.stop()
        object.__setattr__(self, "_monitor", None)

    def get_performance_stats(self, by: str = "module") -> dict[str, dict]:
        """Return the statistics by attention module, or time, tokens and memory by layer ("layer_0", ...).

        See `PerformanceMonitor.stats` and `.layers`. Raises `RuntimeError` where monitoring is off.
        """
        if by not in ("module", "layer"):
            raise ValueError(f"by must be 'module' or 'layer', got {by!r}")
        if self._monitor is None:
            raise RuntimeError("performance monitoring is off; call enable_performance_monitoring() first")
        return self._monitor.stats() if by == "module" else self._monitor.layers()
