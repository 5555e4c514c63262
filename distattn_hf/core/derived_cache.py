"""A cache layer that keeps, beside its keys, what attention makes of them at every step: codes, mapped keys."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

from .compatibility import given_cache
from .discovery import argument_names
from .retrieval_far import BEGINNING

# Keys for which there is room beyond those held, as a share of them, and at least.
SPARE, _LEAST_ROOM = 4, 64


def writable(tensor: Tensor) -> bool:
    """Return whether a tensor may be written into here: those made under inference mode may not outside it."""
    return not tensor.is_inference() or torch.is_inference_mode_enabled()


class MappedKeys:
    """Keys as the maps of a group of heads make them, one after another, with room for more."""

    def __init__(self):
        self.counted, self._room, self._parameters = 0, None, ()

    def update(self, key: Tensor, parameters: list[Tensor], map_keys: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `map_keys` of keys (B, H_kv, M, d), of which those counted before have not changed.

        map_keys takes some keys to (B, H, n, d), each by itself, and depends on `parameters` alone. Where their values
        are others than before (a step of training between, another model), all keys are mapped anew.
        """
        if not self._goes_on(key, parameters):
            self.counted, self._parameters = 0, [tensor.detach().clone() for tensor in parameters]
        if self.counted < key.shape[2]:
            self._append(map_keys(key[:, :, self.counted :]), key.shape[2])
        return self._room[:, :, : self.counted]

    def _goes_on(self, key: Tensor, parameters: list[Tensor]) -> bool:
        if not 0 < self.counted <= key.shape[2] or not writable(self._room) or self._room.device != key.device:
            return False
        # By value: offloaded parameters come to the device in a tensor that is new each time.
        pairs = zip(self._parameters, parameters, strict=True)
        return len(self._parameters) == len(parameters) and all(
            a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in pairs
        )

    def _append(self, new: Tensor, count: int) -> None:
        if not self.counted or self._room.shape[2] < count or self._room.dtype != new.dtype:
            spare = _LEAST_ROOM if not self.counted else max(_LEAST_ROOM, count // SPARE)
            room = new.new_empty(*new.shape[:2], count + spare, new.shape[3])
            if self.counted:
                room[:, :, : self.counted] = self._room[:, :, : self.counted]
            self._room = room
        self._room[:, :, self.counted : count] = new
        self.counted = count

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change`, whose first axis is the batch."""
        if self.counted:
            self._room = change(self._room[:, :, : self.counted])


class FirstQueries:
    """The first BEGINNING queries of each row of a text that comes in parts, for each group of a module's heads.

    They stand by their places, so that a text that is cut short, or begins anew, overwrites what it must; tensors are
    never written into, so that copies may share them.
    """

    def __init__(self, owner: int = 0, rows: dict[int, tuple[Tensor, int]] | None = None):
        self.owner, self._rows = owner, dict(rows or {})

    def of(self, owner: int) -> "FirstQueries":
        """Return these for an owner, by its id: a copy for another than before."""
        return self if self.owner == owner else FirstQueries(owner, self._rows)

    def update(self, number: int, query: Tensor, num_keys: int, first: Tensor | None) -> Tensor | None:
        """Return the beginning of group `number` as `Retrieval` has it, after the last queries (B, H, N, d) of M keys.

        None where queries before them are not known.
        """
        before, count = num_keys - query.shape[2], min(BEGINNING, num_keys)
        offset = torch.zeros(1, dtype=torch.long, device=query.device) if first is None else first
        known, reach = self._rows.get(number, (None, 0))
        if before and (known is None or reach < before or known.shape[:2] != query.shape[:2]):
            self._rows.pop(number, None)
            return None
        if known is None or before < BEGINNING + (0 if first is None else int(first.max())):
            place = torch.arange(count, device=query.device) + offset[:, None] - before
            own = (place >= 0) & (place < query.shape[2])
            index = place.clamp(0, query.shape[2] - 1)[:, None, :, None].expand(*query.shape[:2], -1, query.shape[3])
            rows = query.detach().gather(2, index)
            if before:
                known = F.pad(known, (0, 0, 0, max(0, count - known.shape[2])))[:, :, :count]
                rows = torch.where(own[:, None, :, None], rows, known.to(rows))
            known = rows
        self._rows[number] = known, num_keys
        return known

    def tensors(self) -> list[Tensor]:
        """Return what is held."""
        return [rows for rows, _ in self._rows.values()]

    def changed(self, change, owner: int) -> "FirstQueries":
        """Return these with `change` applied to every tensor, whose first axis is the batch."""
        return FirstQueries(owner, {n: (change(rows), reach) for n, (rows, reach) in self._rows.items()})


class DerivedLayer(DynamicLayer):
    """A `DynamicLayer` that keeps what is made of its keys, and room for more so that new ones do not copy the others.

    Takes whatever a `DynamicLayer` takes: it can be cropped, reordered, copied, offloaded.
    """

    def __init__(self):
        super().__init__()
        self.derived: dict[Any, Any] = {}
        self._room: tuple[Tensor, Tensor] | None = None
        self._owner, self._left = 0, None

    @classmethod
    def from_layer(cls, layer: DynamicLayer) -> "DerivedLayer":
        """Return a layer that holds the keys of a `DynamicLayer`."""
        new = cls()
        new.__dict__.update({name: value for name, value in vars(layer).items() if name not in vars(new)})
        for name in ("keys", "values", "is_initialized"):
            setattr(new, name, getattr(layer, name))
        return new

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, H_kv, n, d); returns all, by which the attention finds this layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._owner != id(self) or self.keys is not self._left:
            # A copy, or keys that were cut or replaced from outside: what was made of others is not theirs, and what
            # stands in the room may be somebody's still.
            self.derived, self._room, self._owner = {}, None, id(self)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            # Autograd keeps what was returned before: nothing may be written beside it.
            keys, values = super().update(key_states, value_states)
            self._room = None
        else:
            keys, values = self._append(key_states, value_states)
        self._left = self.keys
        # A view of its own, so that the mark is not on the tensor that the cache holds, which may be copied.
        keys = keys.view_as(keys)
        keys.distattn_layer = self
        return keys, values

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        length, count = self.get_seq_length(), key_states.shape[2]
        if not self._has_room(length + count, (key_states, value_states)):
            self._make_room(key_states, value_states, length, count)
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, length : length + count] = new
        self.keys, self.values = (room[:, :, : length + count] for room in self._room)
        return self.keys, self.values

    def _has_room(self, length: int, new: tuple[Tensor, Tensor]) -> bool:
        """Return whether there is room for so many keys and values, in the type that they have together."""
        if self._room is None:
            return False
        pairs = zip(self._room, new, strict=True)
        return all(
            r.shape[2] >= length
            and len(r) == len(t)
            and torch.promote_types(r.dtype, t.dtype) == r.dtype
            and writable(r)
            for r, t in pairs
        )

    def _make_room(self, key_states: Tensor, value_states: Tensor, length: int, count: int) -> None:
        # A prompt gets little: it may be all there is.
        spare = _LEAST_ROOM if not length else max(_LEAST_ROOM, length // SPARE)
        made = []
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            dtype = torch.promote_types(held.dtype, new.dtype) if length else new.dtype
            room = new.new_empty(*new.shape[:2], length + count + spare, new.shape[3], dtype=dtype)
            if length:
                room[:, :, :length] = held
            made.append(room)
        self._room = tuple(made)

    def derived_for(self, name: Any, kind: type) -> Any:
        """Return what is kept under a name of the keys as `update` returned them, at first a new `kind`."""
        return self.derived.setdefault(name, kind())

    def reset(self) -> None:
        super().reset()
        self.derived, self._room = {}, None

    def offload(self) -> None:
        super().offload()
        self._room = None
        if self.keys is not self._left:
            # It would stay on the device that the keys left.
            self.derived = {}

    def _rows_changed(self, change) -> None:
        """Change what is derived as the keys' rows were."""
        if (known := getattr(self, "distattn_first_queries", None)) is not None:
            self.distattn_first_queries = known.changed(change, id(self))
        if self._owner == id(self):
            for derived in self.derived.values():
                derived.change_rows(change)
            self._room, self._left = None, self.keys

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._rows_changed(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)
        self._rows_changed(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)
        self._rows_changed(lambda tensor: tensor[indices])


def first_queries_of(layer) -> FirstQueries:
    """Return the first queries of the text that a cache layer holds, which it keeps from now on."""
    known = getattr(layer, "distattn_first_queries", None) or FirstQueries()
    layer.distattn_first_queries = known = known.of(id(layer))
    return known


def use_derived_cache(module: nn.Module, args, kwargs) -> None:
    """Make the layer of a model's `DynamicCache` a `DerivedLayer` (forward pre-hook of modules of self-attention).

    Other kinds of layers stay: what is derived from keys is then made anew at every call. For retrieval heads a layer
    of any kind keeps the text's first queries.
    """
    module.distattn.first_queries = None
    if module.distattn.observer is not None or not module.distattn.derives_from_keys:
        return
    cache = given_cache({**(dict(zip(argument_names(type(module)), args)) if args else {}), **kwargs})
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    index = getattr(module, "layer_idx", None)
    if cache is None or index is None:
        return
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if index >= len(cache.layers):
        return
    if type(cache.layers[index]) is DynamicLayer:
        cache.layers[index] = DerivedLayer.from_layer(cache.layers[index])
    if module.distattn.is_retrieval:
        module.distattn.first_queries = first_queries_of(cache.layers[index])
