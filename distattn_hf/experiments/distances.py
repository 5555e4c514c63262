"""How well distance matrices can be approximated from few of their entries (phase 1 of the research plan).

Every method of `functional.distance_approximation` on made and on real points: N(0, I), clusters, and the queries and
keys that enter SmolLM2's and MiniLM's attention, against the rank k and the number of points n. Two claims are tested:
k = √n gives a relative Frobenius error below 10%, and the error falls as a power of k. Beside them stands "constant",
the error of putting the mean distance everywhere: distances of many dimensions hardly differ, so a small Frobenius
error alone says little, and Spearman's correlation, which sees their order, says more.
"""

import math
import time
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, stdev

import torch
from torch import Tensor

from ..analysis.figure_style import COLOURS, new_figure, save_figure, styled
from ..analysis.watch import capture
from ..core.discovery import find_attention_modules, locate
from ..data.packing import token_stream
from ..data.sources import read_texts
from ..functional.distance_approximation import (
    METHODS,
    METRICS,
    DistanceMatrix,
    LowRank,
    approximate_distances,
    relative_error,
    truncated_svd,
)
from ..functional.landmarks import STRATEGIES
from ..storage.models import load_checkpoint

# Source of points -> (checkpoint, whether before the rotary embedding).
CHECKPOINTS = {
    "smollm2": ("smollm2-135m", False),
    "smollm2_before_rotary": ("smollm2-135m", True),
    "minilm": ("minilm", False),
}
SOURCES = ("gaussian", "clusters", *CHECKPOINTS)
LANDMARK_METHODS = ("nystrom", "cur")
MINILM_POSITIONS = 512
# Pairs of entries that the rank correlation is taken over, at most.
_MOST_PAIRS = 100_000
AXES = ("points", "sizes", "metrics", "methods", "strategies")


