"""A cache layer for retrieval attention: all keys, and beside them codes and summaries of their blocks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

from .compatibility import given_cache
from .discovery import argument_names
from .retrieval import PANEL, Codes, Retrieval, aligned, encode
from .retrieval_far import FirstQueries, Summaries
from .retrieval_gather import summaries_of

# Keys for which there is room beyond those held, as a share of them, and at least.
_SPARE, _LEAST_ROOM = 4, 64


class _OfKeys:
    """What is made of blocks of keys that come in one after another, a dataclass of tensors, with room for more.

    Only blocks that new keys fall into are made anew, by the same operations as all at once, so that nothing depends on
    how a text was cut.
    """

    def __init__(self):
        self.made = None
        self.size = self.counted = 0
        self.first: Tensor | None = None
        self.keep: Tensor | None = None

    def _goes_on(self, key: Tensor, keep: Tensor | None, first: Tensor, block_size: int) -> bool:
        """Return whether what there is can stay: of the same keys and padding, and of a kind to write into."""
        if self.made is None or self.size != block_size or self.counted > key.shape[2]:
            return False
        like = next(iter(vars(self.made).values()))
        if like.dtype != torch.promote_types(key.dtype, torch.float32) or not _writable(like):
            return False
        if self.first.shape != first.shape or bool((self.first != first).any()):
            return False
        if keep is None or self.keep is None:
            earlier = [k[:, : self.counted] for k in (keep, self.keep) if k is not None]
            return all(bool(k.all()) for k in earlier)
        return not bool((keep[:, : self.counted] != self.keep[:, : self.counted]).any())

    def _start(self, key: Tensor, keep: Tensor | None, first: Tensor | None, block_size: int) -> Tensor:
        """Note what comes, forget what is of other keys, and return the first keys' numbers (B,)."""
        first = torch.zeros(len(key), dtype=torch.long, device=key.device) if first is None else first
        if not self._goes_on(key, keep, first, block_size):
            self.made, self.counted = None, 0
        self.size, self.first, self.keep = block_size, first, keep
        return first

    def _grow(self, like, panels: int) -> None:
        """Make room for so many panels and some more; `like`: what has one axis of panels in each tensor, the third
        or, of a tensor without heads, the second.
        """
        panels += panels // _SPARE + 1
        grown = {}
        for name, tensor in vars(like).items():
            axis = 1 if name == "real" else 2
            old = tensor.narrow(axis, 0, 0) if self.made is None else getattr(self.made, name)
            fill = [0, 0] * (tensor.dim() - axis - 1) + [0, panels - old.shape[axis]]
            grown[name] = F.pad(old, fill)
        self.made = type(like)(**grown)

    def change_rows(self, change) -> None:
        """Apply `change` to every tensor, whose first axis is the batch."""
        if self.made is not None:
            self.made = type(self.made)(**{name: change(tensor) for name, tensor in vars(self.made).items()})
            self.first = change(self.first)
            self.keep = None if self.keep is None else change(self.keep)


