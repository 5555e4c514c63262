"""`distattn benchmark --mechanism nystrom`: time of linear attention, and beside each its error."""

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import torch

from ..functional.nystrom import nystrom_attention
from . import nystrom_inputs as inputs
from .measure import MemoryProbe, one_line, peak_megabytes, serve, time_pair
from .nystrom_inputs import KINDS, make_inputs, relative_error
from .nystrom_options import NystromCase, NystromConfig
from .nystrom_peers import COMPETITORS, Competitor, Unavailable
from .nystrom_results import DEFINITIONS, footnotes, headline, plot, table_header, table_line
from .results import with_growth
from .run import run_and_write

# N of the small check (more than a part of rows of either pass), and query rows checked at the timed length.
CHECKED_LENGTH, _CHECKED_ROWS = 200, 16
# Largest error relative to the largest entry. float32: the inverse of κ(L, L) + γI magnifies rounding, by up to m/γ.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-3}


def our_attention(case: NystromCase, strategy: str, landmarks: torch.Tensor | None) -> Callable:
    """`nystrom_attention` with the options that are measured: lifted, γ = 0.01; causal: window, sinks, fixed L."""
    options = {"lift": True, "regularisation": inputs.GAMMA, "num_landmarks": case.num_landmarks, "strategy": strategy}
    if case.causal:
        options |= {"is_causal": True, "window_size": case.window_size, "num_sinks": case.num_sinks}
    return lambda query, key, value: nystrom_attention(query, key, value, landmarks=landmarks, **options)


def ours(case: NystromCase, strategy: str, kind: str) -> Competitor:
    """Ours as a competitor; bidirectional attention chooses its landmarks within the call, and within the clock."""
    landmarks = inputs.fixed_landmarks(case, kind, strategy).to(case.device) if case.causal else None
    return lambda *tensors: tensors, our_attention(case, strategy, landmarks)


def competitor(case: NystromCase, name: str, kind: str = "normal") -> Competitor:
    """By the name in the table."""
    if name == "sdpa":
        return lambda *tensors: tensors, inputs.sdpa(case)
    return ours(case, name.removeprefix("ours:"), kind) if name.startswith("ours:") else COMPETITORS[name](case)


def gate(case: NystromCase, strategy: str) -> dict:
    """{"passed", "worst", "error", "bound"}: ours against `oracle`, on both inputs, before any clock runs.

    At a short length all rows, in float64 and float32, with gradients (float64); at the timed length some rows.
    """
    checks = []

    def compare(what, actual, expected, bound):
        actual, expected = actual.detach().double(), expected.detach()
        error = float((actual - expected).abs().amax() / expected.abs().amax().clamp_min(1e-30))
        checks.append((what, error, bound))

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
                found = attention(*leaves)[:, :, rows]
                expected = inputs.oracle(problem, *double, strategy, landmarks, rows)
                where = f"{kind} at {length}, {str(dtype).removeprefix('torch.')}"
                compare(f"{where}: output", found, expected, TOLERANCE[dtype])
                if with_gradient:
                    upstream = torch.randn(found.shape, generator=generator).to(found)
                    pairs = (torch.autograd.grad(o, x, upstream) for o, x in ((found, leaves), (expected, double)))
                    for name, a, b in zip(("query", "key", "value"), *pairs):
                        compare(f"{where}: {name} gradient", a, b, TOLERANCE[dtype])
    worst = max(checks, key=lambda check: check[1] / check[2] if math.isfinite(check[1]) else math.inf)
    passed = math.isfinite(worst[1]) and worst[1] <= worst[2]
    error = worst[1] if math.isfinite(worst[1]) else str(worst[1])
    return {"passed": passed, "worst": worst[0], "error": error, "bound": worst[2]}


def call_of(case: NystromCase, made: Competitor, tensors) -> Callable:
    """What is timed: a forward pass without gradient, or a forward and a backward pass to the leaves."""
    prepare, attention = made
    with_gradient = case.pass_name == "forward_backward"
    leaves = tuple(t.detach().requires_grad_(with_gradient) for t in prepare(*tensors))
    if with_gradient:
        upstream = torch.ones_like(tensors[0])
        return lambda: torch.autograd.grad(attention(*leaves), leaves, upstream)

    def forward():
        with torch.no_grad():
            return attention(*leaves)

    return forward


