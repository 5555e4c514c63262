"""Whole models on a sequence that is split over the ranks of a process group, each rank holding a stretch of it."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..conversion.observe import observed
from ..core.attention import without_autocast
from ..core.discovery import argument_names, find_attention_modules
from ..core.head_groups import join_heads, key_padding
from ..core.inputs import ModuleCall
from ..core.native_layers import DistAttnPreTrainedModel
from ..core.nystrom_heads import hybrid_inputs
from ..core.parameters import DistanceAttentionState, HeadParameters, NystromParameters
from ..core.retrieval_gather import run_retrieval
from ..core.retrieval_heads import retrieval_problem, some_heads
from ..data.tasks import TASKS
from ..functional.sequence_exchange import Stretch, cut, first_of_next
from ..functional.sequence_parallel import NystromContext, RetrievalContext

IGNORED = -100


@contextmanager
def sequence_parallel(model: nn.Module, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Within, `model(input_ids=..., attention_mask=..., labels=...)` takes this rank's stretch of each row.

    The ranks of `group` (None: all processes), in their order, hold consecutive stretches of the same rows, of any
    lengths of at least one token. Logits are those of the rank's own tokens. With labels, cut as input_ids are and not
    shifted, the loss is the rank's share of the mean over the whole: the sum over the ranks is what one process finds.
    After `loss.backward()` each rank has its own share of the parameters' gradients: see `sum_gradients`.

        with sequence_parallel(model):
            loss = model(**stretch_of(batch)).loss
            loss.backward()
        sum_gradients(model)

    For converted decoders in which every attention module has Nyström or retrieval heads alone, without a cache.

    Raises:
        ValueError: naming the module or the option, before anything is changed, where the model has anything else.
    """
    _check(model)
    current: list[Stretch] = []
    states = list(model.attention_states.values())
    count = max(1, *(group.spec.num_sinks for state in states for group in state.groups))

    def begin(module, args, kwargs):
        kwargs = {**dict(zip(argument_names(type(module)), args)), **kwargs}
        current[:] = [_begin(kwargs, count, group)]
        return (), kwargs

    def observer(state, query, key, value, call):
        if not current:
            raise ValueError("sequence_parallel runs the model that it was given, not a part of it")
        return _attention(state, query, key, value, call, current[0])

    hook = model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with observed(model, observer):
            yield
    finally:
        hook.remove()


