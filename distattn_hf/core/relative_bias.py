"""T5's relative position bias as a function of the distance, which Nyström attention never writes out as (N, M)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from .compatibility import given_cache
from .discovery import argument_names
from .nystrom_hybrid import WindowBias


@dataclass(frozen=True)
class RelativeBias:
    """The bias that a T5 attention module would add, in lazy form; `past` keys come before the first query.

    look_up: buckets (...) -> the bias of all heads (..., H). device: where. heads: which of them; None: all.
    """

    module: nn.Module
    past: int
    look_up: Callable[[Tensor], Tensor]
    device: torch.device
    heads: Tensor | None = None

    @classmethod
    def from_module(cls, module: nn.Module, past: int, device: torch.device) -> "RelativeBias":
        """Make the bias of a T5 attention module; its weights are read now, as they may be elsewhere later."""
        table = module.relative_attention_bias(torch.arange(module.relative_attention_num_buckets, device=device))
        return cls(module, past, partial(_rows, table), device)

    def of(self, heads: Tensor) -> "RelativeBias":
        """Return the bias of some heads."""
        return replace(self, heads=heads if self.heads is None else self.heads[heads])

    def _buckets(self, relative: Tensor) -> Tensor:
        m = self.module
        sizes = {"num_buckets": m.relative_attention_num_buckets, "max_distance": m.relative_attention_max_distance}
        return m._relative_position_bucket(relative, bidirectional=not m.is_decoder, **sizes)

    def at(self, relative: Tensor) -> Tensor:
        """Return the bias (H, ...) at relative positions (...), key's minus query's."""
        values = self.look_up(self._buckets(relative)).movedim(-1, 0)
        return values if self.heads is None else values[self.heads]

    def written_out(self, num_queries: int, num_keys: int) -> Tensor:
        """Return the bias as a tensor (1, H, N, M)."""
        query, key = (torch.arange(n, device=self.device) for n in (num_queries, num_keys))
        return self.at(key - query[:, None] - self.past)[None]

    def window(self, window_size: int, num_keys: int, is_causal: bool) -> WindowBias:
        """Return the bias as a table; raises `ValueError` unless it is constant from window_size on, in num_keys."""
        largest = max(num_keys - 1, window_size)
        end_buckets = self._buckets(torch.tensor([-largest, -window_size, window_size, largest])).tolist()
        if end_buckets[0] != end_buckets[1] or (not is_causal and end_buckets[2] != end_buckets[3]):
            raise ValueError(_TOO_SMALL.format(window_size))
        table = self.at(torch.arange(-window_size, window_size + 1, device=self.device))
        table = table if table.dtype == torch.float64 else table.float()
        return WindowBias(table[:, 1:-1], table[:, 0], table[:, -1])


def _rows(table: Tensor, numbers: Tensor) -> Tensor:
    return nn.functional.embedding(numbers, table)


_TOO_SMALL = (
    "window_size={} is too small for this model's relative position bias, which is not constant from there on; set it "
    "to at least config.relative_attention_max_distance"
)
_ATTRIBUTE = "distattn_bias"


def give_relative_bias(module: nn.Module, args, kwargs):
    """Pass T5's attention a placeholder, shared by later layers, in place of the (N, M) bias (forward pre-hook).

    The attention function takes the real one from it by `bias_behind`.
    """
    if kwargs.get("position_bias") is not None or len(args) > 1:
        return args, kwargs
    bias, device = None, (args[0] if args else kwargs["hidden_states"]).device
    if module.has_relative_attention_bias:
        cache = given_cache(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length(module.layer_idx))
        bias = RelativeBias.from_module(module, past, device)
    placeholder = torch.full((1, 1, 1, 1), float("nan"), device=device)
    setattr(placeholder, _ATTRIBUTE, bias)
    return args, {**kwargs, "position_bias": placeholder}


def has_relative_bias(module: nn.Module) -> bool:
    """Return whether an attention module makes its position bias the way T5 does, and takes one made before."""
    needed = ("has_relative_attention_bias", "_relative_position_bucket", "compute_bias", "q")
    return all(hasattr(module, name) for name in needed) and "position_bias" in argument_names(type(module))


def bias_behind(position_bias: Tensor | None) -> Tensor | RelativeBias | None:
    """Return what a placeholder stands for, or the tensor itself; raises `RuntimeError` where that is lost."""
    if position_bias is None or hasattr(position_bias, _ATTRIBUTE):
        return getattr(position_bias, _ATTRIBUTE, None)
    if position_bias.numel() == 1 and bool(position_bias.isnan().any()):
        raise RuntimeError(
            "the model copied its position bias between layers (reentrant gradient checkpointing, or layers on several "
            "devices), so that Nyström or retrieval attention lost it; use gradient checkpointing with "
            "use_reentrant=False"
        )
    return position_bias


def as_tensor(bias: Tensor | RelativeBias | None, num_queries: int, num_keys: int) -> Tensor | None:
    """Return the bias (1, H, N, M) of the first N queries on the first M keys."""
    if isinstance(bias, RelativeBias):
        return bias.written_out(num_queries, num_keys)
    return bias if bias is None else bias[:, :, :num_queries, :num_keys]


def of_heads(tensor: Tensor | RelativeBias | None, index: Tensor) -> Tensor | RelativeBias | None:
    """Return some heads of a mask or bias (B, H or 1, N, M)."""
    if isinstance(tensor, RelativeBias):
        return tensor.of(index)
    return tensor if tensor is None or tensor.shape[1] == 1 else tensor[:, index]


def window_bias(
    position_bias: Tensor | RelativeBias | None, window_size: int, num_keys: int, is_causal: bool
) -> WindowBias | None:
    """Return a bias (1, H, N, M) as a function of the relative position; None where it is zero everywhere.

    Raises `ValueError` where it is not constant from window_size on.
    """
    if position_bias is None:
        return None
    if isinstance(position_bias, RelativeBias):
        if not window_size:
            raise ValueError("window_size=0 cannot carry a relative position bias; set window_size")
        return position_bias.window(window_size, num_keys, is_causal)
    bias = position_bias[0].float() if position_bias.dtype != torch.float64 else position_bias[0]
    heads, _, num_keys = bias.shape
    if position_bias.shape[0] != 1:
        raise ValueError(f"position_bias must be the same for the whole batch, got shape {tuple(position_bias.shape)}")
    if not window_size:
        if bool((bias != bias[..., :1, :1]).any()):
            raise ValueError("window_size=0 cannot carry a relative position bias; set window_size")
        return None
    reach = window_size - 1
    # Row N - 1 holds what lies behind a query, row 0 what lies ahead.
    last, first = bias[:, -1], bias[:, 0]
    near = bias.new_zeros(heads, 2 * reach + 1)
    count = min(window_size, num_keys)
    near[:, window_size - count : window_size] = last[:, num_keys - count :]
    beyond = [last[:, : num_keys - count]]
    if not is_causal:
        near[:, reach : reach + count] = first[:, :count]
        beyond.append(first[:, count:])
    for rest in beyond:
        if rest.numel() and bool((rest != rest[:, :1]).any()):
            raise ValueError(_TOO_SMALL.format(window_size))
    # No key stands beyond the window: any value will do.
    sides = [rest[:, 0] if rest.numel() else near.new_zeros(heads) for rest in beyond]
    return WindowBias(near, sides[0], sides[-1])
