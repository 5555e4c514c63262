"""The attention function and the mask function that transformers calls for converted models."""

import sys
import zlib
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging
from transformers.utils.output_capturing import _active_collector

from .absolute_logits import absolute_shift, check_absolute
from .attention import run_attention, without_autocast
from .backends import validate_backend
from .derived_cache import DerivedLayer, MappedKeys
from .head_groups import join_heads, write_out
from .inputs import AttentionInputs, ModuleCall
from .metrics import get_metric
from .nystrom_heads import nystrom_forward, padding_mask
from .parameters import DistanceAttentionState, HeadParameters
from .relative_bias import as_tensor, bias_behind, of_heads
from .retrieval_heads import retrieval_forward

logger = logging.get_logger(__name__)


def _own(name: str) -> str:
    """Return `name`; in the code that came with a checkpoint, with what tells it from other checkpoints' code."""
    package = __name__.rpartition(".")[0]
    # transformers' tables are the process's: of two checkpoints' code the later would run the earlier one's models.
    return f"{name}_{zlib.crc32(package.encode()):08x}" if package.startswith("transformers_modules.") else name


IMPLEMENTATION = _own("distattn")
EAGER_IMPLEMENTATION = _own("distattn_eager")
# The same attention for models that do not support SDPA: their modules may not say that they are causal, so the mask is
# always written out.
FULL_MASK_IMPLEMENTATION = _own("distattn_full_mask")
# For models in which some heads are Nyström's or retrieve: causal and bidirectional masks say which keys are padding
# and no more.
NYSTROM_IMPLEMENTATION = _own("distattn_nystrom")
NYSTROM_EAGER_IMPLEMENTATION = _own("distattn_nystrom_eager")
IMPLEMENTATIONS = (
    IMPLEMENTATION,
    EAGER_IMPLEMENTATION,
    FULL_MASK_IMPLEMENTATION,
    NYSTROM_IMPLEMENTATION,
    NYSTROM_EAGER_IMPLEMENTATION,
)

_ALLOWED_IMPLEMENTATIONS = {
    **dict.fromkeys((None, "sdpa", "distattn", "distattn_full_mask", "distattn_nystrom"), IMPLEMENTATION),
    **dict.fromkeys((IMPLEMENTATION, FULL_MASK_IMPLEMENTATION, NYSTROM_IMPLEMENTATION), IMPLEMENTATION),
    **dict.fromkeys(("eager", "distattn_eager", "distattn_nystrom_eager"), EAGER_IMPLEMENTATION),
    **dict.fromkeys((EAGER_IMPLEMENTATION, NYSTROM_EAGER_IMPLEMENTATION), EAGER_IMPLEMENTATION),
    # What Nyström's were called before.
    "distattn_linear": IMPLEMENTATION,
    "distattn_linear_eager": EAGER_IMPLEMENTATION,
}


def resolve_implementation(requested, supports_sdpa: bool = True, nystrom: bool = False) -> str:
    """Return our attention function for the requested one; raises `ValueError` for one that is not possible.

    None and "sdpa" (transformers' default) run each spec's own backend, "eager" the readable reference. Any other name
    would silently put dot-product attention back.
    """
    if isinstance(requested, dict):
        requested = requested.get("", None)
    if requested not in _ALLOWED_IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation={requested!r} is not available for distance attention; use None or 'sdpa' (the "
            "backend of each AttentionSpec) or 'eager' (the reference)"
        )
    chosen = _ALLOWED_IMPLEMENTATIONS[requested]
    if nystrom:
        return NYSTROM_IMPLEMENTATION if chosen == IMPLEMENTATION else NYSTROM_EAGER_IMPLEMENTATION
    return FULL_MASK_IMPLEMENTATION if chosen == IMPLEMENTATION and not supports_sdpa else chosen


def say_what_sdpa_means(requested, model) -> None:
    """Warn, once, whoever asks a model of ours for "sdpa" that it gives no dot-product attention."""
    if "sdpa" in (requested, requested.get("") if isinstance(requested, dict) else None):
        logger.warning_once(
            f"{type(model).__name__}: attn_implementation='sdpa' stands here for the attention that the config "
            "says, by the backend of each AttentionSpec, as by default; it is not dot-product attention. To run a "
            "metric by PyTorch's scaled_dot_product_attention, where it can, set AttentionSpec(backend='sdpa')"
        )


# Arguments of transformers' attention calls that change the result and that no distance backend computes.
_REFUSED = {
    "block_indices": "sparse key selection is not implemented",
    "cache": "it is a cache that the module does not fill itself",
}


def refuse_unsupported(module: nn.Module, arguments: dict) -> None:
    """Raise `ValueError` for the first argument that would change the result and cannot be honoured."""
    for name, reason in _REFUSED.items():
        if arguments.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name!r} to its attention, which distance attention cannot honour: "
                f"{reason}. Leave its layers unconverted (AttentionSpec(layers=...))."
            )


