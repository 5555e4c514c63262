"""The attention function and the mask function that transformers calls for converted models."""

import sys
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging
from transformers.utils.output_capturing import _active_collector

from .attention import run_attention, without_autocast
from .backends import validate_backend
from .inputs import AttentionInputs, add_bias, split_mask
from .metrics import get_metric
from .nystrom_heads import join_heads, nystrom_forward, padding_mask, written_out
from .parameters import DistanceAttentionState
from .relative_bias import as_tensor, bias_behind, of_heads

logger = logging.get_logger(__name__)

IMPLEMENTATION = "distattn"
EAGER_IMPLEMENTATION = "distattn_eager"
# The same attention for models that do not support SDPA: their modules may not say that they are causal, so the mask is
# always written out.
FULL_MASK_IMPLEMENTATION = "distattn_full_mask"
# For models in which some attention is linear: causal and bidirectional masks say which keys are padding and no more.
LINEAR_IMPLEMENTATION = "distattn_linear"
LINEAR_EAGER_IMPLEMENTATION = "distattn_linear_eager"

_ALLOWED_IMPLEMENTATIONS = {
    None: IMPLEMENTATION,
    "sdpa": IMPLEMENTATION,
    IMPLEMENTATION: IMPLEMENTATION,
    FULL_MASK_IMPLEMENTATION: IMPLEMENTATION,
    "eager": EAGER_IMPLEMENTATION,
    EAGER_IMPLEMENTATION: EAGER_IMPLEMENTATION,
    LINEAR_IMPLEMENTATION: IMPLEMENTATION,
    LINEAR_EAGER_IMPLEMENTATION: EAGER_IMPLEMENTATION,
}
IMPLEMENTATIONS = (*dict.fromkeys(_ALLOWED_IMPLEMENTATIONS.values()), FULL_MASK_IMPLEMENTATION)
IMPLEMENTATIONS += (LINEAR_IMPLEMENTATION, LINEAR_EAGER_IMPLEMENTATION)


def resolve_implementation(requested, supports_sdpa: bool = True, linear: bool = False) -> str:
    """Our attention function for what the user asked for; raises `ValueError` for what cannot be had.

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
    if linear:
        if not supports_sdpa:
            raise ValueError(
                "mechanism='nystrom' needs a model that supports SDPA: others do not say which modules are causal"
            )
        return LINEAR_IMPLEMENTATION if chosen == IMPLEMENTATION else LINEAR_EAGER_IMPLEMENTATION
    return FULL_MASK_IMPLEMENTATION if chosen == IMPLEMENTATION and not supports_sdpa else chosen


def say_what_sdpa_means(requested, model) -> None:
    """Tell, once, who asks a model of ours for "sdpa" that it gives no dot-product attention."""
    if "sdpa" in (requested, requested.get("") if isinstance(requested, dict) else None):
        logger.warning_once(
            f"{type(model).__name__}: attn_implementation='sdpa' stands here for the attention that the config "
            "says, by the backend of each AttentionSpec, as by default; it is not dot-product attention. To run a "
            "metric by PyTorch's scaled_dot_product_attention, where it can, set AttentionSpec(backend='sdpa')"
        )


# Arguments of transformers' attention calls that change the result and that no distance backend computes.
_REFUSED = {
    "s_aux": "attention sinks compare with absolute logits, which a distance does not keep",
    "sinks": "attention sinks compare with absolute logits, which a distance does not keep",
    "softcap": "a cap on the logits needs absolute logits, which a distance does not keep",
    "indices": "sparse key selection is not implemented",
    "block_indices": "sparse key selection is not implemented",
    "cache": "the paged cache of continuous batching is not implemented",
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
    """Whether the caller wants attention weights: by argument, or through transformers' output capturing."""
    if arguments.get("output_attentions"):
        return True
    collector = _active_collector.get()
    return bool(collector) and any("attentions" in name for name in collector)


