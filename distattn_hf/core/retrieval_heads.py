"""Retrieval attention inside a model: from transformers' arguments to `run_retrieval`."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .absolute_logits import absolute_shift
from .attention import without_autocast
from .attention_spec import AttentionSpec
from .derived_cache import FirstQueries
from .head_groups import exact_heads, join_heads, key_heads_of, key_padding
from .inputs import AttentionInputs, ModuleCall, refuse_onnx, rows_of, surely
from .metrics import get_metric
from .parameters import DistanceAttentionState, HeadParameters
from .relative_bias import RelativeBias, of_heads
from .retrieval import Retrieval, Search, first_keys, has_codes
from .retrieval_cache import KeyClusters, KeyCodes, KeySummaries
from .retrieval_far import has_far_field
from .retrieval_gather import run_retrieval
from .retrieval_order import of_one_unit


def search_of(spec: AttentionSpec, is_cross: bool) -> Search:
    """Return the search that a spec with mechanism "retrieval" asks for."""
    window_size, num_sinks = (0, 0) if is_cross else (spec.window_size, spec.num_sinks)
    return Search(
        window_size, num_sinks, spec.block_size, spec.num_blocks, spec.min_weight, spec.far_field, spec.cluster_keys
    )


def retrieval_forward(
    state: DistanceAttentionState, query: Tensor, key: Tensor, value: Tensor, call: ModuleCall, attend: Callable
) -> tuple[Tensor, Tensor | None]:
    """Run a module with retrieval heads: (output (B, H, N, d_v), weights (B, H, N, M) when they are asked for).

    `attend` runs exact attention, of heads that are not the retrieval's.
    """
    layer = getattr(key, "distattn_layer", None)
    call = replace(call, is_causal=call.is_causal and not state.is_cross)
    if call.groups > 1:
        key, value = key[:, :: call.groups], value[:, :: call.groups]
    if query.shape[0] == 1 and key.shape[0] > 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    keep = None if call.mask is None else key_padding(call.mask, query, key.shape[2])
    if keep is not None and surely(keep.all()):
        keep = None
    results = []
    first_queries, state.first_queries = state.first_queries, None
    for number, (heads, group) in enumerate(state.parts()):
        index = torch.tensor(heads, device=query.device)
        own = replace(
            call,
            position_bias=None if call.position_bias is None else of_heads(call.position_bias, index),
            sink_logit=of_heads(call.sink_logit, index),
        )
        tensors = query, key, value
        if len(heads) < state.num_heads:
            tensors = some_heads(heads, *tensors)
        if group is None or group.spec.mechanism != "retrieval":
            results.append((heads, *exact_heads(attend, group, *tensors, own)))
        else:
            kept = layer if tensors[1] is key else None
            results.append((heads, *retrieve(group, *tensors, keep, own, kept, first_queries, number)))
    return join_heads(results)


def some_heads(heads: list[int], query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return query heads and their key heads: grouped where all of a key head's are there, else repeated."""
    columns = key_heads_of(heads, query.shape[1] // key.shape[1])
    index, column = (torch.tensor(n, device=query.device) for n in (heads, columns))
    return query[:, index], key[:, column], value[:, column]


def retrieve(
    group: HeadParameters,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    call: ModuleCall,
    layer,
    first_queries: FirstQueries | None,
    number: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Return (output, weights or None) of a group of retrieval heads.

    layer: the cache layer that holds the key, or None. first_queries: what keeps the text's first ones, or None.
    number: that of the group in both.
    """
    refuse_onnx("retrieval")
    problem = retrieval_problem(group, query, key, value, keep, call)
    known, is_whole = None, query.shape[2] == key.shape[2]
    # Others' far field is about no query.
    is_about_queries = problem.search.far_field and not (problem.is_clustered and has_codes(problem.inputs))
    if first_queries is not None and call.is_causal and not is_about_queries:
        first_queries.leave_out(number)
    elif first_queries is not None and call.is_causal:
        known = first_queries.update(number, query, key.shape[2], problem.first)
    if known is not None and not is_whole and has_far_field(problem):
        # The model's own, mapped as those of the call are.
        with without_autocast(query.device.type):
            problem = replace(problem, beginning=group(known, key[:, :, :1]).query)
    keeps = (is_whole or known is not None or not is_about_queries) and not problem.inputs.needs_grad()
    is_reference = call.backend == "reference"
    problems = [problem]
    if layer is not None and not problem.is_clustered:
        problems = [_with_what_is_cached(group, problem, key, keep, layer, number, keeps)]
    elif layer is not None and not is_whole and not problem.inputs.needs_grad():
        problems = _of_clusters(group, problem, layer.derived_for(("clusters", number), KeyClusters), keeps)
    # One after the other: a part of the queries is run before the clusters go on to the next one's unit.
    output, weights = _joined([run_retrieval(p, call.return_weights, is_reference) for p in problems], key.shape[2])
    return output.to(value.dtype), weights


def _of_clusters(group: HeadParameters, problem: Retrieval, clusters: KeyClusters, keeps: bool) -> Iterator[Retrieval]:
    """Yield the problem in parts whose queries' windows begin in one unit, with what the cache keeps for each."""
    parameters = list(group.fitted_tensors().values())
    for part in of_one_unit(problem):
        with torch.no_grad(), without_autocast(problem.inputs.query.device.type):
            own = clusters.update(_of_queries(problem, part), parameters, keeps)
        yield own


def _of_queries(problem: Retrieval, part: slice) -> Retrieval:
    """Return the problem of some of the queries, with the keys up to the last of them."""
    inputs, count = problem.inputs, problem.inputs.query.shape[2]
    if part.stop - part.start == count:
        return problem
    last = inputs.key.shape[2] - count + part.stop
    inputs = replace(
        inputs, query=inputs.query[:, :, part], key=inputs.key[:, :, :last], value=inputs.value[:, :, :last],
        keep=None if inputs.keep is None else inputs.keep[..., :last], sink_logit=rows_of(inputs.sink_logit, part),
        shift=rows_of(inputs.shift, part),
    )  # fmt: skip
    beginning = None if problem.beginning is None else problem.beginning[:, :, :last]
    return replace(problem, inputs=inputs, beginning=beginning)


def _joined(results: list[tuple[Tensor, Tensor | None]], num_keys: int) -> tuple[Tensor, Tensor | None]:
    """Return outputs, and weights of so many keys, of parts of the queries one after another."""
    if len(results) == 1:
        return results[0]
    outputs, weights = zip(*results)
    if weights[0] is None:
        return torch.cat(outputs, dim=2), None
    return torch.cat(outputs, dim=2), torch.cat([F.pad(w, (0, num_keys - w.shape[-1])) for w in weights], dim=2)


def _with_what_is_cached(
    group: HeadParameters, problem: Retrieval, key: Tensor, keep: Tensor | None, layer, number: int, keeps: bool
) -> Retrieval:
    """Return the problem with the codes and, where it `keeps` them, the summaries of the key's cache layer."""
    # The codes of cosine are of keys of length 1.
    is_plain = problem.inputs.key is key and has_codes(problem.inputs) and not problem.inputs.metric.scale_free
    with torch.no_grad(), without_autocast(key.device.type):
        if is_plain and problem.search.most_blocks:
            codes = layer.derived_for("codes", KeyCodes)
            problem = replace(problem, codes=codes.update(key, keep, problem.first, problem.search.block_size))
        if keeps and has_far_field(problem):
            summaries = layer.derived_for(("summaries", number), KeySummaries)
            problem = replace(problem, summaries=summaries.update(problem, list(group.fitted_tensors().values())))
    return problem


def retrieval_problem(
    group: HeadParameters, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, call: ModuleCall
) -> Retrieval:
    """Return the problem of a group of retrieval heads for their query, key and value; keep (B, M): no padding."""
    with without_autocast(query.device.type):
        heads, metric = group(query, key), get_metric(group.metric)
        shift = absolute_shift(heads, metric, group.p, call)
    search = search_of(group.spec, call.is_cross)
    first = first_keys(keep)
    if value.shape[1] != heads.key.shape[1]:
        value = value.repeat_interleave(heads.key.shape[1] // value.shape[1], dim=1)
    bias, table = call.position_bias, None
    if isinstance(bias, RelativeBias):
        num_queries, num_keys = query.shape[2], key.shape[2]
        table, bias = bias.at(torch.arange(1 - num_keys, num_queries, device=query.device)), None
    elif bias is not None and bias.shape[-1] > key.shape[2]:
        bias = bias[..., : key.shape[2]]
    inputs = AttentionInputs(
        heads.query, heads.key, value.to(heads.key.dtype), metric, heads.lam, call.scaling, group.p,
        None if keep is None else keep[:, None, None], bias, call.is_causal, call.dropout_p,
        softening=heads.softening, sink_logit=call.sink_logit, softcap=call.softcap, shift=shift,
    )  # fmt: skip
    return Retrieval(inputs, search, first, table)
