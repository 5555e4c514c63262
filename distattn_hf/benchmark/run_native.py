"""`distattn benchmark --mechanism native`: time and memory of the native family's mechanisms against the length."""

import gc
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ..core.mechanisms import MECHANISMS
from ..functional.nystrom import nystrom_attention
from .fields import CAUSAL, SHORTEST_LENGTH, check_shared, choices, number, numbers, store
from .measure import MemoryProbe, one_line, peak_megabytes, serve, time_pair
from .plot import plot_results
from .results import aligned, machine, with_growth
from .run import run_and_write

# N of the check before timing, and its largest error relative to the largest entry, in float64.
CHECKED_LENGTH, TOLERANCE = 150, 1e-9
_COLUMNS = (("mechanism", 12), ("pass", 16), ("causal", 6), ("N", 6))
_NUMBERS = (("ms", 10), ("x sdpa", 8), ("x2 N", 6), ("MB", 8))
DEFINITIONS = {
    "seconds": "a call, with the median, 10th and 90th percentile over the pairs; on N(0, I) inputs",
    "times_sdpa": "seconds / those of scaled_dot_product_attention in the same pair, run back to back in random order",
    "growth": "factor of the time for each doubling of the length, since the length before: 2 where time is linear",
    "memory": "10^6 bytes at the peak of one call, above its inputs; the output (and gradients) count; on CPU",
    "gate": "before timing: the output against the mechanism's own weights, written out, times the values, in float64",
    "nystrom": "nystrom_attention, 64 landmarks, lifted; causal: window 64, 4 sinks, fixed landmarks",
}


@dataclass(frozen=True)
class NativeCase:
    """One problem: query, key, value (batch, heads, length, head_size) in float32, one mechanism, one pass."""

    mechanism: str
    causal: bool
    pass_name: str
    length: int
    batch: int
    heads: int
    head_size: int
    device: str
    seed: int


@dataclass(frozen=True)
class NativeConfig:
    """The options of `distattn benchmark --mechanism native`; the keys of its YAML file.

    Args:
        mechanism: "native".
        mechanisms: names registered in `MECHANISMS`, and "nystrom"; each with its default options. A form that a
            mechanism does not have is left out.
        lengths, causal, passes, heads, head_size, batch, device, repeats, warmup, min_seconds, max_seconds, memory,
        threads, seed, out, plot: as in `NystromConfig`.
        sdpa_max_length: beyond this length scaled_dot_product_attention is not run beside.
    """

    mechanism: str = "native"
    mechanisms: tuple[str, ...] = ("local", "strided", "landmark", "linear", "performer", "nystrom")
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    causal: bool | str = "both"
    passes: tuple[str, ...] = ("forward",)
    heads: int = 4
    head_size: int = 64
    batch: int = 1
    device: str = "auto"
    sdpa_max_length: int = 16384
    repeats: int = 3
    warmup: int = 1
    min_seconds: float = 0.3
    max_seconds: float = 60.0
    memory: bool = True
    threads: int | None = None
    seed: int = 0
    out: str = "out/benchmark-native"
    plot: bool = True

    def __post_init__(self):
        known = (*MECHANISMS, "nystrom")
        store(
            self,
            mechanisms=choices(self.mechanisms, "mechanisms", known),
            lengths=tuple(sorted(numbers(self.lengths, "lengths", SHORTEST_LENGTH))),
            passes=choices(self.passes, "passes", ("forward", "forward_backward")),
        )
        for name, least in (("head_size", 1), ("sdpa_max_length", 0)):
            store(self, **{name: number(getattr(self, name), name, int, least)})
        check_shared(self)

    def cases(self) -> list[NativeCase]:
        """Every case that exists, the lengths of one mechanism, form and pass together, ascending."""
        found = itertools.product(self.mechanisms, CAUSAL[self.causal], self.passes, self.lengths)
        return [
            NativeCase(name, causal, pass_name, n, self.batch, self.heads, self.head_size, self.device, self.seed)
            for name, causal, pass_name, n in found
            if name == "nystrom" or (MECHANISMS.get(name).causal if causal else MECHANISMS.get(name).bidirectional)
        ]


