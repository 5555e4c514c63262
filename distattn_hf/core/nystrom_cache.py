"""A cache layer of constant size for causal Nyström attention: a state per head, the sinks, and the last window."""

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache
from transformers.generation import GenerationMode

from .compatibility import given_cache
from .constant_cache import ConstantLayer, layer_at
from .derived_cache import DerivedLayer
from .discovery import argument_names
from .nystrom_hybrid import FarState
from .parameters import NystromParameters

_TENSORS = ("keys", "values", "keep", "all_keys", "all_values")


class NystromLayer(ConstantLayer):
    """Replaces `DynamicLayer` in any transformers cache; its size does not depend on the tokens seen.

    `update` hands back placeholders of the full length, which take no memory and hold NaN: the attention function takes
    the real keys from the layer (`layer_behind`), which goes with the placeholder. keys and values (B, H_kv, n, d) are
    the last window_size - 1 ones, keep (B, n) which of them are neither padding nor sinks. Query heads in `exact_heads`
    and `retrieval_heads` are not Nyström's: all keys of their key heads are kept, of the former in all_keys and
    all_values, with those of Nyström heads as long as a row of the batch has no more than `exact_below` tokens, and of
    the latter in the layer `retrieved`.

    It cannot be cropped; `copy.deepcopy` of the cache that holds it keeps a state to go back to.
    """

    is_croppable = False

    def __init__(
        self,
        window_size: int,
        exact_heads: tuple[int, ...] = (),
        num_heads: int = 1,
        exact_below: int = 0,
        retrieval_heads: tuple[int, ...] = (),
    ):
        super().__init__()
        self.window_size, self.exact_heads, self.num_heads = window_size, exact_heads, num_heads
        self.exact_below, self.retrieval_heads = exact_below, retrieval_heads
        self.retrieved = DerivedLayer()
        self.keep: Tensor | None = None
        self.state: FarState | None = None
        self._new: tuple[Tensor, Tensor] | None = None
        self._earlier: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.keep = torch.ones(len(key_states), 0, dtype=torch.bool, device=self.device)
        self.num_key_heads = key_states.shape[1]
        groups = self.num_heads // self.num_key_heads
        others = set(range(self.num_heads)) - set(self.retrieval_heads)
        full = others if self.exact_below else self.exact_heads
        self.exact_key_heads, self.full_key_heads, self.retrieved_key_heads = (
            sorted({head // groups for head in heads}) for heads in (self.exact_heads, full, self.retrieval_heads)
        )
        self.all_keys, self.all_values = (t[:, self.full_key_heads, :0] for t in (key_states, value_states))
        # Whether every row of the batch has more tokens than `exact_below`.
        self.is_long = not self.exact_below
        self.is_initialized = True

    def start_from(self, keys: Tensor, values: Tensor) -> None:
        """Begin after the keys (B, H_kv, n, d) and values of a cache that keeps all, such as a prefix."""
        self.lazy_initialization(keys, values)
        self.all_keys, self.all_values = keys[:, self.full_key_heads], values[:, self.full_key_heads]
        self._keep_retrieved(keys, values)
        self.length, self._earlier = keys.shape[2], (keys, values)

    def _keep_retrieved(self, keys: Tensor, values: Tensor) -> None:
        if self.retrieved_key_heads:
            self.retrieved.update(keys[:, self.retrieved_key_heads], values[:, self.retrieved_key_heads])

    def take_earlier(self) -> tuple[Tensor, Tensor] | None:
        """Return keys and values of `start_from` until `put` makes them window and state; else None."""
        earlier, self._earlier = self._earlier, None
        return earlier

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store new keys (B, H_kv, n, d) and values for `take`; returns placeholders of all keys' shape."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._new = key_states, value_states
        if self.full_key_heads:
            self.all_keys = torch.cat([self.all_keys, key_states[:, self.full_key_heads]], dim=2)
            self.all_values = torch.cat([self.all_values, value_states[:, self.full_key_heads]], dim=2)
        self._keep_retrieved(key_states, value_states)
        self.length += key_states.shape[2]
        return self._placeholder(key_states), self._placeholder(value_states)

    def _placeholder(self, tensor: Tensor) -> Tensor:
        batch, heads, _, size = tensor.shape
        placeholder = tensor.new_full((1, 1, 1, 1), float("nan")).expand(batch, heads, self.length, size)
        placeholder.distattn_layer = self
        return placeholder

    def take(self, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (key, value, keep) of the window and of the new keys after it, whose padding `keep` (B, n) is."""
        if self._new is None:
            raise RuntimeError("the keys of this cache layer were taken already: update it before each attention call")
        (key, value), self._new = self._new, None
        if not self.keys.shape[2] == self.values.shape[2] == self.keep.shape[1]:
            raise ValueError(
                f"Nyström attention: keys of its cache layer were replaced from outside, {self.keys.shape[2]} in the "
                f"place of the window's {self.keep.shape[1]} (by a press of kvpress, say). All keys before the window "
                "are one sum, so none can be taken out: press a retrieval or exact model"
            )
        if not self.keys.shape[2]:
            return key, value, keep
        return (
            torch.cat([self.keys, key], dim=2),
            torch.cat([self.values, value], dim=2),
            torch.cat([self.keep, keep], dim=1),
        )

    def put(self, key: Tensor, value: Tensor, keep: Tensor, state: FarState) -> None:
        """Store the last window_size - 1 of the keys that `take` gave, and the state of all before them."""
        start = max(0, key.shape[2] - max(0, self.window_size - 1))
        # Copies: a slice would keep the whole prompt alive.
        self.keys, self.values = key[:, :, start:].clone(), value[:, :, start:].clone()
        self.keep, self.state = keep[:, start:].clone(), state

    def forget_early_keys(self) -> None:
        """Keep all keys of the exact heads only, from here on: no later query sees few keys."""
        self.is_long = True
        if self.full_key_heads != self.exact_key_heads:
            columns = [self.full_key_heads.index(head) for head in self.exact_key_heads]
            self.all_keys, self.all_values = self.all_keys[:, columns].clone(), self.all_values[:, columns].clone()
            self.full_key_heads = self.exact_key_heads

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reset(self) -> None:
        self.keys = self.values = self.keep = self.all_keys = self.all_values = None
        self.state = self._new = self._earlier = None
        self.length, self.is_initialized = 0, False
        self.retrieved = DerivedLayer()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "a Nyström cache cannot be cropped: tokens that left the window are sums by now. Keep "
                "copy.deepcopy(cache) from before them, and go on from that"
            )

    def _rows(self, change) -> None:
        if self.is_initialized:
            for name in _TENSORS:
                setattr(self, name, change(getattr(self, name)))
        if self.state is not None:
            state = self.state
            tensors = (state.total, state.weight, state.sink_key, state.sink_value, state.sink_position)
            self.state = FarState(*map(change, tensors), state.length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.retrieved.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)
        self.retrieved.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)
        self.retrieved.batch_select_indices(indices)

    def nbytes(self) -> int:
        """Return the bytes of all tensors held."""
        tensors = [getattr(self, name) for name in _TENSORS] if self.is_initialized else []
        if self.state is not None:
            tensors += [t for t in vars(self.state).values() if isinstance(t, Tensor)]
        if self.retrieved.is_initialized:
            made = [derived.made for derived in self.retrieved.derived.values()]
            tensors += self.retrieved.first_queries.tensors()
            tensors += [self.retrieved.keys, self.retrieved.values, *(t for m in made if m for t in vars(m).values())]
        return sum(t.numel() * t.element_size() for t in tensors)


class RefusesAssistance:
    """Mixin before `PreTrainedModel` that refuses, before it begins, a generation that would have to remove tokens."""

    def _validate_generation_mode(self, generation_mode, *args, **kwargs):
        if self._is_stateful and generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "assisted generation (assistant_model, prompt_lookup_num_tokens, assistant_early_exit) takes tokens "
                f"back, which the cache of {type(self).__name__} cannot: with Nyström attention, tokens that left the "
                "window are sums. Generate without it, or with a model of exact attention"
            )
        super()._validate_generation_mode(generation_mode, *args, **kwargs)


def layer_behind(key: Tensor) -> NystromLayer | None:
    """Return the cache layer of placeholder `key`, or None; raises `RuntimeError` for a placeholder that lost it."""
    layer = getattr(key, "distattn_layer", None)
    if layer is None and key.stride() == (0, 0, 0, 0) and key.numel() > 1:
        raise RuntimeError(
            "the model changed the keys between its cache and its attention; Nyström attention with a cache needs them "
            "as the cache gave them. Pass use_cache=False"
        )
    return layer


def use_nystrom_cache(module: nn.Module, args, kwargs) -> None:
    """Put a `NystromLayer` into the model's cache for a causal Nyström module (forward pre-hook).

    Keys that the cache holds already, all of them, become a window and a state at the attention call. Raises
    `ValueError` for a cache of another kind (static, quantised, sliding, offloading).
    """
    # A conversion looks at whole sequences, and may have left every head of the module exact.
    if module.distattn.observer is not None or not module.distattn.is_nystrom:
        return
    arguments = {**(dict(zip(argument_names(type(module)), args)) if args else {}), **kwargs}
    cache = given_cache(arguments)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache is None:
        return
    index = getattr(module, "layer_idx", None)
    if index is None:
        raise ValueError(f"Nyström attention with a cache needs layer_idx in {type(module).__name__}, which has none")
    layer = layer_at(cache, index)
    if isinstance(layer, NystromLayer):
        return
    if cache.offloading:
        raise ValueError(
            "Nyström attention keeps a cache of its own kind, of constant size, which is not offloaded; got a "
            f"{type(cache).__name__} with offloading. Leave cache_implementation at its default, not 'offloaded'"
        )
    if type(layer) is not DynamicLayer:
        raise ValueError(
            f"Nyström attention keeps a cache of its own kind in a DynamicCache; got {type(cache).__name__} with "
            f"{type(layer).__name__} (a static, quantized or sliding cache). Leave cache_implementation at its default"
        )
    state = module.distattn
    far_group, exact_heads, retrieval_heads = None, [], []
    for heads, group in state.parts():
        if isinstance(group, NystromParameters):
            far_group = group
        else:
            retrieves = group is not None and group.spec.mechanism == "retrieval"
            (retrieval_heads if retrieves else exact_heads).extend(heads)
    new = NystromLayer(
        far_group.spec.window_size, tuple(exact_heads), state.num_heads, far_group.spec.exact_below or 0,
        tuple(retrieval_heads),
    )  # fmt: skip
    if layer.get_seq_length():
        new.start_from(layer.keys, layer.values)
    cache.layers[index] = new
