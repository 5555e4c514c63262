"""Observe a converted model's attention while it runs, and replace its output."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.attention import distance_attention
from ..core.head_groups import key_padding
from ..core.inputs import ModuleCall
from ..core.interface import attend
from ..core.relative_bias import of_heads
from ..core.retrieval import Retrieval
from ..core.retrieval_gather import caught_weight, visible_keys
from ..core.retrieval_heads import retrieval_forward, retrieval_problem, some_heads
from ..data.batches import longest_row

# Queries whose keys, of all of a text, are looked at together.
_ROWS = 128
# Tokens of a calibration batch on which it is measured how much of the weight is read.
_TOKENS = 4096


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a module and all in it into eval mode, and back into the modes they were in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def observed(model, observer):
    """Call `observer(state, query, key, value, call)` in place of every converted module's attention.

    Its result (B, H, N, d_v) is the attention's output; key and value come with a head for every query head.
    """
    states = list(model.attention_states.values())
    for state in states:
        state.observer = observer
    try:
        yield
    finally:
        for state in states:
            state.observer = None


@torch.no_grad()
def caught_shares(model, batch: dict[str, Tensor]) -> dict[str, list[Tensor | None]]:
    """Return how much of exact attention's weight retrieval heads read on a batch, the mean over queries of each head.

    {module name: a (H,) tensor for each group of heads, None for those of another mechanism}. Of the first rows of the
    batch, up to 4,096 tokens: all weights are written out.
    """
    names = {state: name for name, state in model.attention_states.items()}
    sums: dict[str, list] = {}
    # Pictures and sound have no rows of tokens: all of them.
    length = longest_row(batch)
    batch = {name: tensor[: max(1, _TOKENS // length) if length else None] for name, tensor in batch.items()}

    def observe(state, query, key, value, call):
        if not state.is_retrieval:
            return teacher_attention(query, key, value, call)
        keep = None if call.mask is None else key_padding(call.mask, query, key.shape[2])
        shares = []
        for problem in _problems(state, query, key, value, call, keep):
            if problem is None:
                shares.append(None)
                continue
            share = caught_weight(problem).double()
            if keep is not None and not state.is_cross:
                share = share * keep[:, None, -query.shape[2] :]  # queries that are padding count for nothing
            shares.append(torch.stack([share.sum((0, 2)), (share > 0).sum((0, 2)).double()]))
        sums.setdefault(names[state], []).append(shares)
        if state.is_nystrom:
            return teacher_attention(query, key, value, call)
        return retrieval_forward(state, query, key, value, call, attend)[0]

    with observed(model, observe):
        # Without the head, whose logits take more memory than all else.
        (model if "labels" in batch else model.base_model)(**batch)
    shares = {}
    for name, uses in sums.items():
        totals = [None if parts[0] is None else sum(parts) for parts in zip(*uses, strict=True)]
        shares[name] = [None if t is None else (t[0] / t[1].clamp_min(1)).float() for t in totals]
    return shares


@torch.no_grad()
def read_share(model, ids: Tensor, last: int) -> float:
    """Return the share of a text's keys that its last queries read in causal retrieval heads, the mean over both.

    ids: (1, N); last: how many queries. What counts as one key for all of its block is not read.

    Raises `ValueError` where no head retrieves.
    """
    shares = []

    def observe(state, query, key, value, call):
        if not state.is_retrieval:
            return teacher_attention(query, key, value, call)
        for problem in _problems(state, query, key, value, call, None):
            if problem is not None:
                # The choice of earlier queries is not asked for.
                ends = replace(problem.inputs, query=problem.inputs.query[:, :, -last:])
                seen = visible_keys(replace(problem, inputs=ends))(0, last)
                shares.extend(seen.double().mean((0, 2, 3)).tolist())
        return retrieval_forward(state, query, key, value, call, attend)[0]

    with observed(model, observe):
        model.base_model(input_ids=ids, use_cache=False)
    if not shares:
        raise ValueError("model must have heads with retrieval attention, got one without")
    return sum(shares) / len(shares)


@torch.no_grad()
def keys_read(model, ids: Tensor, starts: list[int], modules: Collection[str]) -> list[tuple[str, Tensor]]:
    """Return which keys the queries of each stretch of a text read in causal retrieval heads, by module.

    ids: (1, N); starts: where stretches begin, in order, the first at 0; modules: names of those that are looked at.
    Bool (stretches, H_kv, N) of each group of heads: keys that some query of the stretch reads (query heads of one key
    head choose together). What counts as one key for all of its block is not read.
    """
    names = {state: name for name, state in model.attention_states.items()}
    found: list[tuple[str, Tensor]] = []
    bounds = [*starts, ids.shape[1]]

    def observe(state, query, key, value, call):
        problems = _problems(state, query, key, value, call, None) if names[state] in modules else ()
        for problem in filter(None, problems):
            seen = visible_keys(problem)
            read = torch.zeros(len(starts), problem.inputs.key.shape[1], ids.shape[1], dtype=torch.bool)
            for number, (start, stop) in enumerate(zip(bounds, bounds[1:])):
                for first in range(start, stop, _ROWS):
                    by_query_head = seen(first, min(first + _ROWS, stop))[0].any(1).cpu()
                    read[number] |= by_query_head.unflatten(0, (read.shape[1], -1)).any(1)
            found.append((names[state], read))
        return retrieval_forward(state, query, key, value, call, attend)[0]

    with observed(model, observe):
        model.base_model(input_ids=ids, use_cache=False)
    return found


def _problems(state, query, key, value, call, keep) -> Iterator[Retrieval | None]:
    """Yield the problem of each group of a module's heads, None for one of another mechanism."""
    tensors = query, key[:, :: call.groups], value[:, :: call.groups]
    for heads, group in state.parts():
        if group is None or group.spec.mechanism != "retrieval":
            yield None
            continue
        own = some_heads(heads, *tensors) if len(heads) < state.num_heads else tensors
        index = torch.tensor(heads, device=query.device)
        bias, sink = (of_heads(t, index) for t in (call.position_bias, call.sink_logit))
        yield retrieval_problem(group, *own, keep, replace(call, position_bias=bias, sink_logit=sink))


def teacher_attention(query: Tensor, key: Tensor, value: Tensor, call: ModuleCall) -> Tensor:
    """Run dot-product attention of one observed call without dropout: (B, H, N, d_v)."""
    # Under autocast rotated queries and keys are float32 beside a value in half precision.
    tensors = query.to(key.dtype), key, value.to(key.dtype)
    output = distance_attention(
        *tensors, metric="dot", lam=1.0, scaling=call.scaling, mask=call.mask, position_bias=call.position_bias,
        is_causal=call.is_causal, sink_logit=call.sink_logit, softcap=call.softcap,
    )  # fmt: skip
    return output.to(value.dtype)
