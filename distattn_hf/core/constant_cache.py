"""Cache layers whose size does not grow with the text: sums of what was read, or the last keys that are reached."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


class ConstantLayer(CacheLayerMixin):
    """A layer that counts its tokens and holds tensors whose first axis is the batch; `_rows` says which."""

    is_sliding = False
    is_compileable = False
    length = 0

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to every tensor held."""
        raise NotImplementedError

    def nbytes(self) -> int:
        """Return the bytes of all tensors held."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._rows(lambda tensor: tensor[indices])

    def offload(self) -> None:
        raise ValueError(
            f"{type(self).__name__} is not offloaded (its size is constant); leave the cache's offloading at False"
        )


class RecurrentLayer(ConstantLayer):
    """Keeps what a mechanism summed up of keys and values, in place of them: Σ_j φ(k_j)[v_j, 1]ᵀ.

    state: the mechanism's tensors, each (B, H, ...), in at least float32, or None before the first. keys and values
    (B, H_kv, n, d) are those that are not in the state yet: between calls none, unless transformers records the past,
    as it does for assisted generation. Then those since the last `crop` are kept, and can be taken back.
    """

    def __init__(self):
        super().__init__()
        self.state: tuple[Tensor, ...] | None = None
        self.record_past = False
        # How many of the keys no `crop` can take back, so that the next call adds them to the state.
        self.settled = 0

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back: where the past is recorded."""
        return self.record_past

    def activate_past_recording(self) -> None:
        """Keep the keys that come until `crop` says how many of them stay."""
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    @classmethod
    def from_layer(cls, layer: DynamicLayer) -> "RecurrentLayer":
        """Return a layer that goes on from the keys of a `DynamicLayer`, such as a prefix."""
        new = cls()
        if layer.get_seq_length():
            new.update(layer.keys, layer.values)
        return new

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take new keys and values (B, H_kv, n, d); returns those that are not in the state, by which it is found."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        self.length += key_states.shape[2]
        if not self.record_past:
            self.settled = self.keys.shape[2]
        # A view of its own, so that the mark is not on the tensor that the cache holds, which may be copied.
        keys = self.keys.view_as(self.keys)
        keys.distattn_layer = self
        return keys, self.values

    def put(self, state: tuple[Tensor, ...]) -> None:
        """Store the state after the settled keys, which are dropped."""
        self.state = state
        self.keys, self.values = (t[:, :, self.settled :].clone() for t in (self.keys, self.values))
        self.settled = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        waiting = self.keys.shape[2] if self.is_initialized else 0
        return waiting + query_length, self.length - waiting

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove tokens; raises `ValueError` for tokens that are sums by now."""
        waiting = self.keys.shape[2] if self.is_initialized else 0
        if not -waiting <= tokens_to_remove <= 0:
            raise ValueError(
                f"crop takes minus the number of tokens to remove, here {waiting} at most, got {tokens_to_remove}: "
                "tokens before them are sums by now. Keep copy.deepcopy(cache) from before them, or call "
                "cache.activate_past_recording() once it holds its first tokens, which keeps what comes until the "
                "next crop"
            )
        if waiting:
            self.settled = waiting + tokens_to_remove
            self.length += tokens_to_remove
            self.keys, self.values = self.keys[:, :, : self.settled], self.values[:, :, : self.settled]

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
        if self.state is not None:
            self.state = tuple(map(change, self.state))

    def reset(self) -> None:
        self.keys = self.values = self.state = None
        self.length, self.settled, self.is_initialized = 0, 0, False

    def nbytes(self) -> int:
        """Return the bytes of all tensors held."""
        held = [self.keys, self.values] if self.is_initialized else []
        return sum(t.numel() * t.element_size() for t in [*held, *(self.state or ())])


class RingLayer(DynamicSlidingWindowLayer):
    """transformers' layer of the last keys, `reach` of them: so far back a query looks.

    Without the prompt that they were cut from, but for its global tokens, which every query looks back to.
    """

    # Of global tokens: key and value (B, H_kv, G, ...), and places in the text (B, G), -1 where a row has fewer.
    global_tokens: tuple[Tensor, Tensor, Tensor] | None = None

    def __init__(self, reach: int):
        # One more, the query's own key; transformers' layer of a window of one would keep every key.
        super().__init__(max(reach, 1) + 1)

    @classmethod
    def from_layer(cls, layer: DynamicLayer, reach: int) -> "RingLayer":
        """Return a layer that goes on from the keys of a `DynamicLayer`, such as a prefix."""
        new = cls(reach)
        if layer.get_seq_length():
            new.lazy_initialization(layer.keys, layer.values)
            new.keys, new.values, new.cumulative_length = layer.keys, layer.values, layer.get_seq_length()
        return new

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, H_kv, n, d); returns those held before and these."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if keys.shape[2] > self.keys.shape[2] + 1:
            # A slice would keep all of it alive.
            self.keys, self.values = self.keys.clone(), self.values.clone()
        # A view of its own, so that the mark is not on the tensor that the cache holds, which may be copied.
        keys = keys.view_as(keys)
        keys.distattn_layer = self
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Beside global tokens mask and bias are those of the whole text, from which each takes its own.
        if self.global_tokens is not None:
            return self.cumulative_length + query_length, 0
        return super().get_mask_sizes(query_length)

    def check_global(self, is_global: Tensor) -> None:
        """Raise `ValueError` where global tokens (B, M) of a text, M - N of which are here, are not to be had."""
        past = self.cumulative_length
        known = torch.zeros_like(is_global[:, :past])
        if self.global_tokens is not None:
            places = self.global_tokens[2]
            row, number = ((places >= 0) & (places < past)).nonzero(as_tuple=True)
            known[row, places[row, number]] = True
        if not torch.equal(known, is_global[:, :past]):
            raise ValueError(
                "global_attention_mask must say of the tokens in the cache what it said when they came, got others"
            )
        if past >= self.sliding_window and bool(is_global[:, past:].any()):
            raise ValueError(
                f"global_attention_mask: a token after the first {past} would see all of them, of which the cache has "
                f"kept {self.sliding_window - 1}; read the text up to its last global token in one call, or pass "
                "use_cache=False"
            )

    def keep_global(self, is_global: Tensor, key: Tensor, value: Tensor, num_new: int) -> tuple[Tensor, ...] | None:
        """Keep the new ones of a text's global tokens (B, M), given as `update` returned them after num_new tokens.

        Returns (key, value, places) of those that stand before these keys, or None.
        """
        past, first = is_global.shape[1] - num_new, is_global.shape[1] - key.shape[2]
        held, start = self.global_tokens, first
        if held is not None:
            # Some may have been taken back.
            held, start = (*held[:2], held[2].masked_fill(held[2] >= past, -1)), past
        if bool(is_global[:, start:].any()):
            places, exists = chosen_first(is_global[:, start:])
            index = (places + start - first)[:, None, :, None]
            new = [t.gather(2, index.expand(-1, t.shape[1], -1, t.shape[3])) for t in (key, value)]
            new.append((places + start).masked_fill(~exists, -1))
            held = new if held is None else [torch.cat(pair, dim=a) for pair, a in zip(zip(held, new), (2, 2, 1))]
        self.global_tokens = None if held is None else tuple(held)
        if held is None or not bool(((held[2] >= 0) & (held[2] < first)).any()):
            return None
        return *held[:2], held[2].masked_fill(held[2] >= first, -1)

    def nbytes(self) -> int:
        """Return the bytes of all tensors held."""
        held = [self.keys, self.values] if self.is_initialized else []
        return sum(t.numel() * t.element_size() for t in [*held, *(self.global_tokens or ())])

    def _global_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.global_tokens is not None:
            self.global_tokens = tuple(map(change, self.global_tokens))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._global_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)
        self._global_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)
        self._global_rows(lambda tensor: tensor[indices])

    def reset(self) -> None:
        super().reset()
        self.global_tokens = None


def chosen_first(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return (places (B, G) of the chosen (B, n), in order; which of them there are): G is the most of a row, or 1."""
    places = chosen.int().argsort(dim=-1, descending=True, stable=True)
    places = places[:, : max(1, int(chosen.sum(-1).max()))]
    return places, chosen.gather(1, places)


def layer_at(cache: Cache, index: int) -> CacheLayerMixin | None:
    """Return layer `index` of a cache, made now where the cache makes its layers as they are needed; None without."""
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[index] if index < len(cache.layers) else None
