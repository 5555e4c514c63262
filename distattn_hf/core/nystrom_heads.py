"""Nyström attention inside a model: from transformers' arguments to `hybrid_attention`, with or without a cache."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.utils import logging

from .attention_spec import version_note
from .head_groups import exact_heads, join_heads, key_heads_of, key_padding
from .inputs import ModuleCall, refuse_onnx, surely
from .nystrom_cache import NystromLayer, layer_behind
from .nystrom_hybrid import FarState, HybridInputs, advance, hybrid_attention
from .parameters import DistanceAttentionState, HeadParameters, NystromParameters
from .reference import reference_hybrid
from .relative_bias import of_heads, window_bias
from .retrieval_heads import retrieve

logger = logging.get_logger(__name__)

# Tokens up to which exact attention is worth its cache and its time: it loses nothing there.
SHORT_TEXT = 2048


def padding_mask(
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    batch_size: int = 1,
    device: torch.device | None = None,
    **unused,
) -> Tensor | None:
    """Return which keys are padding, (B, 1, 1, M) bool, or None for none: mask function of models with Nyström heads.

    Causality is left to the attention function, so that no (N, M) mask is made. Any other pattern (sliding layers
    beside full ones, packed sequences) is written out as transformers does, (B, 1, N, M), for layers of exact
    attention; Nyström and retrieval heads refuse it. For a cache with places that are not filled yet it is as long as
    those that are.
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        # Never left to a flag: None would mean causal or bidirectional here.
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(
            q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, batch_size=batch_size, device=device,
            **{**unused, **skips},
        )  # fmt: skip
    if mask_function is causal_mask_function and (seen := int(q_offset) + q_length) < kv_length:
        # A static cache: as much mask as there are keys says which places are not filled yet.
        if attention_mask is None:
            attention_mask = torch.ones(batch_size, seen, dtype=torch.bool, device=device)
        return _cut(attention_mask, 0, seen)
    if attention_mask is None:
        return None
    mask = _cut(attention_mask, kv_offset, kv_length)
    return None if surely(mask.all()) else mask


def _cut(mask: Tensor, offset: int, length: int) -> Tensor:
    """Return `length` entries of a mask (B, M) as (B, 1, 1, length)."""
    mask = mask[:, offset : offset + length].bool()
    # transformers' own rule: keys beyond the mask do not exist yet.
    return torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=False)[:, None, None, :]


