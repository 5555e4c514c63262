"""A cache layer that keeps, beside its keys, what attention makes of them at every step: codes, mapped keys."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache, StaticLayer
from transformers.generation.continuous_batching import PagedAttentionCache

from .compatibility import given_cache
from .constant_cache import layer_at
from .discovery import argument_names
from .retrieval_far import BEGINNING

# Older releases have one kind of quantised layer.
_QUANTISED = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)
# Keys for which there is room beyond those held, as a share of them, and at least.
SPARE, _LEAST_ROOM = 4, 64


def writable(tensor: Tensor) -> bool:
    """Return whether a tensor may be written into here: those made under inference mode may not outside it."""
    return not tensor.is_inference() or torch.is_inference_mode_enabled()


def same_values(before: list[Tensor], now: list[Tensor]) -> bool:
    """Return whether parameters are what they were, by value: offloaded ones come in a tensor that is new each time."""
    return len(before) == len(now) and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(before, now, strict=True)
    )


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
        return same_values(self._parameters, parameters)

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
    """A model's first BEGINNING queries of each row of a text that comes in parts, for each group of a module's heads.

    They stand by their places, so that a text that is cut short, or begins anew, overwrites what it must. Each call has
    an object of its own, and tensors are never written into: copies of a cache share them until they go on.
    """

    def __init__(self, rows: dict[int, tuple[Tensor, int, Tensor] | None] | None = None):
        # Of each group: queries (B, H, n, d), how many keys there were, the first key of each row; None: not noted.
        self._rows = dict(rows or {})

    def leave_out(self, number: int) -> None:
        """Note that a group needs no beginning of this text."""
        self._rows[number] = None

    def update(self, number: int, query: Tensor, num_keys: int, first: Tensor | None) -> Tensor | None:
        """Return the beginning of group `number` as `Retrieval` has it, after the last queries (B, H, N, d) of M keys.

        None where queries before them are not known. Raises `ValueError` where the text began without need of them.
        """
        before, count = num_keys - query.shape[2], min(BEGINNING, num_keys)
        if before and self._rows.get(number, ()) is None:
            raise ValueError(
                "the cache was begun with other options of retrieval (cluster_keys or far_field), under which a text's "
                "first queries are not kept; begin the text anew"
            )
        offset = torch.zeros(1, dtype=torch.long, device=query.device) if first is None else first
        known = self._goes_on(number, query, before, offset if first is not None else None) if before else None
        if before and known is None:
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
        self._rows[number] = known, num_keys, offset.expand(len(query))
        return known

    def _goes_on(self, number: int, query: Tensor, before: int, first: Tensor | None) -> Tensor | None:
        """Return the queries of a group if those before place `before` are known, counted from the same keys."""
        known, reach, counted = self._rows.get(number) or (None, 0, None)
        if known is None or reach < before or known.shape[:2] != query.shape[:2] or known.device != query.device:
            return None
        if first is None:
            return known if not counted.any() else None
        # A row that had no key yet may begin anywhere behind.
        return known if bool(((counted == first) | (first >= before)).all()) else None

    def tensors(self) -> list[Tensor]:
        """Return what is held."""
        return [noted[0] for noted in self._rows.values() if noted]

    def changed(self, change) -> "FirstQueries":
        """Return these with `change` applied to every tensor, whose first axis is the batch."""
        return FirstQueries(
            {n: noted and (change(noted[0]), noted[1], change(noted[2])) for n, noted in self._rows.items()}
        )


class KeepsFirstQueries:
    """A cache layer whose first queries follow its rows."""

    first_queries = FirstQueries()

    def change_first_queries(self, change) -> None:
        """Apply `change`, whose first axis is the batch."""
        self.first_queries = self.first_queries.changed(change)

    def first_queries_for_call(self) -> FirstQueries:
        """Return the first queries of the text so far, which a call may go on with, as this layer's from now on."""
        self.first_queries = FirstQueries(self.first_queries._rows)
        return self.first_queries


class FirstQueriesBeside(KeepsFirstQueries):
    """Mixin before a layer of transformers that keeps the text's first queries beside its keys."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.change_first_queries(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def reset(self) -> None:
        super().reset()
        self.first_queries = FirstQueries()


class FirstQueriesStaticLayer(FirstQueriesBeside, StaticLayer):
    """A `StaticLayer` that keeps the text's first queries."""


@lru_cache
def _beside(kind: type) -> type:
    """Return the class of quantised layers `kind` with first queries, which a batch's rows can follow."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        kind.batch_repeat_interleave(self, repeats)
        self.change_first_queries(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        kind.batch_select_indices(self, indices)
        self.change_first_queries(lambda tensor: tensor[indices])

    methods = {"batch_repeat_interleave": batch_repeat_interleave, "batch_select_indices": batch_select_indices}
    return type(f"FirstQueries{kind.__name__}", (FirstQueriesBeside, kind), methods)


class DerivedLayer(KeepsFirstQueries, DynamicLayer):
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
        self.derived, self._room, self.first_queries = {}, None, FirstQueries()

    def offload(self) -> None:
        super().offload()
        self._room = None
        if self.keys is not self._left:
            # It would stay on the device that the keys left.
            self.derived = {}

    def _rows_changed(self, change) -> None:
        """Change what is derived as the keys' rows were."""
        self.change_first_queries(change)
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


def keeping_layer(cache, index: int):
    """Return layer `index` of a cache: a `DerivedLayer` in place of a `DynamicLayer`, or None where there is none yet.

    A `StaticLayer`, and a quantised one, becomes one that keeps first queries; other kinds stay as they are.
    """
    layer = layer_at(cache, index)
    if isinstance(layer, _QUANTISED) and not isinstance(layer, KeepsFirstQueries):
        return _put(cache, index, _beside(type(layer)))
    if type(layer) is DynamicLayer:
        layer = cache.layers[index] = DerivedLayer.from_layer(layer)
    elif type(layer) is StaticLayer:
        layer = _put(cache, index, FirstQueriesStaticLayer)
    return layer


def _put(cache, index: int, kind: type):
    """Return layer `index` of a cache, which becomes one of a class `kind` that adds no state to its own."""
    kept = kind.__new__(kind)
    vars(kept).update(vars(cache.layers[index]))
    cache.layers[index] = kept
    return kept


def use_derived_cache(module: nn.Module, args, kwargs) -> None:
    """Make the layer of a model's `DynamicCache` a `DerivedLayer` (forward pre-hook of modules of self-attention).

    Other kinds of layers stay, and paged caches: what is derived from keys is then made anew at every call. Static and
    quantised layers keep the text's first queries for retrieval heads, too.
    """
    module.distattn.first_queries = None
    if module.distattn.observer is not None or not module.distattn.derives_from_keys:
        return
    arguments = {**(dict(zip(argument_names(type(module)), args)) if args else {}), **kwargs}
    if any(isinstance(value, PagedAttentionCache) for value in arguments.values()):
        return
    cache = given_cache(arguments)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    index = getattr(module, "layer_idx", None)
    if cache is None or index is None:
        return
    layer = keeping_layer(cache, index)
    if module.distattn.is_retrieval and isinstance(layer, KeepsFirstQueries):
        module.distattn.first_queries = layer.first_queries_for_call()
