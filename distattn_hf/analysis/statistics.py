"""Statistics of every head's attention over a data set, accumulated block by block without storing maps."""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field, fields

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..functional.row_statistics import COLLAPSED_ENTROPY, COLLAPSED_WEIGHT, ROW_NUMBERS, row_statistics
from .head_patterns import PATTERNS, Places, dominant_pattern, pattern_masses, pattern_strength
from .samples import SeparatorFinder, key_ids, padding_of
from .watch import run_watched
from .weights import StoredCall


@dataclass
class HeadStatistics:
    """One head of one module; means over its rows: the queries that are not padding and see two keys or more.

    entropy (nats), sparsity (Hoyer), maximum and distance (tokens): see `core.statistics.RowStatistics`.
    diversity: mean divergence KL(head's row ‖ mean row of the module's heads) in nats, from 0 (all alike) to ln H.
    pattern, strength: the strongest of `patterns`, see head_patterns.py. collapsed: mean entropy < 0.1 or mean maximum
    > 0.95; collapsed_rows: the share of single rows. key_norm_share: Σ_i Var_j(t_ij) / Σ_i Var_j(logit_ij) over the
    kept keys j, with t_ij the term in ‖k_j‖² (`maps._key_norms`); above 1 where the dot product works against the norm;
    None where the logits have none. Rows without a counted one: all zero.
    """

    module: str
    layer: int | None
    kind: str
    head: int
    rows: int = 0
    entropy: float = 0.0
    sparsity: float = 0.0
    maximum: float = 0.0
    distance: float = 0.0
    diversity: float = 0.0
    pattern: str = "mixed"
    strength: float = 0.0
    patterns: dict[str, float] = field(default_factory=dict)
    collapsed: bool = False
    collapsed_rows: float = 0.0
    key_norm_share: float | None = None


@dataclass
class AttentionStatistics:
    """Statistics of all heads of a model over `num_texts` texts of `num_tokens` tokens, without padding."""

    model: str
    num_texts: int = 0
    num_tokens: int = 0
    heads: list[HeadStatistics] = field(default_factory=list)
    version: int = 1

    @property
    def modules(self) -> list[str]:
        """The modules' names, in the order in which they run."""
        return list(dict.fromkeys(head.module for head in self.heads))

    def of(self, module: str) -> list[HeadStatistics]:
        """Return the heads of a module; raises `ValueError` for an unknown one."""
        if heads := [head for head in self.heads if head.module == module]:
            return heads
        raise ValueError(f"module must be one of {', '.join(self.modules)}, got {module!r}")

    def grid(self, name: str) -> list[list[float]]:
        """Return field `name` of each head, a row per module; None and padding are NaN. Raises `ValueError`."""
        numbers = [f.name for f in fields(HeadStatistics) if f.name not in ("module", "kind", "pattern", "patterns")]
        if name not in numbers:
            raise ValueError(f"name must be one of {', '.join(numbers)}, got {name!r}")
        rows = [[getattr(head, name) for head in self.of(module)] for module in self.modules]
        width = max(map(len, rows), default=0)
        rows = [[math.nan if value is None else float(value) for value in row] for row in rows]
        return [row + [math.nan] * (width - len(row)) for row in rows]

    def pattern_counts(self) -> dict[str, int]:
        """Return how many heads have each pattern, most frequent first."""
        return dict(Counter(head.pattern for head in self.heads).most_common())

    def to_dict(self) -> dict:
        """Return a JSON-serialisable dict; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "AttentionStatistics":
        """Restore the statistics from `to_dict`; raises `ValueError` for another version."""
        if data.get("version") != 1:
            raise ValueError(f"statistics version must be 1, got {data.get('version')!r}")
        return cls(**{**data, "heads": [HeadStatistics(**head) for head in data["heads"]]})

    def to_frame(self):
        """Return a pandas DataFrame with one row per head; each pattern's strength has its own column."""
        import pandas

        rows = [{k: v for k, v in asdict(head).items() if k != "patterns"} for head in self.heads]
        for row, head in zip(rows, self.heads):
            row |= {f"strength of {name}": value for name, value in head.patterns.items()}
        return pandas.DataFrame(rows)


