"""Find the attention modules of a model that go through transformers' attention interface, and their shapes."""

import inspect
import re
from functools import lru_cache

from torch import nn

from .attention_spec import AttentionSpec, numeric_pattern

_HEAD_COUNT_NAMES = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "num_attn_heads")
_HEAD_SIZE_NAMES = ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "d_head", "dim_head")
_CROSS_MARKS = ("cross", "encdec", "encoder_attn")


def follows_interface(module: nn.Module) -> bool:
    """Return whether the module's forward picks its attention function from `ALL_ATTENTION_FUNCTIONS`."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and not _pools(module)


def _pools(module: nn.Module) -> bool:
    """Return whether a module weighs what it gets by a query of its own and projects nothing.

    Such a one chooses among layers (Inkling 2), at each position, which it takes for heads: no attention over tokens.
    """
    own = next(module.parameters(recurse=False), None)
    return own is not None and all(next(child.parameters(), None) is None for child in module.children())


def compares_logits(module: nn.Module) -> dict[str, bool]:
    """Return {"sink": True} of a module with a learned sink, {"softcap": True} of one with a cap on its logits.

    By what its forward passes to its attention: some classes have the attributes and pass nothing.
    """
    constants = inspect.unwrap(type(module).forward).__code__.co_consts
    passed = {name for c in constants for name in (c if isinstance(c, tuple) else (c,))}
    found = {}
    # A class may have sinks in some of its layers only (MiMo), or make them from its inputs (Inkling).
    if passed & {"s_aux", "sinks"} and getattr(module, "sinks", passed) is not None:
        found["sink"] = True
    if "softcap" in passed and getattr(module, "attn_logit_softcapping", None) is not None:
        found["softcap"] = True
    return found


@lru_cache
def argument_names(module_class: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of the arguments of `forward`, in order, without self."""
    return tuple(inspect.signature(module_class.forward).parameters)[1:]


def base_prefix(model: nn.Module) -> str:
    """Return the base model's prefix in `model` ("transformer." in GPT2LMHeadModel, "" in GPT2Model)."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def _first(names, *holders) -> int | None:
    for holder in holders:
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _shape(module: nn.Module) -> tuple[int | None, int | None]:
    """Return (number of query heads, head size) from the module's own attributes, then its config's."""
    config = getattr(module, "config", None)
    heads = _first(_HEAD_COUNT_NAMES, module, config)
    size = _first(_HEAD_SIZE_NAMES, module)
    if size is None and heads is not None:
        width = _first(("embed_dim", "hidden_size", "d_model", "all_head_size", "inner_dim"), module, config)
        size = width // heads if width else None
    return heads, size


def _layer_type(module: nn.Module, kind: str, layer: int | None) -> str:
    """Return which keys the model's masks leave to a module: a type as in transformers' `config.layer_types`."""
    config = getattr(module, "config", None)
    types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", layer)
    if kind == "cross":
        return "full_attention"
    if types and isinstance(index, int) and index < len(types):
        return types[index]
    # Without types all layers are alike (Mistral).
    for name, layer_type in (("sliding_window", "sliding_attention"), ("attention_chunk_size", "chunked_attention")):
        if getattr(module, name, None) or getattr(config, name, None):
            return layer_type
    return "full_attention"


def max_positions(config) -> int | None:
    """Return how many tokens the model's texts may have; None where its config does not say."""
    return _first(("max_position_embeddings",), config)


def find_attention_modules(model: nn.Module) -> dict[str, dict]:
    """Return {base-relative name: {"layer", "kind", "type", "num_heads", "head_dim"}} in the order of the model.

    "layer" is the first number in the name; "kind" is "self" or "cross"; "type" is that of transformers'
    `config.layer_types`. Unknown shapes are None. Some have more: see `compares_logits`.
    """
    prefix = base_prefix(model)
    modules = {}
    for name, module in model.named_modules():
        if not follows_interface(module):
            continue
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        cross = getattr(module, "is_cross_attention", False) is True or any(m in name.lower() for m in _CROSS_MARKS)
        heads, size = _shape(module)
        kind, layer = "cross" if cross else "self", int(number[1]) if number else None
        modules[name.removeprefix(prefix)] = {
            "layer": layer,
            "kind": kind,
            "type": _layer_type(module, kind, layer),
            "num_heads": heads,
            "head_dim": size,
            **compares_logits(module),
        }
    return modules


