"""`distattn benchmark --mechanism native`: time and memory of the native family's mechanisms against the length."""

from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from torch import nn

from ..core.mechanisms import MECHANISMS
from ..functional.nystrom import nystrom_attention
from ..functional.retrieval_attention import retrieval_attention
from .measure import serve, timed_call
from .native_options import NativeCase, NativeConfig
from .nystrom_inputs import sdpa
from .run import GROWTH, MEANING, MEGABYTES, MILLISECONDS, TOKENS, Benchmark, cell, named_columns, plot_row, summary

# N of the check before timing, and its largest error relative to the largest entry, in float64.
CHECKED_LENGTH, TOLERANCE = 150, 1e-9


def make_tensors(case: NativeCase) -> tuple[torch.Tensor, ...]:
    """Draw query, key, value by the case's seed."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.batch, case.heads, case.length, case.head_size)
    return tuple(torch.randn(shape, generator=generator).to(case.device) for _ in range(3))


def attention_of(case: NativeCase) -> Callable:
    """Return a function of (query, key, value); with `weights=True` it returns (output, weights)."""
    if case.mechanism == "nystrom":
        options = {"lift": True, "num_landmarks": 64}
        if case.causal:
            generator = torch.Generator().manual_seed(case.seed + 1)
            landmarks = torch.randn(case.heads, 64, case.head_size, generator=generator).to(case.device)
            options = {"lift": True, "is_causal": True, "window_size": 64, "num_sinks": 4, "landmarks": landmarks}
        return lambda query, key, value: nystrom_attention(query, key, value, **options)
    if case.mechanism == "retrieval":
        return lambda query, key, value, weights=False: retrieval_attention(
            query, key, value, is_causal=case.causal, return_weights=weights
        )
    torch.manual_seed(case.seed)
    mechanism_class = MECHANISMS.get(case.mechanism)
    length = max(case.length, CHECKED_LENGTH) if mechanism_class.needs_max_length else None
    module: nn.Module = mechanism_class(case.heads, case.head_size, max_length=length).to(case.device).eval()

    def attend(query, key, value, weights=False):
        module.to(query.dtype)
        output, attention_weights = module(query, key, value, is_causal=case.causal, return_weights=weights)
        return (output, attention_weights) if weights else output

    return attend


DEFINITIONS = {
    "seconds": "a call, with the median, 10th and 90th percentile over the pairs; on N(0, I) inputs",
    "times_sdpa": "seconds / those of scaled_dot_product_attention in the same pair, run back to back in random order",
    **MEANING,
    "gate": "before timing: the output against the mechanism's own weights, written out, times the values, in float64",
    "nystrom": "nystrom_attention, 64 landmarks, lifted; causal: window 64, 4 sinks, fixed landmarks",
}


class NativeBenchmark(Benchmark):
    """The mechanisms of the native family, and Nyström attention, beside PyTorch's attention."""

    Config, Case = NativeConfig, NativeCase
    about = {"mechanism": "native"}
    definitions = DEFINITIONS
    columns = named_columns("mechanism", 12)
    numbers = (
        MILLISECONDS, TOKENS, ("x sdpa", 8, cell(".3f", lambda r: r["times_sdpa"]["median"])), GROWTH, MEGABYTES,
    )  # fmt: skip

    def headline(self) -> str:
        """Describe the run, above the table."""
        config = self.config
        return (
            f"batch {config.batch}, heads {config.heads}, head size {config.head_size}, float32, default options\n"
            "x sdpa: time / that of scaled_dot_product_attention within pairs; x2 N: factor of the time when N doubles"
            "; MB at the peak, beyond the inputs"
        )

    def start(self, case: NativeCase, name: str) -> dict:
        """Return the fields of the case."""
        return {"label": case.mechanism, **asdict(case), "pass": case.pass_name}

    def check(self, case: NativeCase, name: str, row: dict) -> None:
        """Compare with explicit weights times values in float64, if the mechanism has such weights."""
        if case.mechanism in ("nystrom", "relative"):
            # Relative values are not part of the weights; Nyström's benchmark has its own oracle.
            row["gate"] = {"passed": True, "error": None, "bound": None}
            return
        tensors = [tensor.double() for tensor in make_tensors(replace(case, length=CHECKED_LENGTH))]
        with torch.no_grad():
            output, weights = attention_of(case)(*tensors, weights=True)
            expected = weights @ tensors[2]
        error = float((output - expected).abs().amax() / expected.abs().amax())
        verdict = summary([{"what": "output", "error": error, "bound": TOLERANCE}])
        row["gate"] = {key: verdict[key] for key in ("passed", "error", "bound")}

    def measure(self, case: NativeCase, name: str, row: dict) -> dict:
        """Measure time, in pairs with PyTorch's attention up to sdpa_max_length, and memory."""
        ours, with_sdpa = self.call(case, "ours"), case.length <= self.config.sdpa_max_length
        pair = self.time(self.call(case, "sdpa") if with_sdpa else ours, ours)
        times = {"sdpa": pair["first"], "times_sdpa": pair["ratio"]} if with_sdpa else {}
        return {**times, "seconds": pair["second"], **self.memory_of(case, "ours")}

    @classmethod
    def call(cls, case: NativeCase, name: str) -> Callable[[], object]:
        """Return one pass of the case's mechanism ("ours") or of PyTorch's attention ("sdpa")."""
        attention = attention_of(case) if name == "ours" else sdpa(case)
        with_gradient = case.pass_name == "forward_backward"
        leaves = tuple(t.requires_grad_(with_gradient) for t in make_tensors(case))
        return timed_call(attention, leaves, torch.ones_like(leaves[0]) if with_gradient else None)

    @classmethod
    def short(cls, case: NativeCase, name: str, ran: str | None) -> NativeCase:
        """Return the case with 256 tokens."""
        return replace(case, length=256)

    def plotted(self, rows: list[dict]) -> list[dict]:
        """Return each row with PyTorch's attention of its own pairs."""
        return [plot_row(row, "native", row.get("sdpa")) for row in rows]


if __name__ == "__main__":
    serve(NativeBenchmark)