class _Sums:
    """Running sums of one module, each (H,) in float64."""

    def __init__(self, call):
        self.layer, self.kind = call.layer, call.kind
        self.values: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor, counted: Tensor) -> None:
        """Add the entries of (B, H, n) where `counted` (B, 1 or H, n) is True."""
        total = torch.where(counted, tensor, 0.0).double().sum((0, 2)).cpu()
        self.values[name] = self.values[name] + total if name in self.values else total

    def mean(self, name: str, head: int, count: str = "rows") -> float:
        """Return the mean over the number in `count`; 0 if that is 0."""
        denominator = float(self.values[count][head])
        return float(self.values[name][head]) / denominator if denominator else 0.0


class StatisticsCollector:
    """Accumulates the statistics of attention calls (`measure` runs a model for it)."""

    def __init__(self, model=None, tokenizer=None):
        self.model = model
        self.separators = None if tokenizer is None else SeparatorFinder(tokenizer)
        self.sums: dict[str, _Sums] = {}

    def add(self, call, batch: dict) -> None:
        """Add one attention call of a batch."""
        ids = key_ids(self.model, call, batch)
        separators = None if self.separators is None or ids is None else self.separators(ids)
        self.add_call(call, *padding_of(self.model, call, batch), separators)

    def add_call(self, call, query_keep: Tensor, key_keep: Tensor, separators: Tensor | None) -> None:
        """Add one attention call: which queries (B, N) and keys (B, M) are no padding, which keys are separators."""
        places = Places.of(key_keep, separators)
        sums = self.sums.setdefault(call.name, _Sums(call))
        for rows in call.blocks():
            stop = rows.start + rows.weights.shape[2]
            positions = torch.arange(rows.start, stop, device=rows.weights.device)
            keep = rows.keep & key_keep[:, None, None, :]
            row_values = row_statistics(rows.weights, keep, positions)
            counted = row_values.counted(query_keep[:, None, rows.start : stop])
            ones = torch.ones_like(row_values.entropy)
            sums.add("rows", ones, counted)
            for name in ROW_NUMBERS:
                sums.add(name, getattr(row_values, name), counted)
            sums.add("collapsed_rows", row_values.collapsed.to(ones.dtype), counted)
            sums.add("diversity", _apart_from_mean(rows.weights, row_values.entropy), counted)
            self._add_patterns(sums, rows, keep, places, row_values, counted)
            if rows.key_norms is not None:
                sums.add("key_norm_variance", _variance(rows.key_norms, keep), counted)
                sums.add("logit_variance", _variance(rows.logits, keep), counted)

    def _add_patterns(self, sums, rows, keep, places, found, counted) -> None:
        is_self = sums.kind == "self"
        masses, far_enough = pattern_masses(rows.weights, keep, rows.start, places, is_self)
        counted = counted & far_enough
        sums.add("pattern_rows", torch.ones_like(found.entropy), counted)
        for name, (mass, chance) in masses.items():
            sums.add(name, mass, counted)
            sums.add(f"{name} by chance", chance, counted)
        sums.add("uniform", found.entropy.exp() / found.num_keys.clamp_min(1), counted)

    def result(self, num_texts: int, num_tokens: int) -> AttentionStatistics:
        """Return the statistics so far."""
        name = "weights" if self.model is None else self.model.config.name_or_path or type(self.model).__name__
        heads = [
            _head(module, sums, head) for module, sums in self.sums.items() for head in range(len(sums.values["rows"]))
        ]
        return AttentionStatistics(name, num_texts, num_tokens, heads)


def _head(module: str, sums: _Sums, head: int) -> HeadStatistics:
    numbers = {name: sums.mean(name, head) for name in (*ROW_NUMBERS, "collapsed_rows", "diversity")}
    strengths = {}
    for pattern in PATTERNS:
        if pattern in sums.values:
            strength = sums.mean(pattern, head, "pattern_rows")
            if pattern != "uniform":
                strength = pattern_strength(strength, sums.mean(f"{pattern} by chance", head, "pattern_rows"))
            strengths[pattern] = strength
    pattern, strength = dominant_pattern(strengths)
    rows = int(sums.values["rows"][head])
    narrow = numbers["entropy"] < COLLAPSED_ENTROPY or numbers["maximum"] > COLLAPSED_WEIGHT
    share = None
    if "logit_variance" in sums.values:
        share = float(sums.values["key_norm_variance"][head]) / (float(sums.values["logit_variance"][head]) or 1.0)
        share = None if math.isnan(share) else share
    return HeadStatistics(
        module, sums.layer, sums.kind, head, rows, **numbers, pattern=pattern, strength=strength, patterns=strengths,
        collapsed=rows > 0 and narrow, key_norm_share=share,
    )  # fmt: skip


