"""Keep what a checkpoint gave: initialisation leaves loaded weights alone, whatever way it writes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only


def _storages(tensor: Tensor) -> Iterator[int]:
    """What identifies the memory of a tensor, or of those that a sharded or quantised one is made of."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
    else:
        yield tensor.untyped_storage()._cdata


class _WritesToCopies(TorchDispatchMode):
    """What would write into one of these tensors, or a view of it, writes into a copy."""

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
    """Within it nothing changes the parameters and buffers that were loaded, not even by `weight.data.normal_()`.

    transformers' own `initialization` functions leave them alone, too, but a subclass need not use those.
    """
    held = [
        (table, name, tensor, tensor.detach())
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if getattr(tensor, "_is_hf_initialized", False)
    ]
    with _WritesToCopies([tensor for *_, tensor, _ in held]):
        yield
    for table, name, tensor, data in held:
        # A new tensor may have been put in its place, or within it.
        table[name] = tensor
        if list(_storages(tensor)) != list(_storages(data)):
            tensor.data = data


class KeepsLoadedWeights:
    """Mixin before `PreTrainedModel`: a subclass's own `_init_weights` sets what the checkpoint lacks, and no more."""

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