def stretch_of(batch: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Return this rank's stretch of a batch of tensors (B, N) that all ranks hold, near equal in length.

    Raises `ValueError` for fewer tokens than ranks.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    length = next(iter(batch.values())).shape[1]
    if length < size:
        raise ValueError(f"each rank must hold at least one token, got rows of {length} tokens for {size} ranks")
    start, stop = (length * number // size for number in (rank, rank + 1))
    return {name: tensor[:, start:stop] for name, tensor in batch.items()}


def sum_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Sum each parameter's gradient over the ranks; what has none on this rank has one of zeros among the others'."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad, group=group)


def _check(model: nn.Module) -> None:
    """Raise `ValueError` for a model in which tokens meet anywhere but in causal Nyström and retrieval heads."""
    states = getattr(model, "attention_states", None)
    if not states:
        native = f", mechanism {model.config.mechanism!r}" if isinstance(model, DistAttnPreTrainedModel) else ""
        raise ValueError(
            "sequence_parallel takes a converted causal model whose attention modules all have nystrom or retrieval "
            f"heads (distattn_hf.convert(model, 'retrieval')), got {type(model).__name__}{native}, which is not "
            "converted; functional.sequence_parallel has the attention functions for layers of one's own"
        )
    kinds = find_attention_modules(model)
    layers, name = getattr(model.config, "num_hidden_layers", None), type(model).__name__
    reason = None
    if others := [other for other in kinds if other not in states]:
        reason = f"{others[0]!r} is not converted, and would see its rank's stretch alone"
    elif layers != len(states):
        reason = f"it has {layers} layers and {len(states)} attention modules: others may mix tokens in their own way"
    elif any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules()):
        reason = "a convolution mixes tokens beside its attention"
    elif "position_ids" not in inspect.signature(model.forward).parameters:
        reason = "its forward takes no position_ids, so a stretch's tokens would count from 0"
    elif not (TASKS["causal-lm"].covers(model) or model.base_model is model):
        reason = "its head may join tokens of all ranks; take the base model or a causal language model"
    elif counting := next((kind for kind in map(type, model.modules()) if _counts_mask(kind)), None):
        reason = f"{counting.__name__} counts positions by the mask, of which a rank has its stretch alone"
    for module, state in states.items() if reason is None else ():
        entry, causal = kinds[module], getattr(model.get_submodule(_found(model, module)), "is_causal", False)
        if entry["kind"] != "self" or causal is not True:
            reason = f"{module!r} is not causal self-attention"
        elif entry.get("sink") or entry.get("softcap"):
            reason = f"{module!r} has a learned sink or a cap on its logits"
        for _, group in state.parts():
            reason = reason or _reason_against(module, group)
        if reason:
            break
    if reason:
        raise ValueError(f"sequence_parallel cannot run {name}: {reason}")


def _counts_mask(kind: type) -> bool:
    return issubclass(kind, nn.Embedding) and "attention_mask" in inspect.signature(kind.forward).parameters


def _found(model: nn.Module, name: str) -> str:
    modules = model.attention_modules()
    return next(own for own, module in model.named_modules() if module is modules[name])


def _reason_against(module: str, group: HeadParameters | None) -> str | None:
    if group is None or group.spec.mechanism not in ("nystrom", "retrieval"):
        return (
            f"{module!r} has heads of exact attention; convert all heads, with mechanism='nystrom' (and beyond="
            "'retrieval') or 'retrieval'"
        )
    if group.spec.exact_below:
        return (
            f"{module!r} attends exactly to up to exact_below={group.spec.exact_below} tokens, which no rank holds; "
            "model.set_attention_options(exact_below=0)"
        )
    return None


def _begin(kwargs: dict, count: int, group: dist.ProcessGroup | None) -> Stretch:
    """Agree with the other ranks on a forward pass; put positions and labels of the next tokens into its arguments."""
    given = [n for n in ("past_key_values", "cache", "position_ids", "shift_labels") if kwargs.get(n) is not None]
    tokens = next((kwargs[n] for n in ("input_ids", "inputs_embeds") if kwargs.get(n) is not None), None)
    error = None
    if given or kwargs.get("use_cache"):
        error = ValueError(f"sequence_parallel gives a model no {', '.join(given or ['use_cache'])}: leave it out")
    elif tokens is None:
        error = ValueError("sequence_parallel needs input_ids or inputs_embeds by name")
    mask, keep = kwargs.get("attention_mask"), torch.ones(1, 1, dtype=torch.bool)
    if error is None:
        keep = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if mask is not None and mask.shape != keep.shape:
            error = ValueError(f"attention_mask must be (B, N) = {tuple(keep.shape)}, got {tuple(mask.shape)}")
        elif mask is not None:
            keep = mask.bool()
    labels = None if error is not None else kwargs.get("labels")
    stretch = cut(
        keep, count if error is None else 0, group, {"whether labels are given": int(labels is not None)}, error
    )
    positions = torch.arange(stretch.start, stretch.start + stretch.length, device=tokens.device)
    kwargs |= {"use_cache": False, "position_ids": positions[None]}
    if labels is not None:
        following = first_of_next(labels, stretch, IGNORED)
        kwargs["shift_labels"] = torch.cat([labels[:, 1:], following], dim=1)
        number = (kwargs["shift_labels"] != IGNORED).sum()
        dist.all_reduce(number, group=stretch.group)
        kwargs["num_items_in_batch"] = number
    return stretch


def _attention(
    state: DistanceAttentionState, query: Tensor, key: Tensor, value: Tensor, call: ModuleCall, stretch: Stretch
) -> Tensor:
    """Return the output (B, H, N, d_v) of a module's heads for this rank's stretch."""
    if call.return_weights:
        raise ValueError("output_attentions is not available under sequence_parallel: no rank holds whole rows")
    key, value = key[:, :: call.groups], value[:, :: call.groups]
    keep = key_padding(call.mask, query, key.shape[2])
    call = replace(call, groups=1, mask=None)
    with without_autocast(query.device.type):
        results = []
        for heads, group in state.parts():
            run = _nystrom if isinstance(group, NystromParameters) else _retrieval
            results.append((heads, run(group, heads, query, key, value, keep, call, stretch).to(value.dtype), None))
        return join_heads(results)[0]


def _nystrom(group, heads, query, key, value, keep, call, stretch) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    columns = sorted({head // groups for head in heads})
    key, value = (t[:, columns].masked_fill(~keep[:, None, :, None], 0.0) for t in (key, value))
    context = NystromContext(key, value, keep, stretch, group.spec.window_size, group.spec.num_sinks)
    own = [columns.index(head // groups) for head in heads]
    tensors = query[:, heads], context.key[:, own], context.value[:, own]
    return context.attend(hybrid_inputs(group, *tensors, context.keep, call, context.keep.shape[1]))


def _retrieval(group, heads, query, key, value, keep, call, stretch) -> Tensor:
    key, value = (t.masked_fill(~keep[:, None, :, None], 0.0) for t in (key, value))
    query, key, value = some_heads(heads, query, key, value)
    context = RetrievalContext(query, key, value, keep, stretch)
    keep = None if bool(context.keep.all()) else context.keep
    problem = retrieval_problem(group, query, context.key, context.value, keep, call)
    beginning = group(context.beginning, context.key[:, :, :1]).query
    return context.tied(run_retrieval(replace(problem, beginning=beginning))[0])