def _apart_from_mean(weights: Tensor, entropy: Tensor) -> Tensor:
    """Return KL(row ‖ mean row), (B, H, n): its mean over heads is the Jensen-Shannon divergence (Lin, 1991)."""
    mean = weights.mean(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return -entropy - (weights * mean.log()).sum(-1)


def _variance(values: Tensor, keep: Tensor) -> Tensor:
    """Return the variance along the last axis over the kept entries, (B, H, n)."""
    count = keep.sum(-1, keepdim=True).clamp_min(1)
    mean = values.masked_fill(~keep, 0.0).sum(-1, keepdim=True) / count
    return ((values - mean).masked_fill(~keep, 0.0).square().sum(-1, keepdim=True) / count)[..., 0]


def measure(model, batches: list[dict], tokenizer=None, *, progress: bool = False) -> AttentionStatistics:
    """Measure statistics of every head of `model` over tokenised batches.

    tokenizer: identifies separators, without which the patterns "separator" and "block" are left out.
    Raises `ValueError` for a model without attention weights, or no batch.
    """
    if not batches:
        raise ValueError("batches is empty: give some text")
    collector = StatisticsCollector(model, tokenizer)
    texts = tokens = 0
    for batch in tqdm(batches, desc="attention statistics", disable=not progress, leave=False):
        run_watched(model, batch, lambda call, batch=batch: collector.add(call, batch))
        # Models of tokens take their embeddings, too.
        ids = batch[model.main_input_name if model.main_input_name in batch else "inputs_embeds"]
        mask = batch.get("attention_mask")
        texts += len(ids)
        tokens += ids.shape[0] * ids.shape[1] if mask is None or mask.dim() != 2 else int(mask.sum())
    return collector.result(texts, tokens)


def analyse_weights(weights, mask: Tensor | None = None, tokens: list[str] | None = None) -> AttentionStatistics:
    """Measure the statistics of raw attention weights, wherever they come from (modules "0", "1", ... by layer).

    Args:
        weights: (B, H, N, M), or one such tensor per layer, as `output_attentions` gives. A weight of exactly 0 counts
            as a masked key; N = M is taken for self-attention.
        mask: (B, M), true or 1 for keys that are no padding; in self-attention for queries, too. None: all.
        tokens: the M keys' texts, of which those without a letter or digit are separators (in every row); None: the
            patterns "separator" and "block" are left out.

    Raises:
        ValueError: for anything but floating-point weights >= 0 of four dimensions, or a mask or tokens of other sizes.
    """
    layers = [weights] if isinstance(weights, Tensor) else list(weights)
    if not layers:
        raise ValueError("weights is empty: give (B, H, N, M), or one such tensor per layer")
    collector = StatisticsCollector()
    for number, layer in enumerate(layers):
        if not isinstance(layer, Tensor) or layer.dim() != 4 or not layer.is_floating_point():
            shape = tuple(layer.shape) if isinstance(layer, Tensor) else type(layer).__name__
            raise ValueError(f"weights must be floating-point (B, H, N, M), got {shape}")
        if bool((layer < 0).any()) or not bool(layer.isfinite().all()):
            raise ValueError(f"weights must be finite and not negative, got {float(layer.min())} in layer {number}")
        batch, _, num_queries, num_keys = layer.shape
        keys = torch.ones(batch, num_keys, dtype=torch.bool, device=layer.device)
        if mask is not None:
            if mask.shape != keys.shape:
                raise ValueError(f"mask must have shape (B, M)={tuple(keys.shape)}, got {tuple(mask.shape)}")
            keys = mask.to(layer.device).bool()
        separators = None
        if tokens is not None:
            if len(tokens) != num_keys:
                raise ValueError(f"tokens must have one text for each of {num_keys} keys, got {len(tokens)}")
            flags = [not any(character.isalnum() for character in token) for token in tokens]
            separators = torch.tensor(flags, device=layer.device).expand(batch, -1)
        is_self = num_queries == num_keys
        queries = keys if is_self else keys.new_ones(batch, num_queries)
        call = StoredCall(str(number), number, "self" if is_self else "cross", layer.detach(), keys[:, None, None])
        collector.add_call(call, queries, keys, separators)
    return collector.result(len(layers[0]), int(keys.sum()))