def _fallback_forward(module, query, key, value, attention_mask, *, fallback, want_weights, **kwargs):
    """Attention of a module that was not converted: what the base model would have run."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if want_weights or fallback == "eager" or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        if eager is None:
            raise ValueError(f"{type(module).__name__} has no eager attention that could return weights")
        return eager(module, query, key, value, _additive(attention_mask, module, query, key, kwargs), **kwargs)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


def _additive(mask, module, query, key, kwargs) -> Tensor | None:
    """The float mask an eager attention expects, from the bool (or absent) one of our mask function."""
    if mask is None and _is_causal(module, query, mask, kwargs.get("is_causal")):
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None or mask.dtype != torch.bool:
        return mask
    # Eager attention has its softmax in float32, where float64's least number would be -inf, and a masked row NaN.
    least = max(torch.finfo(query.dtype).min, torch.finfo(torch.float32).min)
    return torch.zeros((), dtype=query.dtype, device=query.device).masked_fill(~mask, least)


def _is_causal(module, query, attention_mask, is_causal) -> bool:
    """transformers' own rule: the flag counts only without a mask and for more than one query."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    return query.shape[2] > 1 and attention_mask is None and bool(is_causal)


def _check_heads(module, state, query) -> None:
    if query.shape[1] != state.num_heads:
        raise ValueError(
            f"{type(module).__name__} was converted with {state.num_heads} heads but calls attention with "
            f"{query.shape[1]}; convert the model again"
        )


def _call(query, mask, position_bias, is_causal, want_weights, reference, kwargs) -> dict:
    """What attention needs beside query, key and value."""
    scaling = kwargs.get("scaling")
    return {
        "scaling": query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        "mask": mask,
        "position_bias": position_bias,
        "is_causal": is_causal,
        "dropout_p": kwargs.get("dropout") or 0.0,
        "backend": "reference" if reference else None,
        "return_weights": want_weights,
    }


def _observed(state, query, key, value, call) -> Tensor:
    """What a conversion that looks at this module puts in place of its attention's output."""
    groups = query.shape[1] // key.shape[1]
    return state.observer(state, query, repeat_kv(key, groups), repeat_kv(value, groups), call)


def _nystrom(state, query, key, value, call) -> tuple[Tensor, Tensor | None]:
    call = {**call, "is_cross": state.is_cross, "is_causal": call["is_causal"] and not state.is_cross}
    if state.observer is not None:
        call["position_bias"] = as_tensor(call["position_bias"], query.shape[2], key.shape[2])
        return _observed(state, query, key, value, call), None
    with without_autocast(query.device.type):
        return nystrom_forward(state, query, key, value, call, attend)


def _forward(
    module, query, key, value, attention_mask, *, reference, kwargs, linear=False
) -> tuple[Tensor, Tensor | None]:
    state: DistanceAttentionState | None = getattr(module, "distattn", None)
    want_weights = weights_requested(kwargs)
    converted = isinstance(state, nn.Module)
    if linear:
        is_causal = kwargs.get("is_causal")
        is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        position_bias = bias_behind(kwargs.get("position_bias"))
        if converted and state.is_nystrom:
            refuse_unsupported(module, kwargs)
            _check_heads(module, state, query)
            call = _call(query, attention_mask, position_bias, is_causal, want_weights, reference, kwargs)
            output, weights = _nystrom(state, query, key, value, call)
            return output.transpose(1, 2).contiguous(), weights
        if "position_bias" in kwargs:
            kwargs = {**kwargs, "position_bias": as_tensor(position_bias, query.shape[2], key.shape[2])}
        attention_mask = written_out(attention_mask, query.shape[2], key.shape[2], is_causal, query.device)
    if not converted:
        fallback = "eager" if reference else "sdpa"
        return _fallback_forward(
            module, query, key, value, attention_mask, fallback=fallback, want_weights=want_weights, **kwargs
        )
    refuse_unsupported(module, kwargs)
    _check_heads(module, state, query)
    is_causal = _is_causal(module, query, attention_mask, kwargs.get("is_causal"))
    if is_causal and key.shape[2] > query.shape[2]:
        # Prefill into an empty static cache: the keys behind the queries are not filled yet.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if query.shape[0] == 1 and key.shape[0] > 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    position_bias = kwargs.get("position_bias")
    if position_bias is not None and position_bias.shape[-1] > key.shape[2]:
        position_bias = position_bias[..., : key.shape[2]]
    shape = (*query.shape[:3], key.shape[2])
    keep, bias = split_mask(attention_mask, shape)
    if position_bias is not None:
        # A bias may mask, too (T5 adds its mask to it).
        open_entries, position_bias = split_mask(position_bias, shape)
        keep = open_entries if keep is None else keep & open_entries
    call = _call(query, keep, add_bias(position_bias, bias), is_causal, want_weights, reference, kwargs)
    if state.observer is not None:
        output, weights = _observed(state, query, key, value, call), None
    else:
        output, weights = attend_groups(state, query, key, value, call)
    return output.transpose(1, 2).contiguous(), weights


