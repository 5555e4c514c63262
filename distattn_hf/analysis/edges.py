"""Attribute a loss to single attention weights: which query reads what of which key, in which head."""

import heapq
from dataclasses import dataclass

import torch

from ..data.config import is_integer
from .watch import no_weights, watched


@dataclass(frozen=True)
class Edge:
    """One weight of one head: `value` = weight·∂loss/∂weight, in nats; negative where the weight lowers the loss.

    text: the number of the text, in the order in which the module read them. query, key: positions in its row.
    """

    module: str
    layer: int | None
    head: int
    text: int
    query: int
    key: int
    weight: float
    value: float


def edge_attribution(model, loss, *, top: int = 100) -> list[Edge]:
    """Return the `top` edges with the largest |weight·∂loss/∂weight|, the largest first, without changing gradients.

    With the output Σ_j w_ij·v_j the derivative is ∂loss/∂w_ij = (∂loss/∂output_i)·v_j: one forward and backward pass,
    and no map of a module is kept. All else is held still: other weights of the row do not give way (Hao et al.,
    Self-attention attribution, 2021, with one step).

    Args:
        loss: a `samples.TextLoss` or `samples.LabelLoss`.
        top: how many edges.

    Raises:
        ValueError: for a model without attention weights, or whose outputs are no weighted sums of values (the native
            mechanism 'relative'), and a `top` below 1.
    """
    if not is_integer(top, 1):
        raise ValueError(f"top must be an integer >= 1, got {top!r}")
    model.eval()
    calls, texts_read, best = [], {}, []

    def add(call):
        change = torch.zeros_like(call.output, requires_grad=True)
        calls.append((call, change))
        return call.output + change

    with torch.enable_grad(), watched(model, add):
        for value, share in loss(model):
            if not calls:
                raise no_weights(model, "has attention modules, but none went through the attention interface")
            gradients = torch.autograd.grad(value * share, [change for _, change in calls], allow_unused=True)
            for (call, _), gradient in zip(calls, gradients, strict=True):
                first = texts_read.get(call.name, 0)
                texts_read[call.name] = first + call.shape[0]
                if gradient is not None:
                    best = heapq.nlargest(top, [*best, *_largest(call, gradient, first, top)], key=_size)
            calls.clear()
    return best


def _size(edge: Edge) -> float:
    return abs(edge.value)


@torch.no_grad()
def _largest(call, gradient, first: int, top: int) -> list[Edge]:
    """Return the largest edges of one call; gradient (B, H, N, d_v): ∂loss/∂output."""
    edges = []
    call.check_sums()
    for rows in call.blocks():
        stop = rows.start + rows.weights.shape[2]
        values = rows.weights * (gradient[:, :, rows.start : stop].to(rows.weights) @ call.value.to(rows.weights).mT)
        largest = values.abs().flatten().topk(min(top, values.numel())).indices
        places = torch.stack(torch.unravel_index(largest, values.shape), dim=1)
        for index, (text, head, query, key) in zip(largest.tolist(), places.tolist(), strict=True):
            weight, value = float(rows.weights.flatten()[index]), float(values.flatten()[index])
            edges.append(Edge(call.name, call.layer, head, first + text, rows.start + query, key, weight, value))
    return edges
