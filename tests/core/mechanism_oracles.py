"""Every attention mechanism as its paper states it, in loops over single queries and keys; and the table of cases."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from distattn_hf.core.mechanisms import MECHANISMS, Mechanism


@dataclass(frozen=True)
class MechanismCase:
    """A registered mechanism with options so small that short sequences show every part of its pattern."""

    name: str
    options: dict = field(default_factory=dict)
    max_length: int | None = None

    def make(self, num_heads: int = 2, head_dim: int = 4) -> Mechanism:
        """The mechanism in float64, with parameters large enough to be seen."""
        module = MECHANISMS.get(self.name)(num_heads, head_dim, max_length=self.max_length, **self.options).double()
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
        return module

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{name}{value}" for name, value in self.options.items())])


MECHANISM_CASES = [
    MechanismCase("local", {"window_size": 3}),
    MechanismCase("local", {"window_size": 1}),
    MechanismCase("local", {"window_size": 3, "dilation": 2}),
    MechanismCase("local", {"window_size": 2, "dilation": 20}),
    MechanismCase("local", {"window_size": 30, "dilation": 1}),
    MechanismCase("strided", {"window_size": 2, "stride": 3, "num_strides": 2}),
    MechanismCase("strided", {"window_size": 5, "stride": 2, "num_strides": 4}),
    MechanismCase("bigbird", {"block_size": 2, "num_random_blocks": 2}),
    MechanismCase("bigbird", {"block_size": 3, "window_blocks": 0, "num_global_blocks": 0}),
    MechanismCase("bigbird", {"block_size": 2, "num_random_blocks": 0, "num_global_blocks": 2}),
    MechanismCase("landmark", {"block_size": 2, "num_blocks": 2, "num_candidates": 4}),
    MechanismCase("landmark", {"block_size": 3, "num_blocks": 1, "num_candidates": 30}),
    MechanismCase("relative", {"max_distance": 2}),
    MechanismCase("relative", {"max_distance": 30}),
    MechanismCase("linear"),
    MechanismCase("performer", {"num_features": 6}),
    MechanismCase("linformer", {"rank": 3}, max_length=20),
]

FORMS = ("causal", "bidirectional", "cross")


def forms(name: str) -> list[str]:
    """The forms that a mechanism says it has."""
    return [form for form in FORMS if getattr(MECHANISMS.get(name), form)]


def naive_attention(module, query, key, value, keep=None, form="bidirectional", scaling=None, bias=None):
    """(output (B, H, N, d_v), weights (B, H, N, M)) of one mechanism, one query after another."""
    batch, heads, num_queries, size = query.shape
    num_keys = key.shape[2]
    keep = torch.ones(batch, num_keys, dtype=torch.bool) if keep is None else keep
    before = num_keys - num_queries if form == "causal" else 0
    rows, outputs = [], []
    for b in range(batch):
        for h in range(heads):
            for n in range(num_queries):
                place = n + before
                open_keys = [j for j in range(num_keys) if keep[b, j] and (form != "causal" or j <= place)]
                row = _Row(module, query[b, h, n], key[b, h], value[b, h], place, b, h, n, keep[b], open_keys, scaling)
                row.bias = torch.zeros(num_keys).to(query) if bias is None else bias[b if len(bias) > 1 else 0, h, n]
                row.is_causal = form == "causal"
                weights, output = _RULES[module.name](row)
                rows.append(weights)
                outputs.append(output)
    shape = (batch, heads, num_queries, -1)
    return torch.stack(outputs).view(*shape), torch.stack(rows).view(*shape)


class _Row:
    """One query: its vector, the keys and values of its head, where it stands, and the keys it is allowed to see."""

    def __init__(self, module, query, keys, values, place, item, head, number, keep, open_keys, scaling):
        self.module, self.query, self.keys, self.values, self.place = module, query, keys, values, place
        self.item, self.head, self.number, self.keep, self.open_keys = item, head, number, keep, open_keys
        self.given_scaling, self.scaling = scaling, scaling or 1 / math.sqrt(len(query))

    def softmax(self, chosen: list[int], extra=None) -> tuple[Tensor, Tensor]:
        """Softmax over some keys; `extra(j)`: what is added to the key."""
        logits = []
        for j in chosen:
            key = self.keys[j] if extra is None else self.keys[j] + extra(j)
            logits.append(self.scaling * (self.query * key).sum() + self.bias[j])
        return self.proportional(chosen, [(logit - max(logits).detach()).exp() for logit in logits])

    def proportional(self, chosen: list[int], amounts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(weights, output) where key chosen[i] has amount i."""
        weights = [torch.zeros((), dtype=self.query.dtype)] * len(self.keys)
        for j, amount in zip(chosen, amounts):
            weights[j] = amount / sum(amounts)
        return torch.stack(weights), sum(
            (w * v for w, v in zip(weights, self.values)), torch.zeros_like(self.values[0])
        )