def locate(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module with this base-relative name, or None when this head class does not have it."""
    for candidate in (base_prefix(model) + name, name):
        try:
            return model.get_submodule(candidate)
        except AttributeError:
            continue
    return None


def select_modules(candidates: dict[str, dict], specs: list[AttentionSpec]) -> dict[str, dict]:
    """Return the modules that specs apply to, with their groups of heads: `modules` of the config block.

    Raises `ValueError` when a spec selects nothing, names a layer or head that does not exist, when two specs claim the
    same head, or when a Nyström spec claims heads that do not see all keys.
    """
    if not candidates:
        raise ValueError("the model has no attention module that follows transformers' attention interface")
    layers = {entry["layer"] for entry in candidates.values()}
    known = [f"{name} ({entry['type']})" for name, entry in candidates.items()]
    chosen: dict[str, dict] = {}
    for number, spec in enumerate(specs):
        numbers = numeric_pattern(spec.layers) if isinstance(spec.layers, str) else spec.layers
        if missing := [i for i in sorted(numbers or ()) if i not in layers]:
            numbers = sorted(i for i in layers if i is not None)
            raise ValueError(f"layers: there is no layer {missing[0]}; this model has layers {numbers}")
        matched = [
            name
            for name, entry in candidates.items()
            if spec.matches_layer(entry["layer"], name, entry["type"]) and spec.attention in (None, entry["kind"])
        ]
        if not matched:
            raise ValueError(
                f"the spec layers={spec.layers!r}, attention={spec.attention!r} selects no attention module; "
                f"candidates are {', '.join(known)}"
            )
        for name in matched:
            if spec.mechanism != "distance":
                _refuse_pattern(name, candidates, spec.mechanism)
            entry = chosen.setdefault(name, {**candidates[name], "groups": []})
            # The model's config holds the type, and may change.
            entry.pop("type", None)
            if entry["num_heads"] is None:
                raise ValueError(f"cannot tell the number of heads of {name!r}; leave it out with layers=...")
            heads = None if spec.heads is None else list(spec.heads)
            if heads and heads[-1] >= entry["num_heads"]:
                raise ValueError(f"heads: {name!r} has heads 0 to {entry['num_heads'] - 1}, got {heads[-1]}")
            _claim(name, entry, heads)
            if spec.mechanism == "nystrom" and any(specs[g["spec"]].mechanism == "nystrom" for g in entry["groups"]):
                raise ValueError(
                    f"heads: two specs with mechanism='nystrom' claim heads of {name!r}, whose cache serves one such "
                    "spec; give them separate layers"
                )
            mechanisms = {specs[g["spec"]].mechanism for g in entry["groups"]} | {spec.mechanism}
            if {"nystrom", "retrieval"} <= mechanisms:
                raise ValueError(
                    f"heads: specs with mechanism='nystrom' and mechanism='retrieval' claim heads of {name!r}, which "
                    "has one cache; give them separate layers"
                )
            entry["groups"].append({"spec": number, "heads": heads})
    return {name: chosen[name] for name in candidates if name in chosen}


def _refuse_pattern(name: str, candidates: dict[str, dict], mechanism: str) -> None:
    """Raise `ValueError` where the model's own mask would hide keys from a module whose mechanism reaches all keys."""
    kind = candidates[name]["type"]
    if "sliding" not in kind and "chunked" not in kind:
        return
    full_layers = sorted({entry["layer"] for entry in candidates.values() if entry["type"] == "full_attention"})
    raise ValueError(
        f"layers: {name!r} has {kind}, which mechanism={mechanism!r} cannot honour: it reaches all keys. "
        + (
            f"Use layers='full_attention' or layers={full_layers}; exact metrics take every layer"
            if full_layers
            else "This model has no layer of full_attention; exact metrics take every layer. Where its texts are no "
            "longer than its window, set config.sliding_window = None before converting"
        )
    )


def _claim(name: str, entry: dict, heads: list[int] | None) -> None:
    all_heads = set(range(entry["num_heads"]))
    for group in entry["groups"]:
        both = (all_heads if heads is None else set(heads)) & (
            all_heads if group["heads"] is None else set(group["heads"])
        )
        if both:
            raise ValueError(f"heads: two specs claim head {min(both)} of {name!r}; give them separate layers or heads")
