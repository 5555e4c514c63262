"""Nyström attention inside a model: what transformers hands over -> `hybrid_attention`, with or without a cache."""

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from .cache import layer_behind
from .hybrid import HybridInputs, WindowBias, hybrid_attention
from .masks import causal_keep
from .parameters import NystromParameters
from .reference import reference_hybrid


def padding_mask(
    kv_length: int,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    **unused,
) -> Tensor | None:
    """Mask function of models with Nyström attention: which keys are padding, (B, 1, 1, M) bool, or None for none.

    Causality is left to the attention function, so that no (N, M) mask is made. Raises `ValueError` for a pattern that
    is neither causal nor bidirectional.
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise ValueError(
            "Nyström attention takes causal and bidirectional masks with padding; this call asks for another pattern "
            "(a sliding window, packed sequences or a mask function of the model's own)"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    mask = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if mask.shape[1] < kv_length:
        # transformers' own rule: what the mask does not reach is not there yet.
        mask = torch.nn.functional.pad(mask, (0, kv_length - mask.shape[1]), value=False)
    return mask[:, None, None, :]


def written_out(mask: Tensor | None, num_queries: int, num_keys: int, is_causal: bool, device) -> Tensor | None:
    """The (.., N, M) mask that exact attention needs, from a padding mask; None where there is nothing to mask."""
    if not is_causal or num_queries == 1:
        return mask
    triangle = causal_keep(num_queries, num_keys, device, offset=num_keys - num_queries)[None, None]
    return triangle if mask is None else triangle & mask


def key_padding(mask: Tensor | None, query: Tensor, length: int) -> Tensor:
    """keep (B, M) of the last M keys, from a padding mask (B or 1, 1, 1, at least M)."""
    if mask is None:
        return torch.ones(len(query), length, dtype=torch.bool, device=query.device)
    if mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[2] != 1:
        raise ValueError(
            f"Nyström attention needs a padding mask (B, M), got {mask.dtype} of shape {tuple(mask.shape)}: it never "
            "forms the (N, M) entries that another mask speaks of"
        )
    return mask[:, 0, 0, -length:].expand(len(query), length)


def window_bias(position_bias: Tensor | None, window_size: int, is_causal: bool) -> WindowBias | None:
    """T5's bias (1, H, N, M) as a function of the relative position; None where it is zero everywhere.

    Raises `ValueError` where it is not constant from window_size on.
    """
    if position_bias is None:
        return None
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
            raise ValueError(
                f"window_size={window_size} is too small for this model's relative position bias, which is not "
                "constant from there on; set it to at least config.relative_attention_max_distance"
            )
    # No key stands beyond the window: any value will do.
    sides = [rest[:, 0] if rest.numel() else near.new_zeros(heads) for rest in beyond]
    return WindowBias(near, sides[0], sides[-1])


def nystrom_forward(state, query, key, value, call: dict, attend) -> tuple[Tensor, Tensor | None]:
    """Attention of a module with Nyström heads: (output (B, H, N, d_v), weights (B, H, N, M) when they are asked for).

    `attend` runs the heads that are not Nyström's, on all keys.
    """
    layer, total, num_queries = layer_behind(key), key.shape[2], query.shape[2]
    exact_key, exact_value, keep = key, value, key_padding(call["mask"], query, total)
    if layer is not None:
        exact_key, exact_value = layer.all_keys, layer.all_values
        key, value, keep = layer.take(keep[:, -num_queries:])
    device = query.device
    results = []
    for heads, group in state.parts():
        rows = torch.tensor(heads, device=device)
        mine = dict(call, position_bias=of_heads(call["position_bias"], rows))
        if isinstance(group, NystromParameters):
            columns = rows // (query.shape[1] // key.shape[1])
            tensors = query[:, rows], key[:, columns], value[:, columns]
            output, weights, far_state, near_keep = _far_heads(group, *tensors, keep, mine, layer)
        else:
            columns = _columns(rows, layer, state.num_heads, key.shape[1])
            output, weights = attend(
                group, query[:, rows], exact_key[:, columns], exact_value[:, columns], _exact_call(mine, query, total),
                call["backend"],
            )  # fmt: skip
        results.append((heads, output, weights))
    if layer is not None:
        layer.put(key, value, near_keep, far_state)
    return join_heads(results)


def _far_heads(group, query, key, value, keep, call, layer):
    """(output, weights or None, the state afterwards, keep without the sinks) of the Nyström heads of a module."""
    inputs = hybrid_inputs(group, query, key, value, keep, call, layer.state if layer is not None else None)
    started = layer is not None and layer.length > query.shape[2]
    if call["return_weights"] and started:
        raise ValueError("output_attentions is not available once keys are in a Nyström cache: they are sums by now")
    written_out_too = call["return_weights"] or (call["backend"] == "reference" and not started)
    output, weights = reference_hybrid(inputs) if written_out_too else (None, None)
    far_state = near_keep = None
    if output is None or layer is not None:
        fast, far_state, near_keep = hybrid_attention(inputs)
        output = fast if output is None else output
    weights = weights.to(value.dtype) if call["return_weights"] else None
    return output.to(value.dtype), weights, far_state, near_keep


def _columns(rows: Tensor, layer, num_heads: int, num_key_heads: int) -> Tensor:
    """Where the key heads of some query heads are: among all, or among those that the cache layer keeps in full."""
    columns = rows // (num_heads // num_key_heads)
    if layer is None:
        return columns
    return torch.tensor([layer.exact_key_heads.index(c) for c in columns.tolist()], device=rows.device)


def _exact_call(call: dict, query: Tensor, num_keys: int) -> dict:
    """The call of exact attention on all keys: causality by flag where that is enough, else written into the mask."""
    call = {name: value for name, value in call.items() if name not in ("backend", "is_cross")}
    if call["mask"] is None and query.shape[2] == num_keys:
        return call
    mask = written_out(call["mask"], query.shape[2], num_keys, call["is_causal"], query.device)
    return {**call, "mask": mask, "is_causal": False}


def of_heads(tensor: Tensor | None, index: Tensor) -> Tensor | None:
    """Some heads of a mask or bias (B, H or 1, N, M)."""
    return tensor if tensor is None or tensor.shape[1] == 1 else tensor[:, index]


def join_heads(results: list[tuple[list[int], Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Outputs and weights of groups of heads, (heads, output, weights) each, in the order of the heads."""
    if len(results) == 1:
        return results[0][1:]
    order = [head for heads, *_ in results for head in heads]
    inverse = torch.argsort(torch.tensor(order, device=results[0][1].device))
    outputs, weights = ([result[i] for result in results] for i in (1, 2))
    joined = None if weights[0] is None else torch.cat(weights, dim=1)[:, inverse]
    return torch.cat(outputs, dim=1)[:, inverse], joined


def hybrid_inputs(group, query, key, value, keep, call: dict, state=None) -> HybridInputs:
    """One problem of a group of Nyström heads; key and value have a head for every query head."""
    query, key, far_query, far_key = group.features(query, key, call["scaling"])
    is_causal, window_size = call["is_causal"], 0 if call["is_cross"] else group.spec.window_size
    bias = window_bias(call["position_bias"], window_size, is_causal)
    sinks = 0 if call["is_cross"] else group.spec.num_sinks
    value = value.to(query.dtype)
    return HybridInputs(
        query, key, value, keep, far_query, far_key, sinks, window_size, is_causal, bias, state, call["dropout_p"]
    )