def weights_requested(arguments: dict) -> bool:
    """Return whether the caller wants attention weights: by argument, or through transformers' output capturing."""
    if arguments.get("output_attentions"):
        return True
    if torch.compiler.is_compiling() and not _active_collector.compiling:
        # Nobody asked inside the graph, and what was asked outside it cannot be read here.
        return False
    collector = _active_collector.get()
    return bool(collector) and any("attentions" in name for name in collector)


def read_call(
    module: nn.Module,
    query: Tensor,
    mask: Tensor | None,
    arguments: dict,
    *,
    reference: bool = False,
    nystrom: bool = False,
) -> ModuleCall:
    """Collect what transformers passes to an attention function into one call; of a `nystrom` implementation mask and
    bias are not written out (see `padding_mask` and `RelativeBias`).
    """
    scaling, is_causal, bias = (arguments.get(name) for name in ("scaling", "is_causal", "position_bias"))
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    state = getattr(module, "distattn", None)
    sink_logit, softcap = check_absolute(sink_of(arguments), arguments.get("softcap"), query.shape[:3])
    return ModuleCall(
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        mask=mask,
        position_bias=bias_behind(bias) if nystrom else bias,
        # One query of exact attention sees all keys: said here, a step of generation makes no second call of this one.
        is_causal=is_causal and (nystrom or mask is not None or query.shape[2] > 1),
        is_cross=isinstance(state, DistanceAttentionState) and state.is_cross,
        dropout_p=arguments.get("dropout") or 0.0,
        backend="reference" if reference else None,
        return_weights=weights_requested(arguments),
        sink_logit=sink_logit,
        softcap=softcap,
    )


def sink_of(arguments: dict) -> Tensor | None:
    """Return the learned sink among the arguments of an attention call: (H,), or (B, H, N, 1) where it has a query."""
    # gpt-oss and most others; Inkling.
    return next((arguments[name] for name in ("s_aux", "sinks") if arguments.get(name) is not None), None)


def _unconverted(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, call: ModuleCall, arguments: dict):
    """Run the attention of a module that was not converted, as the base model would."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    needs_eager = any(arguments.get(name) is not None for name in ("softcap", "s_aux", "sinks"))
    if call.return_weights or call.backend == "reference" or needs_eager:
        if eager is None:
            raise ValueError(f"{type(module).__name__} has no eager attention that could return weights")
        return eager(module, query, key, value, call.additive_mask(query, key.shape[2]), **arguments)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, call.mask, **arguments)


def _check_heads(module: nn.Module, state: DistanceAttentionState, query: Tensor) -> None:
    if query.shape[1] != state.num_heads:
        raise ValueError(
            f"{type(module).__name__} was converted with {state.num_heads} heads but calls attention with "
            f"{query.shape[1]}; convert the model again, or, if heads are split over processes, load it with a plan of "
            "tensor parallelism (tp_plan='auto'), which splits what was converted, too"
        )


def _observed(state: DistanceAttentionState, query: Tensor, key: Tensor, value: Tensor, call: ModuleCall) -> Tensor:
    """Return what the observer of a conversion in progress puts in place of the attention's output."""
    groups = query.shape[1] // key.shape[1]
    return state.observer(state, query, repeat_kv(key, groups), repeat_kv(value, groups), replace(call, groups=groups))


def _nystrom(
    state: DistanceAttentionState, query: Tensor, key: Tensor, value: Tensor, call: ModuleCall
) -> tuple[Tensor, Tensor | None]:
    call = replace(call, is_causal=call.is_causal and not state.is_cross)
    if state.observer is not None:
        call = replace(call, position_bias=as_tensor(call.position_bias, query.shape[2], key.shape[2]))
        return _observed(state, query, key, value, call), None
    with without_autocast(query.device.type):
        return nystrom_forward(state, query, key, value, call, attend)


def _retrieval(
    state: DistanceAttentionState, query: Tensor, key: Tensor, value: Tensor, call: ModuleCall
) -> tuple[Tensor, Tensor | None]:
    if state.observer is not None:
        call = replace(call, is_causal=call.is_causal and not state.is_cross)
        call = replace(call, position_bias=as_tensor(call.position_bias, query.shape[2], key.shape[2]))
        return _observed(state, query, key, value, call), None
    return retrieval_forward(state, query, key, value, call, attend)


def _exact(
    state: DistanceAttentionState, query: Tensor, key: Tensor, value: Tensor, call: ModuleCall
) -> tuple[Tensor, Tensor | None]:
    if call.causal_by_flag(query.shape[2]) and key.shape[2] > query.shape[2]:
        # Prefill into an empty static cache: the keys behind the queries are not filled yet.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if query.shape[0] == 1 and key.shape[0] > 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    call = call.merged((*query.shape[:3], key.shape[2]))
    if state.observer is not None:
        return _observed(state, query, key, value, call), None
    return attend_groups(state, query, key, value, call)


