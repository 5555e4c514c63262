"""What groups of heads of one module share: the padding of their keys, exact attention, and the joined output."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .inputs import ModuleCall, add_triangle
from .parameters import HeadParameters
from .relative_bias import as_tensor


def key_heads_of(heads: list[int], groups: int) -> list[int]:
    """Return each key head of query heads once, where all `groups` of its query heads are there; else one for each."""
    columns = [head // groups for head in heads]
    whole = columns[::groups]
    is_whole = [column for column in whole for _ in range(groups)] == columns and len(set(whole)) == len(whole)
    return whole if is_whole else columns


def key_padding(mask: Tensor | None, query: Tensor, length: int) -> Tensor:
    """Return keep (B, M) of the last M keys, from a padding mask (B or 1, 1, 1, at least M)."""
    if mask is None:
        return torch.ones(len(query), length, dtype=torch.bool, device=query.device)
    if mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[2] != 1:
        raise ValueError(
            f"Nyström and retrieval attention need a padding mask (B, M), got {mask.dtype} of shape "
            f"{tuple(mask.shape)}: they never form the (N, M) entries that another pattern speaks of (a sliding "
            "window, packed sequences, a mask of the model's own or of the caller's, or, under torch.compile, no "
            "attention_mask: pass one)"
        )
    return mask[:, 0, 0, -length:].expand(len(query), length)


def write_out(call: ModuleCall, num_queries: int, num_keys: int, device: torch.device) -> ModuleCall:
    """Return the call as exact attention needs it, from that of `padding_mask`: causal mask, bias as a tensor."""
    mask, bias = call.mask, as_tensor(call.position_bias, num_queries, num_keys)
    if call.is_causal and num_queries > 1 and (mask is None or mask.shape[2] == 1):
        mask = add_triangle(mask, num_queries, num_keys, device, offset=num_keys - num_queries)
    return replace(call, mask=mask, position_bias=bias)


def exact_heads(
    attend: Callable, group: HeadParameters | None, query: Tensor, key: Tensor, value: Tensor, call: ModuleCall
) -> tuple[Tensor, Tensor | None]:
    """Run exact attention of the last N of M keys' queries: causality by flag where that suffices, else by mask."""
    by_flag = call.mask is None and query.shape[2] == key.shape[2]
    call = call if by_flag else write_out(call, query.shape[2], key.shape[2], query.device)
    bias = as_tensor(call.position_bias, query.shape[2], key.shape[2])
    return attend(group, query, key, value, replace(call, position_bias=bias, is_causal=by_flag and call.is_causal))


def join_heads(results: list[tuple[list[int], Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Join outputs and weights of groups of heads, (heads, output, weights) each, in the order of the heads."""
    if len(results) == 1:
        return results[0][1:]
    order = [head for heads, *_ in results for head in heads]
    inverse = torch.argsort(torch.tensor(order, device=results[0][1].device))
    outputs, weights = ([result[i] for result in results] for i in (1, 2))
    joined = None if weights[0] is None else torch.cat(weights, dim=1)[:, inverse]
    return torch.cat(outputs, dim=1)[:, inverse], joined