def _lanes(start: int, count: int, device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return where `count` blocks stand in panels of their own, (panel, lane), and where from block `start` on."""
    given = torch.arange(count, device=device)
    return given // PANEL, given % PANEL, (start + given) // PANEL, (start + given) % PANEL


class KeyCodes(_OfKeys):
    """The `Codes` of keys; what has no keys yet is not real."""

    def update(self, key: Tensor, keep: Tensor | None, first: Tensor | None, block_size: int) -> Codes:
        """Return the codes of keys (B, H_kv, M, d), of which those counted before have not changed."""
        batch, num_keys = len(key), key.shape[2]
        first = self._start(key, keep, first, block_size)
        if self.made is not None and self.counted == num_keys:
            return self.made
        # A row whose text has not begun has nothing counted.
        start = max(0, int((self.counted - first).min())) // block_size
        count = -(-max(1, num_keys - int(first.min()) - start * block_size) // block_size)
        own = first + start * block_size
        begin = min(int(own.min()), num_keys - 1)
        moved = own - begin if bool((own != begin).any()) else None
        tail = key[:, :, begin:].to(torch.promote_types(key.dtype, torch.float32))
        real = torch.ones(batch, num_keys - begin, dtype=torch.bool, device=key.device)
        if keep is not None:
            real = keep[:, begin:]
            tail = tail.masked_fill(~real[:, None, :, None], 0.0)
        self._write(encode(aligned(tail, moved, 2), aligned(real, moved, 1), block_size), start, count)
        self.counted = num_keys
        return self.made

    def _write(self, new: Codes, start: int, count: int) -> None:
        """Put the first `count` blocks of new codes in from block `start` on."""
        if self.made is None or self.made.mean.shape[2] * PANEL < start + count:
            self._grow(new, -(-(start + count) // PANEL))
        at, lane, panel, own = _lanes(start, count, new.mean.device)
        codes = self.made
        codes.mean[:, :, panel, :, own] = new.mean[:, :, at, :, lane]
        codes.scale[:, :, panel, :, own] = new.scale[:, :, at, :, lane]
        codes.code[:, :, panel, :, own // 8, :, own % 8] = new.code[:, :, at, :, lane // 8, :, lane % 8]
        codes.real[:, panel, own] = new.real[:, at, lane]


class KeySummaries(_OfKeys):
    """The `Summaries` of the blocks whose keys are all there; others no query asks for yet."""

    def update(self, problem: Retrieval) -> Summaries:
        """Return the summaries for a causal problem whose beginning is known, by the keys as the metric takes them."""
        inputs, size = problem.inputs, problem.search.block_size
        keep = None if inputs.keep is None else inputs.keep[:, 0, 0]
        first = self._start(inputs.key, keep, problem.first, size)
        num_keys = inputs.key.shape[2]
        # A row whose text has not begun has nothing counted.
        start = max(0, int((self.counted - first).min())) // size
        stop = max(1, int((num_keys - first).max()) // size)
        if self.made is None or stop > start:
            self._write(summaries_of(problem, start, stop), start, stop - start)
        self.counted = num_keys
        return self.made

    def _write(self, new: Summaries, start: int, count: int) -> None:
        """Put the first `count` blocks of new summaries in from block `start` on."""
        if self.made is None or self.made.key.shape[2] * PANEL < start + count:
            self._grow(new, -(-(start + count) // PANEL))
        at, lane, panel, own = _lanes(start, count, new.key.device)
        summaries = self.made
        summaries.key[:, :, panel, :, own] = new.key[:, :, at, :, lane]
        summaries.bias[:, :, panel, own] = new.bias[:, :, at, lane]
        summaries.value[:, :, panel, own] = new.value[:, :, at, lane]


def _writable(tensor: Tensor) -> bool:
    """Return whether a tensor may be written into here: those made under inference mode may not outside it."""
    return not tensor.is_inference() or torch.is_inference_mode_enabled()


class RetrievalLayer(DynamicLayer):
    """A `DynamicLayer` that keeps codes of its keys, and room for more keys so that a new one does not copy the others.

    Takes whatever a `DynamicLayer` takes: it can be cropped, reordered, copied, offloaded.
    """

    def __init__(self):
        super().__init__()
        self.codes = KeyCodes()
        self.summaries: dict[int, KeySummaries] = {}
        self._room: tuple[Tensor, Tensor] | None = None
        self._owner, self._left = 0, None

    @classmethod
    def from_layer(cls, layer: DynamicLayer) -> "RetrievalLayer":
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
            self.codes, self.summaries, self._room, self._owner = KeyCodes(), {}, None, id(self)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            # Autograd keeps what was returned before: nothing may be written beside it.
            keys, values = super().update(key_states, value_states)
            self._room = None
        else:
            keys, values = self._append(key_states, value_states)
        self._left = self.keys
        # A view of its own, so that the mark is not on the tensor that the cache holds, which may be copied.
        keys = keys.view_as(keys)
        keys.distattn_retrieval = self
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
            and _writable(r)
            for r, t in pairs
        )

    def _make_room(self, key_states: Tensor, value_states: Tensor, length: int, count: int) -> None:
        # A prompt gets little: it may be all there is.
        spare = _LEAST_ROOM if not length else max(_LEAST_ROOM, length // _SPARE)
        made = []
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            dtype = torch.promote_types(held.dtype, new.dtype) if length else new.dtype
            room = new.new_empty(*new.shape[:2], length + count + spare, new.shape[3], dtype=dtype)
            if length:
                room[:, :, :length] = held
            made.append(room)
        self._room = tuple(made)

    def codes_of(self, key: Tensor, keep: Tensor | None, first: Tensor | None, block_size: int) -> Codes:
        """Return the codes of the keys as `update` returned them."""
        return self.codes.update(key, keep, first, block_size)

    def summaries_of(self, number: int, problem: Retrieval) -> Summaries:
        """Return the summaries of the keys for group `number` of a module's heads."""
        return self.summaries.setdefault(number, KeySummaries()).update(problem)

    def reset(self) -> None:
        super().reset()
        self.codes, self.summaries, self._room = KeyCodes(), {}, None

    def offload(self) -> None:
        super().offload()
        self._room = None

    def _rows_changed(self, change) -> None:
        """Change what was made of the keys as their rows were."""
        if (known := getattr(self, "distattn_first_queries", None)) is not None:
            self.distattn_first_queries = known.changed(change, id(self))
        if self._owner == id(self):
            for made in (self.codes, *self.summaries.values()):
                made.change_rows(change)
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


def use_retrieval_cache(module: nn.Module, args, kwargs) -> None:
    """Make the layer of a model's `DynamicCache` a `RetrievalLayer` (forward pre-hook of modules of self-attention).

    Other kinds of layers stay: retrieval attention then makes codes and summaries anew at every call. A layer of any
    kind is given the text's first queries to keep.
    """
    module.distattn.first_queries = None
    if module.distattn.observer is not None or not module.distattn.is_retrieval:
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
    layer = cache.layers[index]
    if type(layer) is DynamicLayer:
        layer = cache.layers[index] = RetrievalLayer.from_layer(layer)
    module.distattn.first_queries = first_queries_of(layer)


def first_queries_of(layer) -> FirstQueries:
    """Return the first queries of the text that a cache layer holds, which it keeps from now on."""
    known = getattr(layer, "distattn_first_queries", None) or FirstQueries()
    layer.distattn_first_queries = known = known.of(id(layer))
    return known