def _local(row):
    m = row.module
    return row.softmax(
        [j for j in row.open_keys if any(abs(row.place - j) == t * m.dilation for t in range(m.window_size))]
    )


def _strided(row):
    m = row.module
    columns = [t * m.stride for t in range(1, m.num_strides + 1)]
    apart = {j: abs(row.place - j) for j in row.open_keys}
    return row.softmax([j for j in row.open_keys if apart[j] < m.window_size or apart[j] in columns])


def random_blocks(seed: int, head: int, block: int, draws: int, num_blocks: int) -> list[int]:
    """BigBird's hash in Python's unbounded integers."""
    found = []
    for draw in range(draws):
        mixed = (head * 0x85EBCA77 + block * 0x9E3779B1 + draw * 0xC2B2AE3D + seed * 0x27D4EB2F) % 2**32
        mixed = ((mixed ^ (mixed >> 16)) * 0x7FEB352D) % 2**32
        mixed = ((mixed ^ (mixed >> 15)) * 0x846CA68B) % 2**32
        found.append((mixed ^ (mixed >> 16)) * num_blocks >> 32)
    return found


def _bigbird(row):
    m = row.module
    real = [j for j in range(len(row.keep)) if row.keep[j]]
    first = min(real, default=0) if row.is_causal else 0
    mine = (row.place - first) // m.block_size
    num_blocks = mine if row.is_causal else max(real, default=0) // m.block_size + 1
    random = random_blocks(m.seed, row.head, mine, m.num_random_blocks, num_blocks)
    chosen = []
    for j in row.open_keys:
        block = (j - first) // m.block_size
        near, is_global = abs(block - mine) <= m.window_blocks, min(block, mine) < m.num_global_blocks
        if near or is_global or block in random:
            chosen.append(j)
    return row.softmax(chosen)


def _landmark(row):
    m = row.module
    # Blocks are counted from the first real key.
    first = next((j for j in range(len(row.keys)) if row.keep[j]), 0)
    size, mine, scores = m.block_size, (row.place - first) // m.block_size, {}
    for block in range(-(-(len(row.keys) - first) // size)):
        start = first + block * size
        real = [j for j in range(start, min(start + size, len(row.keys))) if row.keep[j]]
        apart = mine - block
        reach = m.num_candidates if row.is_causal else m.num_candidates // 2
        if real and apart != 0 and abs(apart) <= reach and (apart > 0 or not row.is_causal):
            scores[block] = (sum(row.keys[j] for j in real) / len(real) @ row.query).item()
    best = sorted(scores, key=scores.get, reverse=True)[: m.num_blocks]
    return row.softmax([j for j in row.open_keys if (j - first) // size in [*best, mine]])


def _relative(row):
    m = row.module

    def entry(j):
        return max(-m.max_distance, min(m.max_distance, j - row.place)) + m.max_distance

    weights, output = row.softmax(row.open_keys, extra=lambda j: m.key_embedding[entry(j)])
    return weights, output + sum((weights[j] * m.value_embedding[entry(j)] for j in row.open_keys), 0 * output)


def _linear(row):
    query = F.elu(row.query * (row.given_scaling or 1)) + 1
    return row.proportional(row.open_keys, [(query * (F.elu(row.keys[j]) + 1)).sum() for j in row.open_keys])


def _performer(row):
    def features(x):
        x = x * row.scaling**0.5
        return (row.module.projection @ x - (x * x).sum() / 2).exp()

    return row.proportional(row.open_keys, [features(row.query) @ features(row.keys[j]) for j in row.open_keys])


def _linformer(row):
    m = row.module
    projected = [
        sum((m.key_projection[r, j] * row.keys[j] for j in row.open_keys), 0 * row.query) for r in range(m.rank)
    ]
    shares = torch.stack([row.scaling * (row.query * key).sum() for key in projected]).softmax(0)
    weights = [torch.zeros((), dtype=row.query.dtype)] * len(row.keys)
    for j in row.open_keys:
        weights[j] = shares @ m.value_projection[:, j]
    return torch.stack(weights), sum((w * v for w, v in zip(weights, row.values)), torch.zeros_like(row.values[0]))


_RULES = {
    "local": _local,
    "strided": _strided,
    "bigbird": _bigbird,
    "landmark": _landmark,
    "relative": _relative,
    "linear": _linear,
    "performer": _performer,
    "linformer": _linformer,
}
