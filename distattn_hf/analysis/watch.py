"""Observe every attention call of a model, or replace its output, without changing the model itself."""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..core.attention import without_autocast
from ..core.discovery import argument_names, base_prefix, find_attention_modules, locate
from ..core.head_groups import write_out
from ..core.interface import (
    IMPLEMENTATIONS,
    NYSTROM_EAGER_IMPLEMENTATION,
    NYSTROM_IMPLEMENTATION,
    attend,
    attend_groups,
    read_call,
    refuse_unsupported,
)
from ..core.native_attention import DistAttnAttention
from ..core.nystrom_heads import nystrom_forward
from ..core.parameters import DistanceAttentionState
from ..core.retrieval_heads import retrieval_forward
from .weights import AttentionCall, MechanismCall, StoredCall

_NYSTROM = (NYSTROM_IMPLEMENTATION, NYSTROM_EAGER_IMPLEMENTATION)
# Other implementations (flash, flex) use other masks; a watched model runs sdpa instead of them.
_KNOWN = ("sdpa", "eager", *IMPLEMENTATIONS)


def no_weights(model, why: str) -> ValueError:
    """Return the error for a model without attention weights."""
    return ValueError(f"no attention weights available from this model: {type(model).__name__} {why}")


def attention_modules(model) -> dict[str, dict]:
    """Return `find_attention_modules`, or the native family's modules."""
    native = {name: m for name, m in model.named_modules() if isinstance(m, DistAttnAttention)}
    if not native:
        return find_attention_modules(model)
    prefix = base_prefix(model)
    return {
        name.removeprefix(prefix): {
            "layer": module.layer_idx,
            "kind": "cross" if module.is_cross_attention else "self",
            "num_heads": module.num_heads,
            "head_dim": module.head_dim,
        }
        for name, module in native.items()
    }


def forward(model, batch: dict, **options):
    """Return model(**batch) without a KV cache."""
    accepted = argument_names(type(model))
    if ("use_cache" in accepted or "kwargs" in accepted) and hasattr(model.config.get_text_config(), "use_cache"):
        options["use_cache"] = False
    return model(**batch, **options)