@dataclass(frozen=True)
class Options:
    """points: of gaussian, clusters, smollm2, smollm2_before_rotary, minilm. sizes: n (and m); those above MiniLM's 512
    positions are left out there.

    ranks: k, to which ⌊√n⌋ is added; those above n are left out. metrics: l2, sqeuclidean, l1. methods: indyk, nystrom,
    cur, jl, svd. strategies: of landmarks, for nystrom and cur; none named: all. seeds: how many; of real points each
    seed draws a layer and head. dimensions: d of the made points. num_clusters: centres from 4·N(0, I), points N(0, I)
    about them. oversampling: of indyk.
    """

    points: tuple[str, ...] = SOURCES
    sizes: tuple[int, ...] = (256, 1024)
    ranks: tuple[int, ...] = (8, 16, 32, 64, 128)
    metrics: tuple[str, ...] = METRICS
    methods: tuple[str, ...] = METHODS
    strategies: tuple[str, ...] = ()
    seeds: int = 3
    dimensions: int = 64
    num_clusters: int = 48
    oversampling: float = 4.0

    def __post_init__(self):
        for name, allowed in (
            ("points", SOURCES), ("metrics", METRICS), ("methods", METHODS), ("strategies", sorted(STRATEGIES))
        ):  # fmt: skip
            for value in getattr(self, name):
                if value not in allowed:
                    raise ValueError(f"{name} must be among {', '.join(allowed)}, got {value!r}")
        for name in ("sizes", "ranks"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be integers >= 1, at least one, got {getattr(self, name)!r}")
        for name in ("seeds", "dimensions", "num_clusters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)!r}")


QUICK = {
    "points": ("gaussian", "clusters"),
    "sizes": (36,),
    "ranks": (4, 8, 16),
    "strategies": ("uniform", "kmeans"),
    "seeds": 2,
    "dimensions": 4,
    "num_clusters": 6,
}


def run(options: Options, results) -> None:
    """Measure a row for each kind of points, size, metric, method and strategy: all ranks, over all seeds."""
    for source in options.points:
        for size in options.sizes:
            if source == "minilm" and size > MINILM_POSITIONS:
                continue
            for metric in options.metrics:
                for method in options.methods:
                    strategies = (options.strategies or sorted(STRATEGIES)) if method in LANDMARK_METHODS else (None,)
                    for strategy in strategies:
                        key = {"points": source, "n": size, "metric": metric, "method": method, "strategy": strategy}
                        results.row(key, lambda k=key: _measure(options, **k))


def _measure(options: Options, points: str, n: int, metric: str, method: str, strategy: str | None) -> dict:
    """Return every number by rank, its mean over seeds, the spread of the errors, and what the two claims ask."""
    root = math.isqrt(n)
    ranks = sorted({k for k in (*options.ranks, root) if k <= n})
    runs = [_one_seed(options, points, n, metric, method, strategy, ranks, seed) for seed in range(options.seeds)]
    values = {name: [[run[k][name] for run in runs] for k in ranks] for name in runs[0][ranks[0]]}
    means = {name: [_rounded(fmean(at_rank)) for at_rank in by_rank] for name, by_rank in values.items()}
    errors = means["relative_error"]
    return {
        "ranks": ranks,
        **means,
        "error_deviation": [_rounded(stdev(r)) if len(r) > 1 else None for r in values["relative_error"]],
        "constant": means["constant"][0],
        "error_at_root_n": errors[ranks.index(root)],
        "below_10_percent_at_root_n": errors[ranks.index(root)] < 0.1,
        **power_law(ranks, errors),
    }


def _one_seed(options, points, n, metric, method, strategy, ranks, seed) -> dict[int, dict]:
    x, y = draw_points(points, n, seed, options.dimensions, options.num_clusters)
    exact = DistanceMatrix(x, y, metric).full()
    constant = relative_error(exact.mean().expand_as(exact), exact)
    chosen = {} if strategy is None else {"strategy": strategy}
    found, best = {}, None
    for rank in ranks:
        if method == "svd" and best is None:
            # One decomposition has all ranks.
            best, seconds = _timed(lambda: truncated_svd(DistanceMatrix(x, y, metric), max(ranks)))
        if best is not None:
            approximation = LowRank(best.left[:, :rank], best.right[:rank], best.entries_read)
        else:
            approximation, seconds = _timed(
                lambda k=rank: approximate_distances(
                    x, y, k, method, metric, oversampling=options.oversampling, seed=seed, **chosen
                )
            )
        found[rank] = {
            **errors_of(approximation.matrix(), exact, seed),
            "constant": constant,
            "entries_read": approximation.entries_read / exact.numel(),
            "seconds": seconds,
        }
    return found


def _timed(function):
    started = time.perf_counter()
    return function(), time.perf_counter() - started


def errors_of(approximation: Tensor, exact: Tensor, seed: int = 0) -> dict[str, float]:
    """Return mse, relative_error (Frobenius) and spearman, the rank correlation over at most 100,000 entries."""
    return {
        "mse": float((approximation - exact).square().mean()),
        "relative_error": relative_error(approximation, exact),
        "spearman": rank_correlation(approximation.flatten(), exact.flatten(), seed),
    }


def rank_correlation(left: Tensor, right: Tensor, seed: int = 0) -> float:
    """Return Spearman's rank correlation of two vectors, ties at their mean rank, over a sample of long ones."""
    import pandas

    if len(left) > _MOST_PAIRS:
        index = torch.randint(len(left), (_MOST_PAIRS,), generator=torch.Generator().manual_seed(seed))
        left, right = left[index], right[index]
    frame = pandas.DataFrame({"left": left.numpy(), "right": right.numpy()})
    return float(frame.corr(method="spearman").iloc[0, 1])


def power_law(ranks: list[int], errors: list[float]) -> dict[str, float | None]:
    """Return slope and r2 of the line through (ln k, ln error): error ≈ c·k^slope, r2 = 1 where it is just that.

    Errors of rounding noise (below 1e-8, where the rank is reached) are left out; fewer than three points: None.
    """
    kept = [(math.log(k), math.log(e)) for k, e in zip(ranks, errors) if e is not None and e > 1e-8]
    if len(kept) < 3:
        return {"slope": None, "slope_r2": None}
    x, y = (torch.tensor(side, dtype=torch.float64) for side in zip(*kept))
    x, y = x - x.mean(), y - y.mean()
    slope = (x * y).sum() / x.square().sum()
    unexplained = (y - slope * x).square().sum() / y.square().sum().clamp_min(1e-300)
    return {"slope": _rounded(float(slope)), "slope_r2": _rounded(1 - float(unexplained))}


def draw_points(source: str, n: int, seed: int, dimensions: int = 64, num_clusters: int = 48) -> tuple[Tensor, Tensor]:
    """Return n queries and n keys (n, d) of a source in `SOURCES`; a seed is a draw, or a layer and head."""
    generator = torch.Generator().manual_seed(seed)
    if source in CHECKPOINTS:
        name, before_rotary = CHECKPOINTS[source]
        heads = _heads(name, n, before_rotary)
        query, key = heads[int(torch.randint(len(heads), (1,), generator=generator))]
        head = int(torch.randint(query.shape[0], (1,), generator=generator))
        return query[head], key[head * key.shape[0] // query.shape[0]]
    points = torch.randn(2, n, dimensions, generator=generator)
    if source == "clusters":
        centres = 4 * torch.randn(num_clusters, dimensions, generator=generator)
        points = points + centres[torch.randint(num_clusters, (2, n), generator=generator)]
    return points[0], points[1]


@lru_cache(maxsize=8)
def _heads(name: str, n: int, before_rotary: bool) -> list[tuple[Tensor, Tensor]]:
    """Return queries (H, n, d) and keys (H_kv, n, d) of every layer on the first n tokens of news."""
    model, tokenizer = _checkpoint(name)
    batch = {"input_ids": torch.tensor([token_stream(tokenizer, read_texts("news"), n)[:n]])}
    if not before_rotary:
        calls = capture(model, batch).values()
        return [(call.query[0], call.key[0, :: call.groups]) for call in calls]
    modules = [locate(model, module) for module in find_attention_modules(model)]
    outputs: dict[int, dict[str, Tensor]] = {}

    def keep(index, side, width):
        def hook(module, inputs, output):
            outputs.setdefault(index, {})[side] = output[0].unflatten(-1, (-1, width)).transpose(0, 1)

        return hook

    hooks = [
        getattr(module, f"{side}_proj").register_forward_hook(keep(index, side, module.head_dim))
        for index, module in enumerate(modules)
        for side in ("q", "k")
    ]
    try:
        with torch.no_grad():
            model.base_model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [(found["q"], found["k"]) for found in outputs.values()]


@lru_cache(maxsize=2)
def _checkpoint(name: str):
    return load_checkpoint(name)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


@styled
def figures(results, folder) -> list:
    """Draw error against rank, a panel for each kind of points, for the metric and size of the first row's kind."""
    rows = results.rows
    size, paths = max(row["n"] for row in rows), []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        shown = [row for row in rows if row["metric"] == metric and row["strategy"] in (None, "kmeans")]
        sources = list(dict.fromkeys(row["points"] for row in shown))
        figure = new_figure(3 * len(sources) + 1, 3.2)
        panels = figure.subplots(1, len(sources), squeeze=False, sharey=True)[0]
        for panel, source in zip(panels, sources):
            largest = max((row["n"] for row in shown if row["points"] == source), default=size)
            of_source = [row for row in shown if row["points"] == source and row["n"] == largest]
            for colour, row in zip(COLOURS, of_source):
                panel.plot(row["ranks"], row["relative_error"], label=row["method"], color=colour, marker=".")
            panel.axhline(of_source[0]["constant"], color="grey", linestyle=":", label="constant")
            panel.axhline(0.1, color="grey", linewidth=0.5)
            panel.set(title=f"{source}, n = {largest}", xscale="log", yscale="log", xlabel="rank k", ylim=(1e-3, 10))
        panels[0].set_ylabel(f"relative error, {metric}")
        panels[-1].legend(frameon=False, fontsize=7)
        paths += save_figure(figure, folder / f"distances_{metric}")
    return paths