def attend_groups(
    state: DistanceAttentionState, query: Tensor, key: Tensor, value: Tensor, call: ModuleCall
) -> tuple[Tensor, Tensor | None]:
    """Run each group of heads by its own spec and the rest by dot product; (B, H, N, d_v) and weights or None."""
    parts, layer = state.parts(), getattr(key, "distattn_layer", None)
    if len(parts) == 1:
        return attend(parts[0][1], query, key, value, call, _kept(layer, *parts[0]))
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    results = []
    for heads, group in parts:
        index = torch.tensor(heads, device=query.device)
        group_call = replace(
            call,
            mask=of_heads(call.mask, index),
            position_bias=of_heads(call.position_bias, index),
            sink_logit=of_heads(call.sink_logit, index),
        )
        tensors = query[:, index], key[:, index], value[:, index]
        results.append((heads, *attend(group, *tensors, group_call, _kept(layer, heads, group))))
    return join_heads(results)


def _kept(layer: DerivedLayer | None, heads: list[int], group: HeadParameters | None) -> MappedKeys | None:
    """Return where the cache layer that keys came from keeps them as these heads map them, or None."""
    if layer is None or group is None or not group.maps_keys or torch.compiler.is_compiling():
        # A compiled graph cannot compare the values of parameters.
        return None
    # What is kept follows from keys, heads, form and parameters alone, which it compares.
    return layer.derived_for((group.metric, group.transform, *heads), MappedKeys)


def attend(
    group: HeadParameters | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: ModuleCall,
    kept: MappedKeys | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run exact attention of a group of heads, or dot product without a group: (B, H, N, d_v), weights or None.

    kept: mapped keys of those that came before.
    """
    dtype, backend = value.dtype, call.backend
    shift = None
    if group is None:
        metric, lam, p, epsilon = get_metric("dot"), 1.0, None, None
    else:
        with without_autocast(query.device.type):
            heads, metric, p = group(query, key, kept=kept), get_metric(group.metric), group.p
            shift = absolute_shift(heads, metric, p, call)
        query, key, lam, epsilon, *_ = heads
        backend = backend or group.spec.backend
    inputs = AttentionInputs(
        query, key, value.to(key.dtype), metric, lam, call.scaling, p,
        call.mask, call.position_bias, call.is_causal, call.dropout_p, softening=epsilon,
        sink_logit=call.sink_logit, softcap=call.softcap, shift=shift,
    )  # fmt: skip
    if call.return_weights:
        output, weights = run_attention(inputs, "reference", return_weights=True)
        return output.to(dtype), weights.to(dtype)
    return run_attention(inputs, validate_backend(backend or "auto")).to(dtype), None


def distattn_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    *,
    reference: bool = False,
    nystrom: bool = False,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Run attention of converted models by each spec's backend. Returns ((B, N, H, d_v), weights or None).

    Takes what transformers' `sdpa_attention_forward` takes, also by position. reference: by the readable reference
    (`attn_implementation="eager"`). nystrom: of models with Nyström attention, which get padding masks only (see
    `padding_mask`); with reference, quadratic in time and memory.
    """
    given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "position_bias": position_bias}
    # Those not given stay out, so that an unconverted module's attention uses its own defaults.
    kwargs.update({name: value for name, value in given.items() if value is not None})
    call = read_call(module, query, attention_mask, kwargs, reference=reference, nystrom=nystrom)
    state: DistanceAttentionState | None = getattr(module, "distattn", None)
    converted = isinstance(state, nn.Module)
    run = _exact
    if nystrom and converted and (state.is_nystrom or state.is_retrieval):
        run = _nystrom if state.is_nystrom else _retrieval
    if nystrom and attention_mask is not None and attention_mask.shape[-1] < key.shape[2]:
        # A static cache: the places behind are not filled yet.
        key, value = (t[:, :, : attention_mask.shape[-1]] for t in (key, value))
    if (indices := kwargs.pop("indices", None)) is not None:
        call = call.with_selected_keys(indices, key.shape[2])
    if nystrom and run is _exact:
        call = write_out(call, query.shape[2], key.shape[2], query.device)
    if not converted:
        if "position_bias" in kwargs:
            kwargs["position_bias"] = call.position_bias
        return _unconverted(module, query, key, value, call, kwargs)
    refuse_unsupported(module, kwargs)
    _check_heads(module, state, query)
    output, weights = run(state, query, key, value, call)
    return output.transpose(1, 2).contiguous(), weights


def _full_mask(*args, **kwargs):
    """Return transformers' bool mask, never left to the `is_causal` flag."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


# Without a mask function of the same name transformers passes no mask at all and the model would see the future.
for _name, _options, _mask in (
    (IMPLEMENTATION, {}, sdpa_mask),
    (FULL_MASK_IMPLEMENTATION, {}, _full_mask),
    (EAGER_IMPLEMENTATION, {"reference": True}, _full_mask),
    (NYSTROM_IMPLEMENTATION, {"nystrom": True}, padding_mask),
    (NYSTROM_EAGER_IMPLEMENTATION, {"reference": True, "nystrom": True}, padding_mask),
):
    AttentionInterface.register(_name, partial(distattn_attention_forward, **_options))
    AttentionMaskInterface.register(_name, _mask)