def errors_of(case: NystromCase, name: str, exact: dict) -> dict[str, float | None]:
    """Error against exact attention on each kind of input; None above error_max_length."""
    result = dict.fromkeys(KINDS)
    for kind, (tensors, rows, expected) in exact.items():
        prepare, attention = competitor(case, name, kind)
        with torch.no_grad():
            found = relative_error(attention(*prepare(*tensors))[:, :, rows], expected)
        result[kind] = found if math.isfinite(found) else None
    return result


def _exact(case: NystromCase, config: NystromConfig) -> dict:
    result = {}
    if case.length <= config.error_max_length:
        for kind in KINDS:
            tensors, rows = make_inputs(case, kind), inputs.error_rows(case)
            result[kind] = tensors, rows, inputs.exact_rows(case, *tensors, rows)
    return result


def run_case(case: NystromCase, config: NystromConfig, probe: MemoryProbe | None) -> Iterator[dict]:
    """Yield a row for each competitor: ours with every strategy, then sdpa, then the peers.

    Every time stands in pairs with that of ours with the first strategy, run back to back in random order.
    """
    names = [f"ours:{strategy}" for strategy in config.strategies]
    exact, tensors = _exact(case, config), make_inputs(case, "normal")
    limits = {n: getattr(config, n) for n in ("repeats", "warmup", "min_seconds", "max_seconds", "seed")}
    first = None
    means = {k: relative_error(t[2].mean(2, keepdim=True).expand_as(e), e) for k, (t, _, e) in exact.items()}
    if means and not case.causal:
        yield {
            "label": "mean of all values",
            **asdict(case),
            "pass": case.pass_name,
            "status": "yardstick",
            "errors": means,
        }
    for name in [*names, "sdpa", *config.peers]:
        row = {"label": name, **asdict(case), "pass": case.pass_name, "status": "ok"}
        try:
            if name == "sdpa" and case.length > config.sdpa_max_length:
                raise Unavailable(f"N > sdpa_max_length ({config.sdpa_max_length})")
            if name.startswith("ours:"):
                row["gate"] = gate(case, name.removeprefix("ours:"))
                if not row["gate"]["passed"]:
                    yield {**row, "status": "wrong"}
                    continue
            made = competitor(case, name)
            row["errors"] = dict.fromkeys(KINDS, 0.0) if name == "sdpa" else errors_of(case, name, exact)
            call = call_of(case, made, tensors)
            if first is None:
                base = ours(case, config.strategies[0], "normal")
                first = call_of(case, base, tensors)
            pair = time_pair(first, call, case.device, **limits)
            yield {**row, "seconds": pair["second"], "times_ours": pair["ratio"], **_memory(case, name, probe)}
        except Unavailable as reason:
            yield {**row, "status": "absent", "reason": str(reason)}
        except Exception as error:  # One competitor out of memory must not end the run; the exit code tells.
            yield {**row, "status": "failed", "reason": one_line(error)}
        gc.collect()


def _memory(case: NystromCase, name: str, probe: MemoryProbe | None) -> dict:
    """{"memory": megabytes or None} and, where a number was asked for and is not there, "memory_error": the reason."""
    if probe is None:
        return {"memory": None}
    found = probe.measure(case, name) if case.device == "cpu" else "measured on CPU only"
    return {"memory": found} if isinstance(found, float) else {"memory": None, "memory_error": found}


def measure_memory(case: NystromCase, name: str, ran: str | None = None) -> float:
    """Megabytes that one call of a competitor takes at its peak beyond its inputs, after one call on short inputs."""
    short = replace(case, length=4 * case.num_landmarks)
    call_of(short, competitor(short, name), make_inputs(short, "normal"))()
    return peak_megabytes(call_of(case, competitor(case, name), make_inputs(case, "normal")), case.device)


def run_nystrom_benchmark(config: NystromConfig, *, overwrite: bool = False, echo=print) -> dict:
    """Measure every case, print a line for each competitor, write benchmark.json; returns what was written."""
    return run_and_write(
        config, _rows, measured_by=measure_memory, about={"mechanism": "nystrom"},
        definitions={**DEFINITIONS, "inputs": inputs.RECIPE}, headline=headline, header=table_header(), line=table_line,
        footnotes=footnotes, plot=plot, overwrite=overwrite, echo=echo,
    )  # fmt: skip


def _rows(config: NystromConfig, probe: MemoryProbe | None) -> Iterator[dict]:
    rows = []
    for case in config.cases():
        for row in run_case(case, config, probe):
            rows.append(with_growth(row, rows))
            yield rows[-1]


if __name__ == "__main__":
    serve(NystromCase, measure_memory)
