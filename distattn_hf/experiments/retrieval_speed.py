"""How fast retrieval attention is beside scaled_dot_product_attention, reading a text and generating after it.

Random float32 tensors, d = 64, causal. First both are compared where all blocks are chosen. Then each length is timed
in pairs, one after the other in one run: "prefill" with nothing cached (order, codes and summaries included), and
"step", one token against a cache of so many keys with theirs. Ratios are of SDPA's time to ours: above 1 ours is less.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch
from torch.nn import functional as F

from ..benchmark.measure import spread
from ..core.inputs import AttentionInputs
from ..core.metrics import get_metric
from ..core.retrieval import Retrieval, Search
from ..core.retrieval_cache import KeyClusters
from ..core.retrieval_cpp import cpp_supports, encode_keys
from ..core.retrieval_far import summaries_of
from ..core.retrieval_gather import run_retrieval


def timed(run) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def problem(query, key, value, search: Search, codes=None, summaries=None) -> Retrieval:
    """Return causal dot-product retrieval of these tensors; raises `RuntimeError` where no kernel runs it."""
    inputs = AttentionInputs(query, key, value, get_metric("dot"), 1.0, query.shape[-1] ** -0.5, is_causal=True)
    made = Retrieval(inputs, search, codes=codes, summaries=summaries)
    if not cpp_supports(made):
        raise RuntimeError("the CPU kernel of retrieval attention does not run here")
    return made


@torch.no_grad()
def measured(length: int, heads: int, key_heads: int, search: Search, pairs: int) -> Callable[[str], dict]:
    """Return job -> medians over pairs of runs: seconds of both, and the ratio within each pair with its spread."""
    query, (key, value) = torch.randn(1, heads, length, 64), torch.randn(2, 1, key_heads, length, 64)
    grouped = {"enable_gqa": heads != key_heads}
    step, clusters = query[:, :, -1:], KeyClusters()
    if not search.cluster_keys:
        codes = encode_keys(key, torch.ones(1, length, dtype=torch.bool), search.block_size)
        summaries = summaries_of(problem(query, key, value, search))

    def one_step():
        if search.cluster_keys:
            return run_retrieval(clusters.update(problem(step, key, value, search), [], True))
        return run_retrieval(problem(step, key, value, search, codes, summaries))

    one_step()
    runs = {
        "prefill": (
            lambda: run_retrieval(problem(query, key, value, search)),
            lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, **grouped),
            pairs,
        ),
        "step": (
            one_step,
            lambda: F.scaled_dot_product_attention(step, key, value, **grouped),
            20 * pairs,
        ),
    }

    @torch.no_grad()
    def values(job: str) -> dict:
        ours, theirs, count = runs[job]
        times = [(timed(ours), timed(theirs)) for _ in range(count)]
        ratios = spread([theirs / ours for ours, theirs in times])
        return {
            "seconds": median(ours for ours, _ in times),
            "sdpa_seconds": median(theirs for _, theirs in times),
            "ratio": ratios["median"],
            "p10": ratios["p10"],
            "p90": ratios["p90"],
        }

    return values


@torch.no_grad()
def check() -> None:
    """Raise `RuntimeError` unless retrieval of all blocks is what PyTorch computes."""
    query, key, value = torch.randn(3, 1, 4, 1000, 64)
    ours = run_retrieval(problem(query, key, value, Search(num_blocks=1000, min_weight=0.0)))[0]
    error = (ours - F.scaled_dot_product_attention(query, key, value, is_causal=True)).abs().max()
    if error > 1e-5:
        raise RuntimeError(f"all blocks are not exact attention: {error:.1e}")


@dataclass(frozen=True)
class Options:
    """lengths: numbers of keys. heads: query heads; key_heads: as many key heads in turn. blocks: so many blocks of 16
    alike keys in turn, and the last number of blocks as they stand in the text, too; pairs: of prefills, and of 20
    times as many steps.
    """

    lengths: tuple[int, ...] = (4096, 16384, 32768)
    heads: int = 12
    key_heads: tuple[int, ...] = (12, 4)
    blocks: tuple[int, ...] = (8, 16)
    pairs: int = 3

    def __post_init__(self):
        for name in ("lengths", "key_heads", "blocks"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be numbers >= 1, got {getattr(self, name)!r}")
        if self.pairs < 1:
            raise ValueError(f"pairs must be >= 1, got {self.pairs!r}")
        for number in self.key_heads:
            if self.heads % number:
                raise ValueError(f"key_heads must divide heads={self.heads}, got {number!r}")


QUICK = {"lengths": (512,), "heads": 2, "key_heads": (1,), "blocks": (2,), "pairs": 1}
AXES = ("lengths", "key_heads", "blocks")


def run(options: Options, results) -> None:
    """Check, and measure a row for each job, number of key heads, length and search."""
    check()
    # Of random keys none has a weight by which it would be read: by number.
    searches = [Search(num_blocks=number, min_weight=0.0) for number in options.blocks]
    searches.append(Search(num_blocks=options.blocks[-1], min_weight=0.0, cluster_keys=False))
    for key_heads in options.key_heads:
        for length in options.lengths:
            for search in searches:
                values = cache(lambda n=length, k=key_heads, s=search: measured(n, options.heads, k, s, options.pairs))
                for job in ("prefill", "step"):
                    key = {"job": job, "length": length, "key_heads": key_heads, "blocks": search.num_blocks}
                    key["cluster_keys"] = search.cluster_keys
                    results.row(key, lambda v=values, j=job: v()(j))
