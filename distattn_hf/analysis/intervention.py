"""Change the output of single heads, temporarily or permanently, and measure the effect on the loss."""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .watch import attention_modules, forward, no_weights, watched

REPLACEMENTS = ("zero", "uniform", "mean")
# Config field with the heads that `prune_heads` removed.
PRUNED = "pruned_attention_heads"


def resolve_heads(model, heads: Mapping) -> dict[str, list[int]]:
    """Resolve {layer number or module name: heads} to {module name: heads}; None: all heads.

    A layer number stands for all attention modules of that layer. Raises `ValueError` for a layer, module or head that
    does not exist, and for an empty selection.
    """
    modules = attention_modules(model)
    if not modules:
        raise no_weights(model, "does not follow transformers' attention interface")
    resolved: dict[str, list[int]] = {}
    for key, numbers in heads.items():
        names = [n for n, entry in modules.items() if key in (n, entry["layer"])]
        if not names:
            layers = sorted({e["layer"] for e in modules.values() if e["layer"] is not None})
            raise ValueError(f"there is no layer or module {key!r}; layers are {layers}, modules {', '.join(modules)}")
        for name in names:
            count = modules[name]["num_heads"]
            numbers = range(count or 0) if numbers is None else numbers
            for head in numbers:
                if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < (count or 0):
                    raise ValueError(f"there is no head {head!r} in {name!r}, which has heads 0 to {(count or 0) - 1}")
            resolved[name] = sorted({*resolved.get(name, []), *numbers})
    if not any(resolved.values()):
        raise ValueError("heads names no head; give {layer number or module name: [head, ...]}")
    return resolved


def knocked_out(edges: Iterable[tuple[int, int]]) -> Callable[[Tensor], Tensor]:
    """Return a replacement for `replaced_heads` in which no query i sees key j, for (i, j) in edges.

    The rest of a row keeps its sum, as if a mask hid the keys (Geva et al., Dissecting recall of factual associations,
    2023). A row of which nothing is left gives zeros. Raises `ValueError` for edges that are no pairs of positions.
    """
    edges = sorted(set(edges))
    if not edges or any(len(edge) != 2 or min(edge) < 0 for edge in edges):
        raise ValueError(f"edges must be pairs (query, key) of positions from 0, at least one, got {edges[:3]!r}")

    def change(weights: Tensor) -> Tensor:
        for axis, size in enumerate(weights.shape[2:]):
            if (largest := max(edge[axis] for edge in edges)) >= size:
                raise ValueError(f"edges name {('query', 'key')[axis]} {largest}, and there are {size}")
        queries, keys = (torch.tensor(positions, device=weights.device) for positions in zip(*edges))
        left = weights.clone()
        left[:, :, queries, keys] = 0.0
        total = left.sum(-1, keepdim=True)
        scale = weights.sum(-1, keepdim=True) / total
        # A row without any of the edges stays bit for bit.
        changed = torch.zeros_like(total, dtype=torch.bool).index_fill_(2, queries, True)
        return torch.where(changed, torch.where(total > 0, left * scale, 0.0), weights)

    return change


@contextmanager
def replaced_heads(model, heads: Mapping, replacement="zero", means: dict[str, Tensor] | None = None):
    """Replace the outputs of some heads within the context.

    replacement: "zero"; "uniform": the mean value vector of the keys that a query may see; "mean": the head's mean
    output over a data set, `means` as from `mean_outputs`; or a function that is given the weights (B, heads, N, M) of
    a module's chosen heads, in float32 or more, and returns those that are to be in their place (see `knocked_out`).
    Raises `ValueError` for another name, missing means, and weights of another shape.
    """
    heads_by_module = resolve_heads(model, heads)
    if not callable(replacement) and replacement not in REPLACEMENTS:
        raise ValueError(f"replacement must be one of {', '.join(REPLACEMENTS)} or a function, got {replacement!r}")
    if replacement == "mean" and (missing := [name for name in heads_by_module if name not in (means or {})]):
        raise ValueError(f"replacement 'mean' needs means of {missing[0]!r}; see mean_outputs")

    def change(call):
        if call.name not in heads_by_module:
            return None
        output, index = call.output.clone(), heads_by_module[call.name]
        if replacement == "zero":
            output[:, index] = 0.0
        elif replacement == "mean":
            output[:, index] = means[call.name][index][:, None].to(output)
        elif callable(replacement):
            output[:, index] = _reweighted(call, index, replacement).to(output.dtype)
        else:
            for head in index:
                output[:, head] = _uniform(call, head).to(output.dtype)
        return output

    with watched(model, change):
        yield model


