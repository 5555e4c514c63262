"""`distattn benchmark`: speed and memory of every metric beside PyTorch's attention, and never for a wrong result."""

from dataclasses import replace

from .exact_check import (
    HALF_ERROR_RATIO,
    TOLERANCE,
    Checker,
    backend_of,
    check_rows,
    make_tensors,
    naive_attention,
    one_call,
    our_attention,
    pytorch_attention,
)
from .exact_options import BenchmarkConfig, Case
from .measure import SAMPLE_SECONDS, serve
from .run import MEANING, TOKENS, Benchmark, Unavailable, summary

# PyTorch's own memory below this is near the resolution (pages, allocator arenas), so there is no ratio.
LEAST_MEGABYTES = 1.0
# A naive call takes many times longer than ours: a few pairs are enough for its ratio.
_NAIVE_PAIRS = 5
_COMPETITORS = {"ours": our_attention, "sdpa": pytorch_attention, "naive": naive_attention}


def _naive_cell(naive: dict) -> str:
    return f"{naive['ratio']['median']:.2f}x" if "ratio" in naive else naive["absent"]


def _megabytes(value: float | str | None) -> str:
    return f"{value:.1f}" if isinstance(value, float) else "-" if value is None else "failed"


DEFINITIONS = {
    "ours": "seconds a call of distance_attention, with the median, 10th and 90th percentile over the pairs",
    "sdpa": "the same for scaled_dot_product_attention on the same tensors, run back to back in random order",
    "ratio": "ours / sdpa within a pair: below 1 is faster than PyTorch's attention",
    "tokens_per_second": MEANING["tokens_per_second"],
    "naive": "cdist + softmax + matmul, in pairs of its own with ours; ratio is naive / ours: how much faster ours is",
    "sample": f"one half of a pair: the call repeated until {1e3 * SAMPLE_SECONDS:g} ms",
    "forward": "no gradient",
    "forward_backward": "forward and gradients of query, key and value",
    "decode": "one query against `length` keys, no gradient, no concatenation of a cache",
    "memory": "10^6 bytes at the peak of one call, above what was there before: the output and the gradients are "
    "counted, the inputs are not. CPU: rise of the resident memory (VmHWM, reset before the call) of a fresh process "
    "that has made the inputs and one call on short tensors. CUDA: torch.cuda.max_memory_allocated, after one call. "
    f"ratio is ours / sdpa, absent where sdpa takes less than {LEAST_MEGABYTES:g} MB",
    "gate": "before timing: error against the float64 reference, relative to the largest entry, at most "
    f"{TOLERANCE['float32']:g} (float32) or {TOLERANCE['float64']:g} (float64); float16 and bfloat16: root mean square "
    f"and largest error at most {HALF_ERROR_RATIO:g} times those of scaled_dot_product_attention in the same dtype "
    "(the largest: or of half a unit in the last place). At two small lengths all outputs and gradients, at the timed "
    "shape a random subset of the query rows",
}


