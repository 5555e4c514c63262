"""`distattn benchmark --mechanism nystrom`: time and error of linear attention."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import torch

from ..functional.nystrom import nystrom_attention
from . import nystrom_inputs as inputs
from .measure import serve, timed_call
from .nystrom_inputs import KINDS, make_inputs, relative_error
from .nystrom_options import NystromCase, NystromConfig
from .nystrom_peers import COMPETITORS, Competitor
from .run import (
    GROWTH,
    MEANING,
    MEGABYTES,
    MILLISECONDS,
    TOKENS,
    Benchmark,
    Unavailable,
    cell,
    named_columns,
    plot_row,
    summary,
)

# N of the small check (more than a part of rows of either pass), and query rows checked at the timed length.
CHECKED_LENGTH, _CHECKED_ROWS = 200, 16
# Largest error relative to the largest entry. float32: the inverse of κ(L, L) + γI magnifies rounding, by up to m/γ.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-3}


def our_attention(case: NystromCase, strategy: str, landmarks: torch.Tensor | None) -> Callable:
    """Return `nystrom_attention` with the measured options: lifted, γ = 0.01; causal: window, sinks, fixed L."""
    options = {"lift": True, "regularisation": inputs.GAMMA, "num_landmarks": case.num_landmarks, "strategy": strategy}
    if case.causal:
        options |= {"is_causal": True, "window_size": case.window_size, "num_sinks": case.num_sinks}
    return lambda query, key, value: nystrom_attention(query, key, value, landmarks=landmarks, **options)


def ours(case: NystromCase, strategy: str, kind: str) -> Competitor:
    """Return ours as a competitor; bidirectional attention chooses its landmarks within the timed call."""
    landmarks = inputs.fixed_landmarks(case, kind, strategy).to(case.device) if case.causal else None
    return lambda *tensors: tensors, our_attention(case, strategy, landmarks)


def competitor(case: NystromCase, name: str, kind: str = "normal") -> Competitor:
    """Return the competitor with this name in the table."""
    if name == "sdpa":
        return lambda *tensors: tensors, inputs.sdpa(case)
    return ours(case, name.removeprefix("ours:"), kind) if name.startswith("ours:") else COMPETITORS[name](case)


def gate(case: NystromCase, strategy: str) -> dict:
    """Check ours against `oracle` on both kinds of inputs before timing; returns {"passed", "worst", "error", "bound"}.

    At a short length all rows, in float64 and float32, with gradients (float64); at the timed length some rows.
    """
    checks = []

    def compare(what, actual, expected, bound):
        actual, expected = actual.detach().double(), expected.detach()
        error = float((actual - expected).abs().amax() / expected.abs().amax().clamp_min(1e-30))
        checks.append({"what": what, "error": error, "bound": bound})

    for kind in KINDS:
        landmarks = inputs.fixed_landmarks(case, kind, strategy).to(case.device) if case.causal else None
        attention = our_attention(case, strategy, landmarks)
        for length in (CHECKED_LENGTH, case.length):
            problem, small = replace(case, length=length), length == CHECKED_LENGTH
            tensors = make_inputs(problem, kind)
            generator = torch.Generator().manual_seed(case.seed)
            rows = torch.arange(length) if small else torch.randperm(length, generator=generator)[:_CHECKED_ROWS]
            rows = rows.to(case.device)
            for dtype in (torch.float64, torch.float32) if small else (torch.float32,):
                with_gradient = dtype == torch.float64
                leaves = [t.to(dtype).requires_grad_(with_gradient) for t in tensors]
                double = [t.double().requires_grad_(with_gradient) for t in tensors]
                result = attention(*leaves)[:, :, rows]
                expected = inputs.oracle(problem, *double, strategy, landmarks, rows)
                label = f"{kind} at {length}, {str(dtype).removeprefix('torch.')}"
                compare(f"{label}: output", result, expected, TOLERANCE[dtype])
                if with_gradient:
                    upstream = torch.randn(result.shape, generator=generator).to(result)
                    pairs = (torch.autograd.grad(o, x, upstream) for o, x in ((result, leaves), (expected, double)))
                    for name, a, b in zip(("query", "key", "value"), *pairs):
                        compare(f"{label}: {name} gradient", a, b, TOLERANCE[dtype])
    result = summary(checks)
    return {key: result[key] for key in ("passed", "worst", "error", "bound")}


def call_of(case: NystromCase, made: Competitor, tensors) -> Callable[[], object]:
    """Return one pass of a competitor over tensors, converted to its own layout before timing."""
    prepare, attention = made
    with_gradient = case.pass_name == "forward_backward"
    leaves = tuple(t.detach().requires_grad_(with_gradient) for t in prepare(*tensors))
    return timed_call(attention, leaves, torch.ones_like(tensors[0]) if with_gradient else None)


DEFINITIONS = {
    "ours:STRATEGY": "nystrom_attention with lift and γ = 0.01. Bidirectional: landmarks chosen by STRATEGY within the "
    "call and its time, no window. Causal: landmarks fixed, chosen before from the keys of 4,096 other tokens of the "
    "same distribution; window and sinks exact",
    "sdpa": "scaled_dot_product_attention, exact",
    "seconds": "a call, with the median, 10th and 90th percentile over the pairs; on normal inputs",
    "times_ours": "seconds / those of ours with the first strategy in the same pair, run back to back in random order: "
    "above 1 is slower than ours",
    "growth": MEANING["growth"],
    "tokens_per_second": MEANING["tokens_per_second"],
    "errors": "‖output - exact‖ / ‖exact‖ against softmax attention on up to 1,024 evenly spaced query rows, for each "
    "kind of input",
    "mean of all values": "no attention at all: the error that an approximation has to beat",
    "memory": MEANING["memory"] + ". Null where it was not asked for, and where there is no number: memory_error then "
    "has the reason",
    "gate": "before timing: ours against the formula written out in float64, at a short length and on rows of the "
    "timed one",
    "peers": "their own modules with as many landmarks or random features, projections replaced by the given tensors, "
    "no convolution, tensors in the layout the module makes itself",
    "inputs": inputs.RECIPE,
}


class NystromBenchmark(Benchmark):
    """Nyström attention beside PyTorch's exact attention and other packages', with the error of each."""

    Config, Case = NystromConfig, NystromCase
    about = {"mechanism": "nystrom"}
    definitions = DEFINITIONS
    columns = named_columns("competitor", 20)
    numbers = (
        MILLISECONDS,
        TOKENS,
        ("x ours", 8, cell(".2f", lambda r: r["times_ours"]["median"])),
        GROWTH,
        ("error normal", 12, cell(".3f", lambda r: r["errors"]["normal"])),
        ("error clustered", 15, cell(".3f", lambda r: r["errors"]["clustered"])),
        MEGABYTES,
    )

    def headline(self) -> str:
        """Describe the run, above the table."""
        config = self.config
        return (
            f"batch {config.batch}, heads {config.heads}, head size {config.head_size}, float32, "
            f"{config.num_landmarks} landmarks or features; causal: window {config.window_size}, {config.num_sinks} "
            f"sinks, fixed landmarks\nx ours: time / that of ours:{config.strategies[0]} within pairs; x2 N: factor of "
            "the time when N doubles; error: relative, against exact softmax attention; MB at the peak, beyond the "
            "inputs"
        )

    def competitors(self, case: NystromCase) -> list[str]:
        """Return ours with every strategy, then sdpa, then the peers."""
        return [*(f"ours:{strategy}" for strategy in self.config.strategies), "sdpa", *self.config.peers]

    def rows(self, case: NystromCase) -> Iterator[dict]:
        """Yield the error of a plain mean, then a row for each competitor, all on the same tensors."""
        self._tensors, self._exact, self._first = make_inputs(case, "normal"), {}, None
        if case.length <= self.config.error_max_length:
            for kind in KINDS:
                tensors, rows = make_inputs(case, kind), inputs.error_rows(case)
                self._exact[kind] = tensors, rows, inputs.exact_rows(case, *tensors, rows)
        if self._exact and not case.causal:
            means = {
                kind: relative_error(tensors[2].mean(2, keepdim=True).expand_as(exact), exact)
                for kind, (tensors, _, exact) in self._exact.items()
            }
            yield {**self.start(case, "mean of all values"), "status": "yardstick", "errors": means}
        yield from super().rows(case)

    def start(self, case: NystromCase, name: str) -> dict:
        """Return the competitor's name and the fields of the case."""
        return {"label": name, **asdict(case), "pass": case.pass_name}

    def check(self, case: NystromCase, name: str, row: dict) -> None:
        """Compare ours with the formula, for a verdict, and all competitors with exact attention, for an error only."""
        if name == "sdpa" and case.length > self.config.sdpa_max_length:
            raise Unavailable(f"N > sdpa_max_length ({self.config.sdpa_max_length})")
        if name.startswith("ours:"):
            row["gate"] = gate(case, name.removeprefix("ours:"))
            if not row["gate"]["passed"]:
                return
        row["errors"] = dict.fromkeys(KINDS, 0.0) if name == "sdpa" else self._errors(case, name)

    def _errors(self, case: NystromCase, name: str) -> dict[str, float | None]:
        """Return the error against exact attention on each kind of input; None above error_max_length."""
        # Raises `Unavailable` even if no error is measured.
        competitor(case, name)
        result = dict.fromkeys(KINDS)
        for kind, (tensors, rows, expected) in self._exact.items():
            prepare, attention = competitor(case, name, kind)
            with torch.no_grad():
                error = relative_error(attention(*prepare(*tensors))[:, :, rows], expected)
            result[kind] = error if math.isfinite(error) else None
        return result

    def measure(self, case: NystromCase, name: str, row: dict) -> dict:
        """Measure time, in pairs with ours of the first strategy, and memory."""
        call = call_of(case, competitor(case, name), self._tensors)
        if self._first is None:
            self._first = call_of(case, ours(case, self.config.strategies[0], "normal"), self._tensors)
        pair = self.time(self._first, call)
        return {"seconds": pair["second"], "times_ours": pair["ratio"], **self.memory_of(case, name)}

    @classmethod
    def call(cls, case: NystromCase, name: str) -> Callable[[], object]:
        """Return one pass of a competitor on normal inputs."""
        return call_of(case, competitor(case, name), make_inputs(case, "normal"))

    @classmethod
    def short(cls, case: NystromCase, name: str, ran: str | None) -> NystromCase:
        """Return the case with four tokens per landmark."""
        return replace(case, length=4 * case.num_landmarks)

    def footnotes(self, results: list[dict]) -> list[str]:
        """Return why rows have no memory, each reason once."""
        rows_of = {}
        for row in results:
            if "memory_error" in row:
                rows_of.setdefault(row["memory_error"], []).append(row)
        notes = []
        for reason, rows in rows_of.items():
            labels = ", ".join(dict.fromkeys(row["label"] for row in rows))
            lengths = ", ".join(map(str, dict.fromkeys(row["length"] for row in rows)))
            notes.append(f"no MB of {labels} at N = {lengths}: {reason}")
        return notes

    def plotted(self, rows: list[dict]) -> list[dict]:
        """Return all rows but PyTorch's attention, which is added to each as `sdpa`."""
        exact = {(row["causal"], row["pass"], row["length"]): row for row in rows if row["label"] == "sdpa"}
        plot_rows = []
        for row in rows:
            peer = exact.get((row["causal"], row["pass"], row["length"]), {"seconds": None, "memory": None})
            if row["label"] != "sdpa":
                plot_rows.append(plot_row(row, "nystrom", peer["seconds"], peer["memory"]))
        return plot_rows


if __name__ == "__main__":
    serve(NystromBenchmark)
