"""How fast retrieval attention is beside scaled_dot_product_attention, reading a text and generating after it.

python -m distattn_hf.experiments.retrieval_speed OUT.json [--lengths 4096,16384,32768] [--heads 12] [--key-heads 12,4]
    [--blocks 8,16]

Random float32 tensors, d = 64, causal; so many blocks of 16 keys, of alike keys, and the last number of blocks as they
stand in the text, too. First both are compared where all blocks are chosen. Then each length is timed in pairs, one
after the other in one run: a prefill with nothing cached (order, codes and summaries included), and a step of one token
against a cache of so many keys with theirs. Ratios are of SDPA's time to ours: above 1 ours is faster.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F

from ..core.inputs import AttentionInputs
from ..core.metrics import get_metric
from ..core.retrieval import Retrieval, Search
from ..core.retrieval_cache import KeyClusters
from ..core.retrieval_cpp import cpp_supports, encode_keys
from ..core.retrieval_far import summaries_of
from ..core.retrieval_gather import run_retrieval
from ..storage.folders import write_json


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
def measure(length: int, heads: int, key_heads: int, search: Search, pairs: int) -> dict:
    """Return medians over pairs of runs: seconds of both, and the ratio within each pair."""
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
    row = {"length": length, "heads": heads, "key_heads": key_heads}
    row |= {"blocks": search.num_blocks, "cluster_keys": search.cluster_keys}
    for name, (ours, theirs, count) in runs.items():
        times = [(timed(ours), timed(theirs)) for _ in range(count)]
        row[name] = {
            "seconds": median(ours for ours, _ in times),
            "sdpa_seconds": median(theirs for _, theirs in times),
            "ratio": median(theirs / ours for ours, theirs in times),
        }
    return row


@torch.no_grad()
def check() -> None:
    """Raise `RuntimeError` unless retrieval of all blocks is what PyTorch computes."""
    query, key, value = torch.randn(3, 1, 4, 1000, 64)
    ours = run_retrieval(problem(query, key, value, Search(num_blocks=1000, min_weight=0.0)))[0]
    error = (ours - F.scaled_dot_product_attention(query, key, value, is_causal=True)).abs().max()
    if error > 1e-5:
        raise RuntimeError(f"all blocks are not exact attention: {error:.1e}")


def main(out: Path, lengths: list[int], heads: int, key_heads: list[int], blocks: list[int], pairs: int) -> None:
    """Check, measure each length, print a line for each and write the file."""
    check()
    rows = []
    # Of random keys none has a weight by which it would be read: by number.
    searches = [Search(num_blocks=number, min_weight=0.0) for number in blocks]
    searches.append(Search(num_blocks=blocks[-1], min_weight=0.0, cluster_keys=False))
    for count in key_heads:
        for length in lengths:
            for search in searches:
                rows.append(measure(length, heads, count, search, pairs))
                write_json(out, {"threads": torch.get_num_threads(), "rows": rows})
                print(rows[-1], flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)

    def numbers(text):
        return [int(part) for part in text.split(",")]

    parser.add_argument("--lengths", default="4096,16384,32768", type=numbers)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--key-heads", type=numbers, default="12,4")
    parser.add_argument("--blocks", default="8,16", type=numbers)
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    main(given.out, given.lengths, given.heads, given.key_heads, given.blocks, given.pairs)