class ExactBenchmark(Benchmark):
    """Exact distance attention beside PyTorch's, and beside `cdist` + softmax."""

    Config, Case = BenchmarkConfig, Case
    unavailable = "skipped"
    definitions = DEFINITIONS
    columns = (
        ("metric", 12, lambda r: r["label"]),
        ("pass", 16, lambda r: r["pass"]),
        ("N", 6, lambda r: r["length"]),
        ("d", 4, lambda r: r["head_size"]),
        ("dtype", 9, lambda r: r["dtype"]),
        ("causal", 6, lambda r: "yes" if r["causal"] else "no"),
        ("backend", 14, lambda r: r["backend"] if r["ran"] in (None, r["backend"]) else f"{r['backend']}:{r['ran']}"),
    )
    numbers = (
        ("ms", 10, lambda r: f"{1e3 * r['ours']['median']:.3f}"),
        TOKENS,
        ("SDPA ms", 10, lambda r: f"{1e3 * r['sdpa']['median']:.3f}"),
        ("ratio [p10-p90]", 22, lambda r: "{median:.2f} [{p10:.2f}-{p90:.2f}]".format(**r["ratio"])),
        ("naive/ours", 10, lambda r: _naive_cell(r["naive"])),
        ("MB", 9, lambda r: _megabytes(r["memory"]["ours"])),
        ("SDPA MB", 9, lambda r: _megabytes(r["memory"]["sdpa"])),
        ("MB ratio", 8, lambda r: "-" if (ratio := r["memory"]["ratio"]) is None else f"{ratio:.2f}"),
    )

    def __init__(self, config: BenchmarkConfig):
        super().__init__(config)
        self._checker = Checker()

    def headline(self) -> str:
        """Describe the run, above the table."""
        config = self.config
        lines = [
            f"batch {config.batch}, heads {config.heads}, key heads {config.key_heads}; ratio is ours / "
            "scaled_dot_product_attention, medians of pairs; MB at the peak, beyond the inputs; N of decode: its keys",
        ]
        if config.naive and any(length > config.naive_max_length for length in config.lengths):
            lines.append(f"naive (cdist + softmax + matmul) is not run above length {config.naive_max_length}")
        return "\n".join(lines)

    def start(self, case: Case, name: str) -> dict:
        """Return the fields of the case; the backend that runs it is not known yet."""
        return {
            "label": case.label, "metric": case.metric, "p": case.p, "pass": case.pass_name, "length": case.length,
            "head_size": case.head_size, "dtype": case.dtype, "causal": case.causal, "batch": case.batch,
            "heads": case.heads, "kv_heads": case.kv_heads, "softening": case.softening, "softcap": case.softcap,
            "backend": case.backend, "ran": None,
        }  # fmt: skip

    def check(self, case: Case, name: str, row: dict) -> None:
        """Compare with the float64 reference: see `Checker`."""
        tensors = make_tensors(case)
        try:
            row["ran"] = backend_of(case, tensors)
        except ValueError as error:
            raise Unavailable(str(error)) from None
        row["gate"] = self._checker.check(case, row["ran"], tensors)

    def measure(self, case: Case, name: str, row: dict) -> dict:
        """Time pairs of ours with PyTorch's attention and with the naive form, and measure the memory of all three."""
        tensors = make_tensors(case)
        ours = one_call(case, our_attention(case), tensors)
        pair = self.time(one_call(case, pytorch_attention(case), tensors), ours)
        times = {"ours": pair["second"], "sdpa": pair["first"], "ratio": pair["ratio"], "pairs": pair["pairs"]}
        return {**times, "naive": self._naive(case, tensors, ours), "memory": self._memory(case, row["ran"])}

    def _naive(self, case: Case, tensors, ours) -> dict:
        if (reason := self._no_naive(case)) is not None:
            return {"absent": reason}
        attention = naive_attention(case)
        gate = summary(check_rows(case, attention, tensors, gradients=False))
        if not gate["passed"]:
            return {"absent": "WRONG", "gate": gate}
        naive = one_call(case, attention, tensors)
        pair = self.time(ours, naive, repeats=min(self.config.repeats, _NAIVE_PAIRS), min_seconds=0.0)
        return {"seconds": pair["second"], "ratio": pair["ratio"], "pairs": pair["pairs"], "gate": gate}

    def _no_naive(self, case: Case) -> str | None:
        """Return why there is no naive time, short enough for a table cell; None if there is one."""
        if not self.config.naive:
            return "off"
        if case.pass_name != "decode" and case.length > self.config.naive_max_length:
            return f">{self.config.naive_max_length}"
        return "none" if naive_attention(case) is None else None

    def _memory(self, case: Case, ran: str) -> dict:
        """Return {"ours", "sdpa", "naive": megabytes, a reason (text) or None, "ratio": ours / sdpa or None}."""
        if self.probe is None:
            return {"ours": None, "sdpa": None, "naive": None, "ratio": None}
        ours, sdpa = self.probe.measure(case, "ours", ran), self.probe.measure(case, "sdpa")
        naive = self.probe.measure(case, "naive") if self._no_naive(case) is None else None
        has_ratio = isinstance(ours, float) and isinstance(sdpa, float) and sdpa >= LEAST_MEGABYTES
        return {"ours": ours, "sdpa": sdpa, "naive": naive, "ratio": ours / sdpa if has_ratio else None}

    @classmethod
    def call(cls, case: Case, name: str):
        """Return one pass of ours, sdpa or naive."""
        return one_call(case, _COMPETITORS[name](case), make_tensors(case))

    @classmethod
    def short(cls, case: Case, name: str, ran: str | None) -> Case:
        """Return the case with at most 64 keys, on the backend that the long case chose."""
        backend = ran if name == "ours" and ran else case.backend
        return replace(case, length=min(64, case.length), backend=backend)

    @staticmethod
    def memory_key(case: Case, name: str, ran: str | None):
        """Return one key for all metrics and backends of PyTorch's attention, which is the same for them."""
        return replace(case, metric="", p=None, backend="") if name == "sdpa" else (case, name, ran)


if __name__ == "__main__":
    serve(ExactBenchmark)
