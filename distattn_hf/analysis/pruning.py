"""Take layers and heads out of a model for good: smaller and faster, and a checkpoint of its own class."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.attention_spec import AttentionSpec, numeric_pattern
from ..core.discovery import locate
from ..data.config import is_integer
from .intervention import PRUNED, probe_batch, replaced_heads, resolve_heads
from .watch import attention_modules, forward, no_weights


@torch.no_grad()
def prune_layers(model, layers: Iterable[int], batch: dict | None = None):
    """Return a copy of the model without some layers (attention and feed-forward); `model` is not changed.

    What a layer adds is left out, the others are numbered anew, and config.num_hidden_layers with what the config says
    by layer, a converted model's specs and modules among it: the copy saves and loads as a model of that size, and
    reverts to one. The conversion's report is of the whole model and stays behind.

    Args:
        layers: their numbers; at least one layer stays.
        batch: an input to compare the copy on with the model whose layers pass on what they are given; None: a small
            one of its own.

    Raises:
        ValueError: for numbers that are no layers, a model with several stacks of layers, and one whose other layers
            depend on their number in a way that its config does not say.
    """
    prefix, stack = _stack(model)
    layers, count = sorted(set(layers)), len(stack)
    if not layers or not all(is_integer(layer, 0) and layer < count for layer in layers) or len(layers) == count:
        raise ValueError(f"layers must be numbers 0 to {count - 1}, at least one and not all, got {layers}")
    numbers = {old: new for new, old in enumerate(old for old in range(count) if old not in layers)}
    config = copy.deepcopy(model.config)
    text_config = config.get_text_config()
    if text_config.num_hidden_layers != count:
        raise ValueError(
            f"{type(model).__name__} has {count} layers in {prefix!r}, and config.num_hidden_layers="
            f"{text_config.num_hidden_layers}: the package cannot tell which layers the config counts"
        )
    for name, value in list(vars(text_config).items()):
        if "layer" in name and isinstance(value, list | tuple) and len(value) == count:
            setattr(text_config, name, [value[old] for old in numbers])
    text_config.num_hidden_layers = len(numbers)
    _renumber_config(config, prefix, numbers)
    path = next(name for name, module in model.named_modules() if module is stack)
    state = {}
    for name, tensor in model.state_dict().items():
        number = re.match(rf"{re.escape(path)}\.(\d+)\.(.*)", name)
        if number is None:
            state[name] = tensor
        elif int(number[1]) in numbers:
            state[f"{path}.{numbers[int(number[1])]}.{number[2]}"] = tensor
    pruned = _built(model, config, state)
    batch = probe_batch(model) if batch is None else batch
    hooks = [stack[layer].register_forward_hook(_pass_on, with_kwargs=True) for layer in layers]
    try:
        expected = _first_output(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    _check_same(pruned, batch, expected, f"layers of {type(model).__name__} depend on their number")
    return pruned


@torch.no_grad()
def remove_heads(model, heads: Mapping, batch: dict | None = None):
    """Return a copy of the model from which heads are gone, with smaller projections; `model` is not changed.

    For models whose config holds one number of heads for all layers beside a head size of its own (`head_dim`: Llama,
    Mistral, Qwen, Gemma, ...): as many heads of every layer, and of each key head all its query heads or none. In other
    architectures no config could load the result; `intervention.prune_heads` sets heads to zero in any.

    Raises:
        ValueError: for a converted model (prune the teacher, then convert), another architecture or choice of heads,
            and what transformers says of a config with so many heads.
    """
    chosen = resolve_heads(model, heads)
    config, entries = copy.deepcopy(model.config), attention_modules(model)
    text_config = config.get_text_config()
    if getattr(config, "distattn", None) is not None:
        raise ValueError(f"{type(model).__name__} has parameters by head; prune the teacher, then convert it")
    if getattr(text_config, "head_dim", None) is None or config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} takes its head size from hidden_size / heads, so no config could load it with "
            "fewer heads; intervention.prune_heads sets them to zero"
        )
    if set(chosen) != set(entries) or len({len(numbers) for numbers in chosen.values()}) != 1:
        counts = {name: len(chosen.get(name, ())) for name in entries}
        raise ValueError(f"config has one number of heads for all layers: as many must go of each, got {counts}")
    num_heads = text_config.num_attention_heads
    groups = num_heads // text_config.num_key_value_heads
    state = dict(model.state_dict())
    path_of = {module: name for name, module in model.named_modules()}
    for name, numbers in chosen.items():
        key_heads = sorted({number // groups for number in numbers})
        if len(key_heads) * groups != len(numbers) or len(numbers) == num_heads:
            raise ValueError(
                f"{name!r}: of each key head all {groups} query heads must go, and one key head stay; got {numbers}"
            )
        module = locate(model, name)
        kept = {True: _others(num_heads, numbers), False: _others(num_heads // groups, key_heads)}
        for projection, of_queries, axis in (
            ("q_proj", True, 0), ("k_proj", False, 0), ("v_proj", False, 0), ("o_proj", True, 1),
        ):  # fmt: skip
            layer = getattr(module, projection, None)
            size = (num_heads if of_queries else num_heads // groups) * text_config.head_dim
            if not isinstance(layer, nn.Linear) or layer.weight.shape[axis] != size:
                raise ValueError(f"{name!r} has no linear layer {projection!r} of {size} rows to take heads from")
            for kind in ("weight", "bias"):
                key = f"{path_of[layer]}.{kind}"
                if key in state and (kind == "weight" or axis == 0):
                    by_head = state[key].unflatten(axis, (-1, text_config.head_dim))
                    state[key] = by_head.index_select(axis, kept[of_queries]).flatten(axis, axis + 1)
    removed = len(next(iter(chosen.values())))
    text_config.num_attention_heads = num_heads - removed
    text_config.num_key_value_heads = (num_heads - removed) // groups
    pruned = _built(model, config, state)
    batch = probe_batch(model) if batch is None else batch
    with replaced_heads(model, chosen):
        expected = _first_output(model, batch)
    _check_same(pruned, batch, expected, f"heads of {type(model).__name__} depend on their number")
    return pruned


def _others(count: int, numbers: list[int]) -> Tensor:
    return torch.tensor([number for number in range(count) if number not in numbers])


def _stack(model) -> tuple[str, nn.ModuleList]:
    """Return (base-relative name, the list of layers) of a model with one stack; raises `ValueError` for others."""
    names = list(attention_modules(model))
    if not names:
        raise no_weights(model, "does not follow transformers' attention interface")
    prefixes = {found[1] if (found := re.match(r"(.+?)\.\d+\.", name)) else name for name in names}
    if len(prefixes) > 1 or not isinstance(stack := locate(model, prefix := prefixes.pop()), nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} has no single stack of layers (its attention is in {', '.join(names[:3])}, ...), "
            "so a number does not say which layer"
        )
    return prefix, stack


def _renumber_config(config, prefix: str, numbers: dict[int, int]) -> None:
    """Number anew what the config says of modules by name or of layers by number."""

    def renamed(table: dict) -> dict:
        kept = {}
        for name, value in table.items():
            number = re.match(rf"{re.escape(prefix)}\.(\d+)\.(.*)", name)
            if number is None:
                kept[name] = value
            elif int(number[1]) in numbers:
                kept[f"{prefix}.{numbers[int(number[1])]}.{number[2]}"] = value
        return kept

    if pruned := getattr(config, PRUNED, None):
        setattr(config, PRUNED, renamed(pruned))
    # Of native models: an option of a mechanism, one value a layer.
    for field in ("mechanism_options", "cross_options"):
        options = getattr(config, field, None) or {}
        for name, value in options.items():
            if isinstance(value, list | tuple):
                options[name] = [value[old] for old in numbers]
    block = getattr(config, "distattn", None)
    if block is None:
        return
    specs, places = [], {}
    for place, spec in enumerate(AttentionSpec.from_dict(values) for values in block["specs"]):
        layers = numeric_pattern(spec.layers) if isinstance(spec.layers, str) else spec.layers
        if layers is not None:
            layers = tuple(numbers[layer] for layer in sorted(layers) if layer in numbers)
        if layers != ():
            places[place] = len(specs)
            specs.append((spec if layers is None else replace(spec, layers=layers)).to_dict())
    if not specs:
        raise ValueError("all converted layers would go; revert the model first")
    modules = None if block["modules"] is None else renamed(block["modules"])
    for name, entry in (modules or {}).items():
        groups = [{**group, "spec": places[group["spec"]]} for group in entry["groups"]]
        layer = int(re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)[1])
        modules[name] = {**entry, "layer": layer, "groups": groups}
    config.distattn = {**block, "specs": specs, "modules": modules}


def _built(model, config, state: dict[str, Tensor]):
    """Return a model of the same class with this config and these tensors, copied."""
    pruned = type(model)._from_config(config, attn_implementation=model.config._attn_implementation)
    pruned.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    pruned.tie_weights()
    if pruned.can_generate():
        pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned.to(model.device).eval()


def _pass_on(module, arguments, options, output):
    """Return what a layer was given in place of its output (forward hook)."""
    hidden_states = arguments[0] if arguments else options["hidden_states"]
    return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states


def _first_output(model, batch: dict) -> Tensor:
    model.eval()
    return forward(model, batch, return_dict=True).to_tuple()[0].float()


def _check_same(pruned, batch: dict, expected: Tensor, why: str) -> None:
    """Raise `ValueError` unless the pruned model gives what the whole one gives without these parts."""
    difference = float((_first_output(pruned, batch) - expected).abs().max())
    # Sums over fewer columns round otherwise; another layer's mask or encoding changes outputs by their own size.
    tolerance = 1e-3 if torch.finfo(pruned.dtype).eps < 1e-6 else 3e-2
    if not difference <= tolerance * float(expected.abs().max().clamp_min(1e-6)):
        raise ValueError(
            f"{why}: without these parts outputs differ by {difference:.3g} from the whole model's that leaves them out"
        )
