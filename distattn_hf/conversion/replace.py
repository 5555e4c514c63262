"""`replace_attention`: `torch.nn.MultiheadAttention` anywhere in a PyTorch module -> the same with distances."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.attention_spec import AttentionSpec
from ..core.inputs import add_triangle
from ..layers.multihead import DistanceMultiheadAttention, check_replaceable, checked_spec
from .calibrate import CalibrationOptions, fit_group
from .convert import INITS, prepared
from .fit import LayerData
from .observe import in_eval_mode, teacher_attention


def replace_attention(
    module: nn.Module,
    spec: AttentionSpec | str = "l2",
    *,
    init: str = "calibrated",
    calibration: Iterable | None = None,
    options: CalibrationOptions | None = None,
) -> nn.Module:
    """Return a copy of any PyTorch module in which each `torch.nn.MultiheadAttention` attends by distances.

    Weights are carried over, `nn.TransformerEncoder` and its like included. transformers' models go through `convert`.

    Args:
        module: the module itself is not touched.
        spec: an `AttentionSpec` of an exact metric, or the name of one.
        init: as in `convert`. "calibrated" fits λ, α, shift and ε per head to the dot-product attention that the module
            has; "exact" (sqeuclidean) loses nothing; "plain" only sets λ to the metric's default.
        calibration: of "calibrated": inputs of the module, each a tensor, or a tuple or a dict of its arguments. They
            are run together, layer by layer, so a few thousand tokens are what fits in memory.
        options: `CalibrationOptions`; None for the defaults.

    Returns:
        The copy, in the mode the module is in. `copy.replaced` is {name of a layer: nats per query by which its
        attention is off, the mean over heads, on held-out inputs}, or None of each where nothing was measured.

    Raises:
        ValueError: before anything is built: no such layer, or one of a subclass, whose own code would be lost; a spec
            or an init that cannot be, no calibration.
    """
    options = options or CalibrationOptions()
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    spec = prepared(checked_spec(spec), init)
    if options.chooses_heads:
        raise ValueError("max_error, beyond_share and select are for mechanism='nystrom', which this is not")
    batches = [] if calibration is None else [_arguments(batch) for batch in calibration]
    if (init == "calibrated") != bool(batches):
        must = "must hold inputs of the module" if init == "calibrated" else f"is not used by init={init!r}"
        raise ValueError(f"calibration {must}, got {len(batches)}")
    names = [name for name, layer in module.named_modules(remove_duplicate=False) if _is_replaced(layer)]
    if not names:
        raise ValueError(f"{type(module).__name__} holds no torch.nn.MultiheadAttention with dot products")
    for name in names:
        try:
            check_replaceable(module.get_submodule(name))
        except ValueError as error:
            raise ValueError(f"{name or 'module'}: {error}") from None
    module = copy.deepcopy(module)
    replaced = list(dict.fromkeys(map(module.get_submodule, names)))
    for layer in replaced:
        DistanceMultiheadAttention.convert_in_place(layer, spec)
    for encoder in module.modules():
        # It would make nested tensors of padded texts for a fused path that its layers no longer take.
        if isinstance(encoder, nn.TransformerEncoder) and any(_holds_ours(layer) for layer in encoder.layers):
            encoder.use_nested_tensor = False
    off = dict.fromkeys(replaced)
    if batches:
        off = _calibrate(module, batches, options)
    module.replaced = {name: off.get(module.get_submodule(name)) for name in names}
    return module


def _is_replaced(layer: nn.Module) -> bool:
    return isinstance(layer, nn.MultiheadAttention) and not isinstance(layer, DistanceMultiheadAttention)


def _holds_ours(layer: nn.Module) -> bool:
    return any(isinstance(part, DistanceMultiheadAttention) for part in layer.modules())


def _arguments(batch) -> tuple[tuple, dict]:
    """Return (args, kwargs) of one input of the module."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise ValueError(f"calibration must hold tensors, tuples or dicts of arguments, got {type(batch).__name__}")


def _calibrate(module: nn.Module, batches: list, options: CalibrationOptions) -> dict[nn.Module, float]:
    """Fit each layer to the dot-product attention of the module on the batches; return its nats off."""
    layers = [layer for layer in module.modules() if isinstance(layer, DistanceMultiheadAttention)]
    seen: dict[nn.Module, list] = {layer: [] for layer in layers}

    def observe(layer, query, key, value, call):
        seen[layer].append((query, key, call))
        return teacher_attention(query, key, value, call)

    try:
        for layer in layers:
            layer.observer = observe
        with in_eval_mode(module), torch.inference_mode(False), torch.no_grad():
            for args, kwargs in batches:
                module(*args, **kwargs)
    finally:
        for layer in layers:
            layer.observer = None
    off = {}
    for layer, uses in seen.items():
        if not uses:
            name = next(name for name, part in module.named_modules() if part is layer)
            raise ValueError(f"calibration: the inputs never reached {name!r}, a torch.nn.MultiheadAttention")
        result = fit_group(layer.distattn, _joined(uses), options)
        off[layer] = float(result["after"].mean())
    return off


def _joined(uses: list) -> LayerData:
    """Return one attention problem of all calls of a layer; rows and keys are padded to the longest and hidden."""
    rows, keys = (max(use[part].shape[2] for use in uses) for part in (0, 1))
    heads = max(call.mask.shape[1] if call.mask is not None else 1 for _, _, call in uses)
    has_bias = any(call.position_bias is not None for _, _, call in uses)
    parts: list[list[Tensor]] = [[], [], [], []]
    for query, key, call in uses:
        num_queries, num_keys = query.shape[2], key.shape[2]
        keep = call.mask if call.mask is not None else query.new_ones(1, 1, 1, 1, dtype=torch.bool)
        if call.is_causal:
            keep = add_triangle(keep, num_queries, num_keys, query.device)
        beyond = (0, keys - num_keys, 0, rows - num_queries)
        parts[0].append(F.pad(query, (0, 0, 0, rows - num_queries)))
        parts[1].append(F.pad(key, (0, 0, 0, keys - num_keys)))
        parts[2].append(F.pad(keep.expand(len(query), heads, num_queries, num_keys), beyond))
        if has_bias:
            bias = call.position_bias if call.position_bias is not None else query.new_zeros(1, 1, 1, 1)
            parts[3].append(F.pad(bias.expand(len(query), query.shape[1], num_queries, num_keys), beyond))
    queries, keys, keep, *bias = (torch.cat(part) for part in parts if part)
    call = replace(uses[0][2], mask=keep, position_bias=bias[0] if bias else None, is_causal=False)
    data = LayerData(queries, keys, call, None)
    if not data.fit_sequences:
        raise ValueError("calibration: no input reaches a torch.nn.MultiheadAttention with two or more visible keys")
    return data
