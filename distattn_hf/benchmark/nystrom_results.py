"""What the Nyström benchmark prints and draws."""

from pathlib import Path

from .nystrom_options import NystromConfig
from .plot import plot_results
from .results import aligned, machine

DEFINITIONS = {
    "ours:STRATEGY": "nystrom_attention with lift and γ = 0.01. Bidirectional: landmarks chosen by STRATEGY within the "
    "call and its time, no window. Causal: landmarks fixed, chosen before from the keys of 4,096 other tokens of the "
    "same distribution; window and sinks exact",
    "sdpa": "scaled_dot_product_attention, exact",
    "seconds": "a call, with the median, 10th and 90th percentile over the pairs; on normal inputs",
    "times_ours": "seconds / those of ours with the first strategy in the same pair, run back to back in random order: "
    "above 1 is slower than ours",
    "growth": "factor of the time for each doubling of the length, since the length before: 2 where time is linear",
    "errors": "‖output - exact‖ / ‖exact‖ against softmax attention on up to 1,024 evenly spaced query rows, for each "
    "kind of input",
    "mean of all values": "no attention at all: the error that an approximation has to beat",
    "memory": "10^6 bytes at the peak of one call, above its inputs; the output (and gradients) count; on CPU. "
    "Null where it was not asked for, and where there is no number: memory_error then has the reason",
    "gate": "before timing: ours against the formula written out in float64, at a short length and on rows of the "
    "timed one",
    "peers": "their own modules with as many landmarks or random features, projections replaced by the given tensors, "
    "no convolution, tensors in the layout the module makes itself",
}

_COLUMNS = (("competitor", 20), ("pass", 16), ("causal", 6), ("N", 6))
_NUMBERS = (
    ("ms", 10), ("x ours", 8), ("x2 N", 6), ("error normal", 12), ("error clustered", 15), ("MB", 8)
)  # fmt: skip


def table_header() -> str:
    """The titles of the table's columns."""
    return aligned([*_COLUMNS, *_NUMBERS])


def table_line(row: dict) -> str:
    """One row in a line: times only where the check passed."""
    start = (row["label"], row["pass"], "yes" if row["causal"] else "no", row["length"])
    start = aligned([(text, width) for text, (_, width) in zip(map(str, start), _COLUMNS)])
    if row["status"] == "wrong":
        error, bound = (f"{x:.1e}" if isinstance(x, float) else x for x in (row["gate"]["error"], row["gate"]["bound"]))
        return f"{start} WRONG (error {error} > {bound}; {row['gate']['worst']})"
    if row["status"] not in ("ok", "yardstick"):
        return f"{start} {'FAILED: ' if row['status'] == 'failed' else '- '}{row['reason']}"
    timed = row["status"] == "ok"
    cells = [
        f"{1e3 * row['seconds']['median']:.2f}" if timed else "-",
        f"{row['times_ours']['median']:.2f}" if timed else "-",
        f"{row['growth']:.2f}" if "growth" in row else "-",
        *("-" if error is None else f"{error:.3f}" for error in row["errors"].values()),
        _megabytes(row),
    ]
    return " ".join([start, *(f"{text:>{width}}" for text, (_, width) in zip(cells, _NUMBERS))])


def _megabytes(row: dict) -> str:
    if "memory_error" in row:
        return "n/a"
    return "-" if (memory := row.get("memory")) is None else f"{memory:.1f}"


def footnotes(results: list[dict]) -> list[str]:
    """Why rows have no memory, each reason once."""
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


def headline(config: NystromConfig, source: dict) -> str:
    """What was run on what."""
    return (
        f"{machine(source)}\n"
        f"batch {config.batch}, heads {config.heads}, head size {config.head_size}, float32, {config.num_landmarks} "
        f"landmarks or features; causal: window {config.window_size}, {config.num_sinks} sinks, fixed landmarks\n"
        f"x ours: time / that of ours:{config.strategies[0]} within pairs; x2 N: factor of the time when N doubles; "
        "error: relative, against exact softmax attention; MB at the peak, beyond the inputs"
    )


def plot(report: dict, folder: Path) -> list[Path]:
    """Time (and memory) against length, both logarithmic, in the form of `plot_results`."""
    done = [row for row in report["results"] if row["status"] == "ok"]
    exact = {(row["causal"], row["pass"], row["length"]): row for row in done if row["label"] == "sdpa"}
    results = []
    for row in done:
        peer = exact.get((row["causal"], row["pass"], row["length"]))
        if row["label"] != "sdpa":
            memory = {"ours": row["memory"], "sdpa": None if peer is None else peer["memory"]}
            results.append(
                {
                    **{name: row[name] for name in ("label", "pass", "length", "causal", "head_size", "status")},
                    "dtype": "float32", "backend": "nystrom", "ours": row["seconds"], "memory": memory,
                    "sdpa": None if peer is None else peer["seconds"], "naive": {"absent": "off"},
                }
            )  # fmt: skip
    return plot_results({"results": results, "provenance": report["provenance"]}, folder)