def make_tensors(case: NativeCase) -> tuple[torch.Tensor, ...]:
    """query, key, value by the case's seed."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.batch, case.heads, case.length, case.head_size)
    return tuple(torch.randn(shape, generator=generator).to(case.device) for _ in range(3))


def attention_of(case: NativeCase) -> Callable:
    """A function of (query, key, value); with `weights=True` it returns (output, weights)."""
    if case.mechanism == "nystrom":
        options = {"lift": True, "num_landmarks": 64}
        if case.causal:
            generator = torch.Generator().manual_seed(case.seed + 1)
            landmarks = torch.randn(case.heads, 64, case.head_size, generator=generator).to(case.device)
            options = {"lift": True, "is_causal": True, "window_size": 64, "num_sinks": 4, "landmarks": landmarks}
        return lambda query, key, value: nystrom_attention(query, key, value, **options)
    torch.manual_seed(case.seed)
    kind = MECHANISMS.get(case.mechanism)
    length = max(case.length, CHECKED_LENGTH) if kind.needs_max_length else None
    module: nn.Module = kind(case.heads, case.head_size, max_length=length).to(case.device).eval()

    def attend(query, key, value, weights=False):
        module.to(query.dtype)
        output, found = module(query, key, value, is_causal=case.causal, return_weights=weights)
        return (output, found) if weights else output

    return attend


def gate(case: NativeCase) -> dict:
    """{"passed", "error", "bound"}: the output against written-out weights times values (of Nyström: see its own
    benchmark), float64."""
    if case.mechanism in ("nystrom", "relative"):
        # Relative values are no part of the weights; Nyström's benchmark has an oracle of its own.
        return {"passed": True, "error": None, "bound": None}
    tensors = [t.double() for t in make_tensors(replace(case, length=CHECKED_LENGTH))]
    with torch.no_grad():
        output, weights = attention_of(case)(*tensors, weights=True)
        expected = weights @ tensors[2]
    error = float((output - expected).abs().amax() / expected.abs().amax())
    return {"passed": math.isfinite(error) and error <= TOLERANCE, "error": error, "bound": TOLERANCE}


def call_of(case: NativeCase, attention: Callable) -> Callable:
    """What is timed: a forward pass without gradient, or a forward and a backward pass to the inputs."""
    with_gradient = case.pass_name == "forward_backward"
    leaves = tuple(t.requires_grad_(with_gradient) for t in make_tensors(case))
    if with_gradient:
        upstream = torch.ones_like(leaves[0])
        return lambda: torch.autograd.grad(attention(*leaves), leaves, upstream)

    def forward():
        with torch.no_grad():
            return attention(*leaves)

    return forward


def measure_memory(case: NativeCase, name: str, ran: str | None = None) -> float:
    """Megabytes that one call takes at its peak beyond its inputs, after one call on short inputs."""
    short = replace(case, length=256)
    call_of(short, attention_of(short))()
    return peak_megabytes(call_of(case, attention_of(case)), case.device)


def run_case(case: NativeCase, config: NativeConfig, probe: MemoryProbe | None) -> dict:
    """The row of one case."""
    row = {"label": case.mechanism, **asdict(case), "pass": case.pass_name, "status": "ok", "gate": gate(case)}
    if not row["gate"]["passed"]:
        return {**row, "status": "wrong"}
    limits = {n: getattr(config, n) for n in ("repeats", "warmup", "min_seconds", "max_seconds", "seed")}
    try:
        call = call_of(case, attention_of(case))
        if case.length <= config.sdpa_max_length:
            sdpa = call_of(case, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=case.causal))
            pair = time_pair(sdpa, call, case.device, **limits)
            row |= {"sdpa": pair["first"], "times_sdpa": pair["ratio"]}
        else:
            pair = time_pair(call, call, case.device, **limits)
        row |= {"seconds": pair["second"], "memory": None}
        if probe is not None:
            found = probe.measure(case, "ours") if case.device == "cpu" else "measured on CPU only"
            row |= {"memory": found} if isinstance(found, float) else {"memory_error": found}
    except Exception as error:  # One mechanism out of memory must not end the run; the exit code tells.
        return {**row, "status": "failed", "reason": one_line(error)}
    finally:
        gc.collect()
    return row


def _rows(config: NativeConfig, probe: MemoryProbe | None) -> Iterator[dict]:
    rows: list[dict] = []
    for case in config.cases():
        rows.append(with_growth(run_case(case, config, probe), rows))
        yield rows[-1]


def table_line(row: dict) -> str:
    """One row in a line: times only where the check passed."""
    start = (row["label"], row["pass"], "yes" if row["causal"] else "no", row["length"])
    start = aligned([(text, width) for text, (_, width) in zip(map(str, start), _COLUMNS)])
    if row["status"] == "wrong":
        return f"{start} WRONG (error {row['gate']['error']:.1e} > {row['gate']['bound']:.1e})"
    if row["status"] == "failed":
        return f"{start} FAILED: {row['reason']}"
    cells = [
        f"{1e3 * row['seconds']['median']:.2f}",
        f"{row['times_sdpa']['median']:.3f}" if "times_sdpa" in row else "-",
        f"{row['growth']:.2f}" if "growth" in row else "-",
        "n/a" if "memory_error" in row else "-" if row["memory"] is None else f"{row['memory']:.1f}",
    ]
    return " ".join([start, *(f"{text:>{width}}" for text, (_, width) in zip(cells, _NUMBERS))])


def _headline(config: NativeConfig, source: dict) -> str:
    return (
        f"{machine(source)}\n"
        f"batch {config.batch}, heads {config.heads}, head size {config.head_size}, float32, default options\n"
        "x sdpa: time / that of scaled_dot_product_attention within pairs; x2 N: factor of the time when N doubles; MB "
        "at the peak, beyond the inputs"
    )


def _plot(report: dict, folder: Path) -> list[Path]:
    results = [
        {
            **{name: row[name] for name in ("label", "pass", "length", "causal", "head_size", "status")},
            "dtype": "float32", "backend": "native", "ours": row["seconds"], "sdpa": row.get("sdpa"),
            "memory": {"ours": row["memory"], "sdpa": None}, "naive": {"absent": "off"},
        }
        for row in report["results"]
        if row["status"] == "ok"
    ]  # fmt: skip
    return plot_results({"results": results, "provenance": report["provenance"]}, folder)


def run_native_benchmark(config: NativeConfig, *, overwrite: bool = False, echo=print) -> dict:
    """Measure every case, print a line for each, write benchmark.json; returns what was written."""
    return run_and_write(
        config, _rows, measured_by=measure_memory, about={"mechanism": "native"}, definitions=DEFINITIONS,
        headline=_headline, header=aligned([*_COLUMNS, *_NUMBERS]), line=table_line, plot=_plot, overwrite=overwrite,
        echo=echo,
    )  # fmt: skip


if __name__ == "__main__":
    serve(NativeCase, measure_memory)
