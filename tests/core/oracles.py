"""Distances and attention in plain Python floats, written from the definitions and sharing no code with core."""

import math

import torch
from torch import Tensor


def _dot(query, key):
    return math.fsum(a * b for a, b in zip(query, key, strict=True))


def _lifted(query, key, keys, p):
    """The lift written out: one more coordinate, 0 for the query and √(R²-‖k‖²) for the key."""
    radius = max(math.fsum(x * x for x in other) for other in keys)
    height = math.sqrt(max(0.0, radius - math.fsum(x * x for x in key)))
    return math.dist([*query, 0.0], [*key, height]) ** 2


# name -> distance(query, key, all keys of the head, p), on lists of floats.
ORACLES = {
    "sqeuclidean": lambda q, k, keys, p: math.fsum((a - b) ** 2 for a, b in zip(q, k, strict=True)),
    "l2": lambda q, k, keys, p: math.dist(q, k),
    "l1": lambda q, k, keys, p: math.fsum(abs(a - b) for a, b in zip(q, k, strict=True)),
    "lp": lambda q, k, keys, p: math.fsum(abs(a - b) ** p for a, b in zip(q, k, strict=True)) ** (1 / p),
    "chebyshev": lambda q, k, keys, p: max(abs(a - b) for a, b in zip(q, k, strict=True)),
    "cosine": lambda q, k, keys, p: 1 - _dot(q, k) / math.hypot(*q) / math.hypot(*k),
    "lifted_sqeuclidean": _lifted,
    "dot": lambda q, k, keys, p: -_dot(q, k),
}

# name -> (query, keys, p, distances), worked out on paper.
HAND_COMPUTED = {
    "sqeuclidean": ([1.0, 2.0], [[4.0, 6.0], [1.0, 2.0]], None, [25.0, 0.0]),
    "l2": ([1.0, 2.0], [[4.0, 6.0], [1.0, 3.0]], None, [5.0, 1.0]),
    "l1": ([1.0, 2.0], [[4.0, -6.0], [1.0, 2.0]], None, [11.0, 0.0]),
    "lp": ([0.0, 0.0, 0.0], [[3.0, -4.0, 5.0], [0.0, 0.0, 0.0]], 3.0, [6.0, 0.0]),
    "chebyshev": ([1.0, 2.0], [[4.0, -6.0], [1.0, 2.0]], None, [8.0, 0.0]),
    "cosine": ([2.0, 0.0], [[3.0, 4.0], [-5.0, 0.0]], None, [0.4, 2.0]),
    # ‖q‖² + R² - 2q·k = 1 + 25 - 2q·k.
    "lifted_sqeuclidean": ([1.0, 0.0], [[3.0, 4.0], [0.0, 1.0]], None, [20.0, 26.0]),
    "dot": ([1.0, 2.0], [[3.0, 4.0], [-1.0, 0.0]], None, [-11.0, 1.0]),
}


def _huber(x: float, knee: float) -> float:
    return x * x / (2 * knee) if abs(x) < knee else abs(x) - knee / 2


def _soft_norm(x, epsilon: float) -> float:
    return math.sqrt(math.fsum(a * a for a in x) + epsilon * epsilon)


def _soft_power(q, k, epsilon: float, p: float) -> float:
    knee = epsilon / len(q) ** (1 / p)
    return math.fsum(((a - b) ** 2 + knee**2) ** (p / 2) for a, b in zip(q, k, strict=True)) ** (1 / p) - epsilon


def _soft_maximum(q, k, epsilon: float) -> float:
    return epsilon * math.log(math.fsum(math.cosh((a - b) / epsilon) for a, b in zip(q, k, strict=True)) / len(q))


# name -> softened distance(query, key, ε, p): the formulas of softening.py.
SOFT_ORACLES = {
    "l2": lambda q, k, e, p: math.hypot(math.dist(q, k), e) - e,
    "l1": lambda q, k, e, p: math.fsum(_huber(a - b, e / len(q)) for a, b in zip(q, k, strict=True)),
    "lp": lambda q, k, e, p: _soft_power(q, k, e, p),
    "chebyshev": lambda q, k, e, p: _soft_maximum(q, k, e),
    "cosine": lambda q, k, e, p: 1 - _dot(q, k) / _soft_norm(q, e) / _soft_norm(k, e),
}


def _oracle(metric: str, softening: float):
    if not softening:
        return ORACLES[metric]
    return lambda q, k, keys, p: SOFT_ORACLES[metric](q, k, softening, p)


def loop_distances(metric: str, query: Tensor, key: Tensor, p: float | None, softening: float = 0.0) -> Tensor:
    """Distances (B, H, N, M) in float64, one pair at a time."""
    distance = _oracle(metric, softening)
    rows = [
        [[distance(q, k, keys, p) for k in keys] for q in queries]
        for queries, keys in zip(query.flatten(0, 1).tolist(), key.flatten(0, 1).tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64).view(*query.shape[:-1], key.shape[-2])


def loop_attention(
    metric, p, query, key, value, *, lam, scaling, keep=None, bias=None, is_causal=False, softening=0.0
) -> Tensor:
    """softmax(-λ_h·scaling·distance + bias)·value in float64, one entry at a time.

    lam: one λ per head. keep, bias: None or (B, H, N, M). Key and value may have fewer heads than the query.
    """
    distance = _oracle(metric, softening)
    batch, heads, num_queries, _ = query.shape
    group = heads // key.shape[1]
    output = torch.zeros(batch, heads, num_queries, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            keys, values = key[b, h // group].tolist(), value[b, h // group].tolist()
            for i, q in enumerate(query[b, h].tolist()):
                seen = [
                    j
                    for j in range(len(keys))
                    if (keep is None or bool(keep[b, h, i, j])) and (not is_causal or j <= i)
                ]
                logits = [
                    -lam[h] * scaling * distance(q, keys[j], keys, p)
                    + (0.0 if bias is None else float(bias[b, h, i, j]))
                    for j in seen
                ]
                # The maximum goes first, as exp overflows otherwise.
                exponentials = [math.exp(logit - max(logits)) for logit in logits]
                for j, exponential in zip(seen, exponentials, strict=True):
                    for c, x in enumerate(values[j]):
                        output[b, h, i, c] += exponential / math.fsum(exponentials) * x
    return output