def _reweighted(call, heads: list[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the outputs (B, heads, N, d_v) with weights that `change` returns."""
    call.check_sums()
    weights = call.full()[:, heads]
    changed = change(weights)
    if not isinstance(changed, Tensor) or changed.shape != weights.shape:
        raise ValueError(
            f"a replacement must return weights of shape {tuple(weights.shape)}, as it is given, got "
            f"{tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__}"
        )
    return changed @ call.value[:, heads].to(changed.dtype)


def _uniform(call, head: int) -> Tensor:
    """Return the mean (B, N, d_v) of the values that each query may see; zeros where it sees none."""
    value, parts = call.value[:, head], []
    num_queries, step = call.shape[2], max(1, 2**22 // max(1, call.shape[0] * call.shape[3]))
    for start in range(0, num_queries, step):
        stop = min(start + step, num_queries)
        keep = call.keep_rows(start, stop)
        keep = keep[:, head if keep.shape[1] > 1 else 0].to(value.dtype).expand(len(value), stop - start, -1)
        parts.append(keep @ value / keep.sum(-1, keepdim=True).clamp_min(1))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def mean_outputs(model, batches: list[dict]) -> dict[str, Tensor]:
    """Return each module's mean attention output over the queries that are not padding: {module: (H, d_v)}."""
    from .samples import padding_of

    sums: dict[str, list] = {}
    for batch in batches:

        def add(call, batch=batch):
            keep = padding_of(model, call, batch)[0]
            total = (call.output * keep[:, None, :, None]).double().sum((0, 2))
            entry = sums.setdefault(call.name, [torch.zeros_like(total), 0])
            entry[0] += total
            entry[1] += int(keep.sum())

        with watched(model, add):
            forward(model, batch)
    return {name: (total / max(count, 1)).float() for name, (total, count) in sums.items()}


def loss_without(model, loss, heads: Mapping, replacement: str = "zero", means=None) -> dict[str, float]:
    """Return {"before", "after", "increase"} of a loss (`samples.TextLoss`), in nats, when some heads are replaced."""
    model.eval()
    baseline = loss.value(model)
    with replaced_heads(model, heads, replacement, means):
        changed = loss.value(model)
    return {"before": baseline, "after": changed, "increase": changed - baseline}


def output_projections(model, batch: dict) -> dict[str, tuple[nn.Module, int]]:
    """Return {module: (the layer that reads the heads' concatenated outputs, head size d_v)}, by running the model.

    Raises `ValueError` for a module whose outputs go through another operation first.
    """
    model.eval()
    waiting: dict[str, Tensor] = {}
    projections: dict[str, tuple[nn.Module, int]] = {}

    def note(call):
        waiting[call.name] = call.output.transpose(1, 2).flatten(2)
        sizes[call.name] = call.output.shape[-1]

    def look(module, arguments):
        for name, output in list(waiting.items()):
            received = arguments[0]
            if received.numel() == output.numel() and torch.equal(received.reshape(output.shape), output):
                projections[name] = module, sizes[name]
                del waiting[name]

    sizes: dict[str, int] = {}
    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    try:
        with torch.no_grad(), watched(model, note):
            forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not sizes:
        raise no_weights(model, "has attention modules, but none went through the attention interface")
    if waiting:
        raise ValueError(
            f"{type(model).__name__}: the outputs of {next(iter(waiting))!r} do not go straight into a linear layer, "
            "so its heads cannot be pruned"
        )
    return projections


def probe_batch(model) -> dict:
    """Return a small input that makes the activations of every layer nonzero: eight tokens, or one image.

    Raises `ValueError` for a model of other inputs.
    """
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", None)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        if not height:
            raise ValueError(f"{type(model).__name__} does not say the size of its images; give a batch")
        pixels = torch.linspace(-1, 1, model.config.num_channels * height * width, device=model.device)
        return {"pixel_values": pixels.sin().view(1, -1, height, width).to(model.dtype)}
    if model.main_input_name != "input_ids":
        raise ValueError(f"{type(model).__name__} reads {model.main_input_name}, not tokens or images; give a batch")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 9, device=model.device)[None] % vocabulary
    batch = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    return batch


@torch.no_grad()
def prune_heads(model, heads: Mapping, batch: dict | None = None):
    """Return a copy of the model without some heads; `model` is not changed.

    The columns of the output projection that read these heads are set to zero: the same function as removing them, in
    every architecture, with unchanged shapes, so that the copy saves, loads and generates like any other checkpoint
    (removing them physically would need each architecture's config to hold the number of heads of each layer;
    `pruning.remove_heads` does where all layers lose as many). It does not save time. config.pruned_attention_heads
    records the pruned heads. batch: an input to find the projections with; None: that of `probe_batch`.

    Raises `ValueError` for a head that does not exist, and a module whose outputs do not go straight into a linear
    layer.
    """
    heads_by_module = resolve_heads(model, heads)
    pruned = copy.deepcopy(model).eval()
    projections = output_projections(pruned, batch or probe_batch(pruned))
    if missing := [name for name in heads_by_module if name not in projections]:
        raise ValueError(f"{missing[0]!r} did not run on this input; give a batch on which it does")
    for name, numbers in heads_by_module.items():
        layer, size = projections[name]
        columns = torch.cat([torch.arange(head * size, (head + 1) * size) for head in numbers]).to(layer.weight.device)
        if isinstance(layer, Conv1D):
            layer.weight[columns] = 0.0
        else:
            layer.weight[:, columns] = 0.0
    pruned_heads = {name: list(numbers) for name, numbers in (getattr(pruned.config, PRUNED, None) or {}).items()}
    for name, numbers in heads_by_module.items():
        pruned_heads[name] = sorted({*pruned_heads.get(name, []), *numbers})
    setattr(pruned.config, PRUNED, pruned_heads)
    return pruned