def nystrom_forward(
    state: DistanceAttentionState, query: Tensor, key: Tensor, value: Tensor, call: ModuleCall, attend: Callable
) -> tuple[Tensor, Tensor | None]:
    """Run a module with Nyström heads: (output (B, H, N, d_v), weights (B, H, N, M) when they are asked for).

    `attend` runs exact attention on all keys: of heads that are not Nyström's, and of queries that see few keys.
    """
    refuse_onnx("Nyström")
    if call.groups > 1:
        key, value = key[:, :: call.groups], value[:, :: call.groups]
    layer, num_keys, num_queries = layer_behind(key), key.shape[2], query.shape[2]
    if torch.compiler.is_compiling() and _depends_on_padding(state, layer, num_keys):
        return _uncompiled()(state, query, key, value, call, attend)
    if layer is None and call.is_causal and num_keys > num_queries:
        raise RuntimeError(
            f"causal Nyström attention got {num_keys} keys for {num_queries} queries: the model has a cache that was "
            f"not found, and that would keep every key. {version_note()}; pass use_cache=False"
        )
    full_key, full_value, full_keep = key, value, key_padding(call.mask, query, num_keys)
    keep = full_keep
    if layer is not None:
        _check_options(layer, state)
        if (earlier := layer.take_earlier()) is not None:
            _absorb(state, layer, *earlier, keep, call)
        full_key, full_value = layer.all_keys, layer.all_values
        key, value, keep = layer.take(keep[:, -num_queries:])
    results = []
    for number, (heads, group) in enumerate(state.parts()):
        columns = [head // (state.num_heads // key.shape[1]) for head in heads]
        own_call = replace(
            call,
            position_bias=_bias_of(call.position_bias, heads, query.device),
            sink_logit=_bias_of(call.sink_logit, heads, query.device),
        )
        full = partial(_in_full, query, full_key, full_value, heads, columns, layer)
        exact = partial(exact_heads, attend, group)
        if not isinstance(group, NystromParameters):
            if group is None or group.spec.mechanism != "retrieval":
                results.append((heads, *exact(*full(), own_call)))
            else:
                whole = full_key, full_value, full_keep
                results.append((heads, *_retrieval_heads(state, number, heads, group, query, *whole, own_call, layer)))
            continue
        is_few = _sees_few(state, group, layer, full_keep, num_queries, call.is_causal)
        tensors = _take(query, heads), _take(key, columns), _take(value, columns)
        if is_few is True:
            output, weights = exact(*full(), own_call)
            output = touched(group, output)
            if layer is not None:
                far_state, near_keep = advance(hybrid_inputs(group, *tensors, keep, own_call, num_keys, layer.state))
        else:
            output, weights, far_state, near_keep = _far_heads(group, *tensors, keep, own_call, num_keys, layer)
            if is_few is not None:
                output, weights = _put_rows(
                    is_few, _few_rows(is_few, *full(), full_keep, own_call, exact), output, weights
                )
        results.append((heads, output, weights))
    if layer is not None:
        layer.put(key, value, near_keep, far_state)
        # Padding after the last of so many tokens still sees no more than these.
        may_forget = num_keys > layer.exact_below and not layer.is_long
        if may_forget and bool((full_keep.sum(-1) > layer.exact_below).all()):
            layer.forget_early_keys()
    return join_heads(results)


def _retrieval_heads(
    state: DistanceAttentionState,
    number: int,
    heads: list[int],
    group: HeadParameters,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    call: ModuleCall,
    layer: NystromLayer | None,
) -> tuple[Tensor, Tensor | None]:
    """Run the retrieval heads beside Nyström heads: (output, weights or None), with a cache layer from its own keys."""
    key_heads, cached, first_queries = key.shape[1], None, None
    if layer is not None:
        cached, first_queries = layer.retrieved, layer.retrieved.first_queries_for_call()
        key, value, key_heads = layer.retrieved.keys, layer.retrieved.values, layer.num_key_heads
    columns = key_heads_of(heads, state.num_heads // key_heads)
    if layer is None:
        key, value = _take(key, columns), _take(value, columns)
    elif columns != layer.retrieved_key_heads:
        # Some query heads of a key head: each has its own copy of the keys, and codes are made anew.
        columns, cached = [layer.retrieved_key_heads.index(column) for column in columns], None
        key, value = _take(key, columns), _take(value, columns)
    keep = None if surely(keep.all()) else keep
    return retrieve(group, _take(query, heads), key, value, keep, call, cached, first_queries, number)


def touched(group: NystromParameters, output: Tensor) -> Tensor:
    """Return the output with all of a group's parameters in its graph, with gradient 0 where nothing uses them.

    DDP and others wait for a gradient of every parameter that trains.
    """
    if not torch.is_grad_enabled():
        return output
    unused = [parameter.sum() for parameter in group.parameters() if parameter.requires_grad]
    return output + 0 * sum(unused).to(output.dtype) if unused else output


def _check_options(layer: NystromLayer | None, state: DistanceAttentionState) -> None:
    """Raise `ValueError` where a cache was begun with options other than the module's current ones."""
    for _, group in state.parts():
        if isinstance(group, NystromParameters):
            for name in ("window_size", "exact_below"):
                if getattr(layer, name) != (now := getattr(group.spec, name) or 0):
                    raise ValueError(
                        f"this cache was begun with {name}={getattr(layer, name)}, and the model has {name}={now} now; "
                        "start with an empty cache"
                    )


def _absorb(
    state: DistanceAttentionState,
    layer: NystromLayer | None,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    call: ModuleCall,
) -> None:
    """Make a full cache's keys (B, H_kv, n, d) the layer's window and state, as if they had run here."""
    length = key.shape[2]
    # The state holds no bias: that of a far key depends on nothing but its side.
    call = replace(call, position_bias=None)
    for heads, group in state.parts():
        if isinstance(group, NystromParameters):
            columns = [head // (state.num_heads // key.shape[1]) for head in heads]
            no_query = key.new_zeros(len(key), len(heads), 0, key.shape[3])
            inputs = hybrid_inputs(
                group, no_query, _take(key, columns), _take(value, columns), keep[:, :length], call, length
            )
            far_state, near_keep = advance(inputs)
    layer.put(key, value, near_keep, far_state)


def _depends_on_padding(state: DistanceAttentionState, layer: NystromLayer | None, num_keys: int) -> bool:
    """Return whether only the mask's values say which queries see few keys."""
    limits = [group.spec.exact_below or 0 for _, group in state.parts() if isinstance(group, NystromParameters)]
    return any(0 < limit < num_keys for limit in limits) and not (layer is not None and layer.is_long)


@lru_cache
def _uncompiled():
    """Wrap `nystrom_forward` so that torch.compile skips it: one graph break in place of ten."""
    # Made when it is needed: it imports torch._dynamo, which takes a second.
    return torch.compiler.disable(nystrom_forward)


def _sees_few(
    state: DistanceAttentionState,
    group: NystromParameters,
    layer: NystromLayer | None,
    keep: Tensor,
    num_queries: int,
    is_causal: bool,
) -> Tensor | bool | None:
    """Return which of the last N queries see at most spec.exact_below keys (B, N); None for none, True for all."""
    limit, num_keys = group.spec.exact_below or 0, keep.shape[1]
    if state.observer is not None:  # a conversion fits the far field at whatever length its text has
        return None
    if not limit:
        # Otherwise a model of short texts would have no Nyström attention left.
        takes_longer = state.max_positions is None or state.max_positions > SHORT_TEXT
        short = num_queries > 1 and num_keys < SHORT_TEXT
        if short and takes_longer and state.has_teacher and not torch.compiler.is_compiling():
            logger.warning_once(
                f"Nyström attention runs on a text of fewer than {SHORT_TEXT:,} tokens, where exact "
                f"attention loses nothing and takes little longer; exact_below={SHORT_TEXT} uses it there "
                "(model.set_attention_options or from_pretrained; at the command line --exact-below)"
            )
        return None
    if layer is not None and layer.is_long:
        return None
    if num_keys > limit:
        seen = keep.cumsum(-1)[:, -num_queries:] if is_causal else keep.sum(-1, keepdim=True).expand(-1, num_queries)
        is_few = seen <= limit
        if not bool(is_few.any()):
            return None
        if not bool(is_few.all()):
            return is_few
    if state.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        logger.warning_once(
            f"training on texts of at most exact_below={limit} tokens, which see exact attention alone: no landmark is "
            "trained. Where longer texts matter, train with exact_below=0 (model.set_attention_options; of a native "
            "model mechanism_options)"
        )
    return True


def _few_rows(few: Tensor, query: Tensor, key: Tensor, value: Tensor, keep: Tensor, call: ModuleCall, exact):
    """Return (items (b,), output, weights) of exact attention of the batch items and first queries that `few` marks."""
    items = few.any(1).nonzero()[:, 0]
    query, key, value, keep = (t[items] for t in (query, key, value, keep))
    num_queries, num_keys = query.shape[2], key.shape[2]
    if not call.return_weights:
        count = int(few.any(0).nonzero().max()) + 1
        # A text that is all padding keeps no key.
        last = max(keep.any(0).nonzero().flatten().tolist(), default=0)
        seen = num_keys - num_queries + count if call.is_causal else last + 1
        query, key, value, keep = query[:, :, :count], key[:, :, :seen], value[:, :, :seen], keep[:, :seen]
    return items, *exact(query, key, value, replace(call, mask=None if bool(keep.all()) else keep[:, None, None]))


def _put_rows(few: Tensor, exact: tuple, output: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Replace the rows of output and weights that `few` marks by those of `_few_rows`."""
    items, *exact_results = exact

    def put(whole, part):
        if part is None:
            return whole
        chosen = few[items, : part.shape[2]][:, None, :, None]
        rows = whole[items]
        part = torch.where(chosen, part.to(whole.dtype), rows[:, :, : part.shape[2]])
        return whole.index_copy(0, items, torch.cat([part, rows[:, :, part.shape[2] :]], dim=2))

    return put(output, exact_results[0]), put(weights, exact_results[1])


def _far_heads(
    group: NystromParameters,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    call: ModuleCall,
    num_keys: int,
    layer: NystromLayer | None,
):
    """Return (output, weights or None, the next state, keep without sinks) of the Nyström heads of a module."""
    inputs = hybrid_inputs(group, query, key, value, keep, call, num_keys, layer.state if layer is not None else None)
    started = layer is not None and layer.length > query.shape[2]
    if call.return_weights and started:
        raise ValueError("output_attentions is not available once keys are in a Nyström cache: they are sums by now")
    written_out_too = call.return_weights or (call.backend == "reference" and not started)
    output, weights = reference_hybrid(inputs) if written_out_too else (None, None)
    far_state = near_keep = None
    if output is None or layer is not None:
        fast, far_state, near_keep = hybrid_attention(inputs)
        output = fast if output is None else output
    weights = weights.to(value.dtype) if call.return_weights else None
    return output.to(value.dtype), weights, far_state, near_keep


def _take(tensor: Tensor, heads: list[int]) -> Tensor:
    """Return some heads of (B, H, ...): the tensor itself where these are all of them in order, else a copy."""
    if heads == list(range(tensor.shape[1])):
        return tensor
    return tensor.index_select(1, torch.tensor(heads, device=tensor.device))


def _bias_of(bias, heads: list[int], device: torch.device):
    """Return some heads of a position bias, if there is one."""
    return None if bias is None else of_heads(bias, torch.tensor(heads, device=device))


def _in_full(
    query: Tensor, key: Tensor, value: Tensor, heads: list[int], columns: list[int], layer: NystromLayer | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of some heads for exact attention: with a cache layer, from the keys it keeps."""
    if layer is not None:
        columns = [layer.full_key_heads.index(column) for column in columns]
    return _take(query, heads), _take(key, columns), _take(value, columns)


def hybrid_inputs(
    group: NystromParameters,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    call: ModuleCall,
    num_keys: int,
    state: FarState | None = None,
) -> HybridInputs:
    """Return the inputs of a group of Nyström heads for `num_keys` keys with those in a cache; key and value have a
    head for every query head.
    """
    query, key, far_query, far_key = group(query, key, "features", scaling=call.scaling, sink_logit=call.sink_logit)
    window_size, num_sinks = (0, 0) if call.is_cross else (group.spec.window_size, group.spec.num_sinks)
    has_learned_sink = call.sink_logit is not None
    if has_learned_sink and (call.position_bias is not None or call.sink_logit.shape[2] > 1):
        raise ValueError(
            "mechanism='nystrom' takes one learned sink of each head and no position bias beside it, got sinks of "
            f"shape {tuple(call.sink_logit.shape)}{'' if call.position_bias is None else ' and a bias'}; leave the "
            "layer out (layers=...)"
        )
    bias = window_bias(call.position_bias, window_size, num_keys, call.is_causal)
    return HybridInputs(
        query, key, value.to(query.dtype), keep, far_query, far_key, num_sinks + has_learned_sink, window_size,
        call.is_causal, bias, state, call.dropout_p, has_learned_sink,
    )  # fmt: skip