def attend_groups(state, query, key, value, call) -> tuple[Tensor, Tensor | None]:
    """Run each group of heads by its own spec and the rest by dot product; (B, H, N, d_v) and weights or None."""
    call = dict(call)
    backend = call.pop("backend")
    parts = state.parts()
    if len(parts) == 1:
        return attend(parts[0][1], query, key, value, call, backend)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    results = []
    for heads, group in parts:
        index = torch.tensor(heads, device=query.device)
        selected = dict(call, **{name: of_heads(call[name], index) for name in ("mask", "position_bias")})
        results.append((heads, *attend(group, query[:, index], key[:, index], value[:, index], selected, backend)))
    return join_heads(results)


def attend(group, query, key, value, call, backend) -> tuple[Tensor, Tensor | None]:
    """Exact attention of one group of heads, or dot product where there is none."""
    dtype, want_weights = value.dtype, call["return_weights"]
    if group is None:
        metric, lam, p = get_metric("dot"), 1.0, None
    else:
        with without_autocast(query.device.type):
            query, key, lam = group(query, key)
        metric, p, backend = get_metric(group.metric), group.p, backend or group.spec.backend
        if value.shape[1] != key.shape[1]:
            value = repeat_kv(value, key.shape[1] // value.shape[1])
    inputs = AttentionInputs(
        query,
        key,
        value.to(key.dtype),
        metric,
        lam,
        call["scaling"],
        p,
        call["mask"],
        call["position_bias"],
        call["is_causal"],
        call["dropout_p"],
    )
    result = run_attention(inputs, "reference" if want_weights else validate_backend(backend or "auto"), want_weights)
    output, weights = result if want_weights else (result, None)
    return output.to(dtype), None if weights is None else weights.to(dtype)


def distattn_attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    position_bias=None,
    *,
    reference=False,
    linear=False,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of converted models, by each spec's backend. Returns ((B, N, H, d_v), weights or None).

    It takes what transformers' `sdpa_attention_forward` takes, also by position. reference: by the readable reference
    (`attn_implementation="eager"`). linear: of models with Nyström attention, which get padding masks only (see
    `padding_mask`); with reference, quadratic in time and memory.
    """
    given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "position_bias": position_bias}
    # Without those left out: what an unconverted module's attention takes for them is its own affair.
    kwargs.update({name: value for name, value in given.items() if value is not None})
    return _forward(module, query, key, value, attention_mask, reference=reference, kwargs=kwargs, linear=linear)


def _full_mask(*args, **kwargs):
    """transformers' bool mask, never left to the `is_causal` flag."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


# Without a mask function of the same name transformers passes no mask at all and the model would see the future.
for _name, _options, _mask in (
    (IMPLEMENTATION, {}, sdpa_mask),
    (FULL_MASK_IMPLEMENTATION, {}, _full_mask),
    (EAGER_IMPLEMENTATION, {"reference": True}, _full_mask),
    (LINEAR_IMPLEMENTATION, {"linear": True}, padding_mask),
    (LINEAR_EAGER_IMPLEMENTATION, {"reference": True, "linear": True}, padding_mask),
):
    AttentionInterface.register(_name, partial(distattn_attention_forward, **_options))
    AttentionMaskInterface.register(_name, _mask)