@contextmanager
def watched(model, watcher: Callable[[AttentionCall], Tensor | None]):
    """Call `watcher(call)` for every attention call of `model` within the context, with call.output set.

    A tensor (B, H, N, d_v) that it returns replaces the output. Works through transformers' attention interface: within
    the context, the function under the model's implementation name is wrapped; the model makes the same masks as for
    it. A converted module is observed through its state, a native mechanism through a hook.

    Raises:
        ValueError: if no module follows the interface, and in the forward pass for an argument whose effect on the
            weights is unknown (sparse selection of blocks, a paged cache).
    """
    entries = attention_modules(model)
    modules = {locate(model, name): (name, entry) for name, entry in entries.items()}
    if not modules:
        raise no_weights(model, "does not follow transformers' attention interface")
    for module, (name, _) in modules.items():
        if not isinstance(state := getattr(module, "distattn", None), DistanceAttentionState | None):
            raise ValueError(
                f"{name!r} runs the code that came with its checkpoint ({type(state).__module__}), which the package "
                "cannot look into; load the model after `import distattn_hf`"
            )
    configs = {id(m.config): m.config for m in modules if getattr(m, "config", None) is not None}
    implementations = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        if config._attn_implementation not in _KNOWN:
            config._attn_implementation_internal = "sdpa"
    overridden = ALL_ATTENTION_FUNCTIONS._local_mapping
    names = {config._attn_implementation for config in configs.values()}
    earlier_overrides = {name: overridden[name] for name in names if name in overridden}
    for name in names:
        original = None if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        overridden[name] = _wrapper(name, original, modules, watcher)
    hooks = [
        module.mechanism.register_forward_hook(_mechanism_hook(name, entry, watcher), with_kwargs=True)
        for module, (name, entry) in modules.items()
        if isinstance(module, DistAttnAttention) and module.mechanism is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name in names:
            del overridden[name]
        overridden.update(earlier_overrides)
        for key, config in configs.items():
            config._attn_implementation_internal = implementations[key]


def _wrapper(implementation: str, original, modules: dict, watcher: Callable):
    def run(module, query, key, value, attention_mask, *args, **kwargs):
        function = original or sys.modules[type(module).__module__].eager_attention_forward
        if args:
            # By position, eager functions take scaling first, others dropout.
            bound = signature(function).bind(module, query, key, value, attention_mask, *args, **kwargs).arguments
            kwargs = {**bound.pop("kwargs", {}), **dict(list(bound.items())[5:])}
        if module not in modules:
            return function(module, query, key, value, attention_mask, **kwargs)
        name, entry = modules[module]
        state = getattr(module, "distattn", None)
        if isinstance(state, DistanceAttentionState):
            state.observer = _observer(name, entry, watcher)
            try:
                return function(module, query, key, value, attention_mask, **kwargs)
            finally:
                state.observer = None
        call = _untouched(implementation, module, name, entry, query, key, value, attention_mask, kwargs)
        output, weights = function(module, query, key, value, attention_mask, **kwargs)
        call.output = output.transpose(1, 2)
        replacement = watcher(call)
        return output if replacement is None else replacement.transpose(1, 2).contiguous(), weights

    return run


def _mechanism_hook(name: str, entry: dict, watcher: Callable):
    """Return a forward hook of a native mechanism that passes its call to `watcher`."""

    def after(mechanism, arguments, options, result):
        call = MechanismCall(name, entry, mechanism, arguments, options, result[0])
        replacement = watcher(call)
        return None if replacement is None else (replacement, result[1])

    return after


def _observer(name: str, entry: dict, watcher: Callable):
    """Return an observer that runs a converted module's attention as unobserved and passes the call to `watcher`."""

    def observe(state, query, key, value, call):
        observer, state.observer = state.observer, None
        call = replace(call, return_weights=False)
        try:
            if state.is_nystrom:
                with without_autocast(query.device.type):
                    output = nystrom_forward(state, query, key, value, call, attend)[0]
            elif state.is_retrieval:
                output = retrieval_forward(state, query, key, value, call, attend)[0]
            else:
                output = attend_groups(state, query, key, value, call)[0]
        finally:
            state.observer = observer
        observed_call = AttentionCall(
            name, entry["layer"], entry["kind"], query, key, value, call.scaling, call.mask,
            call.position_bias, call.is_causal, state.parts(), call.softcap, output, call.sink_logit, call.groups,
        )  # fmt: skip
        replacement = watcher(observed_call)
        return output if replacement is None else replacement

    return observe


def _untouched(implementation, module, name, entry, query, key, value, mask, kwargs) -> AttentionCall:
    """Return the call of a module with dot-product attention."""
    refuse_unsupported(module, kwargs)
    nystrom = implementation in _NYSTROM
    call = read_call(module, query, mask, kwargs, nystrom=nystrom)
    if kwargs.get("indices") is not None and implementation not in ("eager", "sdpa"):
        # For transformers' own attention the model has put its choice of keys into the mask.
        call = call.with_selected_keys(kwargs["indices"], key.shape[2])
    if nystrom:
        call = write_out(call, query.shape[2], key.shape[2], query.device)
    if implementation == "eager":  # its mask is always written out
        call = replace(call, is_causal=False)
    call = call.merged((*query.shape[:3], key.shape[2]))
    groups = query.shape[1] // key.shape[1]
    return AttentionCall(
        name, entry["layer"], entry["kind"], query, repeat_kv(key, groups), repeat_kv(value, groups), call.scaling,
        call.mask, call.position_bias, call.is_causal, [(list(range(query.shape[1])), None)], call.softcap,
        sink_logit=call.sink_logit,
    )  # fmt: skip


def run_watched(model, batch: dict, watcher: Callable[[AttentionCall], None]) -> None:
    """Run one forward pass without gradients and pass its attention calls to `watcher`, for any model with weights.

    Models that do not follow transformers' attention interface run with output_attentions=True, which returns whole
    maps. Raises `ValueError` where that returns none either.
    """
    model.eval()
    with torch.no_grad():
        if not attention_modules(model):
            for call in _stored_calls(model, batch):
                watcher(call)
            return
        call_names = []

        def watch(call):
            call_names.append(call.name)
            watcher(call)

        with watched(model, watch):
            forward(model, batch)
    if not call_names:
        raise no_weights(model, "has attention modules, but none went through the attention interface")


def _stored_calls(model, batch: dict):
    """Return the maps that a model returns with output_attentions=True, as calls."""
    why = "does not follow transformers' attention interface and gives none with output_attentions=True"
    try:
        outputs = forward(model, batch, output_attentions=True)
    except (TypeError, NotImplementedError) as error:
        raise no_weights(model, f"{why} ({error})") from None
    padding = batch.get("attention_mask")
    decoder = batch.get("decoder_attention_mask")
    calls = []
    for field, kind, keys in (
        ("attentions", "self", padding),
        ("encoder_attentions", "self", padding),
        ("decoder_attentions", "self", decoder),
        ("cross_attentions", "cross", padding),
    ):
        for index, weights in enumerate(getattr(outputs, field, None) or ()):
            if isinstance(weights, Tensor) and weights.dim() == 4:
                if bool((weights < 0).any()):
                    raise no_weights(model, f"gives negative numbers in {field}, which are no weights")
                mask_fits = keys is not None and keys.shape[-1] == weights.shape[-1]
                mask = keys.bool()[:, None, None, :] if mask_fits else None
                calls.append(StoredCall(f"{field}.{index}", index, kind, weights, mask))
    if not calls:
        raise no_weights(model, why)
    return calls


def capture(model, batch: dict) -> dict[str, AttentionCall]:
    """Capture every attention call of one forward pass by module name: queries, keys, values, outputs; no weights yet.

    A module that runs more than once keeps its last call. Raises `ValueError` as `run_watched`.
    """
    calls: dict[str, AttentionCall] = {}
    run_watched(model, batch, lambda call: calls.__setitem__(call.name, call))
    return calls
