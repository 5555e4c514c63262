"""What `distattn benchmark` prints and writes: table lines, provenance, and JSON that is complete or not there."""

import math
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from .exact_check import HALF_ERROR_RATIO, TOLERANCE
from .measure import LEAST_MEGABYTES, SAMPLE_SECONDS

# What the numbers of benchmark.json mean; written into it.
DEFINITIONS = {
    "ours": "seconds a call of distance_attention, with the median, 10th and 90th percentile over the pairs",
    "sdpa": "the same for scaled_dot_product_attention on the same tensors, run back to back in random order",
    "ratio": "ours / sdpa within a pair: below 1 is faster than PyTorch's attention",
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

# (title, width, text of a finished result); titles and texts are right-aligned but for the first two.
_COLUMNS = (
    ("metric", 12, lambda r: r["label"]),
    ("pass", 16, lambda r: r["pass"]),
    ("N", 6, lambda r: r["length"]),
    ("d", 4, lambda r: r["head_size"]),
    ("dtype", 9, lambda r: r["dtype"]),
    ("causal", 6, lambda r: "yes" if r["causal"] else "no"),
    ("backend", 14, lambda r: r["backend"] if r["ran"] in (None, r["backend"]) else f"{r['backend']}:{r['ran']}"),
)
_NUMBERS = (
    ("ms", 10, lambda r: f"{1e3 * r['ours']['median']:.3f}"),
    ("SDPA ms", 10, lambda r: f"{1e3 * r['sdpa']['median']:.3f}"),
    ("ratio [p10-p90]", 22, lambda r: "{median:.2f} [{p10:.2f}-{p90:.2f}]".format(**r["ratio"])),
    ("naive/ours", 10, lambda r: _naive_cell(r["naive"])),
    ("MB", 9, lambda r: _megabytes(r["memory"]["ours"])),
    ("SDPA MB", 9, lambda r: _megabytes(r["memory"]["sdpa"])),
    ("MB ratio", 8, lambda r: "-" if (ratio := r["memory"]["ratio"]) is None else f"{ratio:.2f}"),
)


def _naive_cell(naive: dict) -> str:
    return f"{naive['ratio']['median']:.2f}x" if "ratio" in naive else naive["absent"]


def _megabytes(value: float | str | None) -> str:
    return f"{value:.1f}" if isinstance(value, float) else "-" if value is None else "failed"


def aligned(cells) -> str:
    """(text, width) side by side: the first two to the left, the rest to the right."""
    return " ".join(f"{text:<{width}}" if i < 2 else f"{text:>{width}}" for i, (text, width) in enumerate(cells))


def table_header() -> str:
    """The titles of the table's columns."""
    return aligned([(title, width) for title, width, _ in (*_COLUMNS, *_NUMBERS)])


def table_line(result: dict) -> str:
    """One result in a line: times only where the check passed; otherwise WRONG, skipped or FAILED with the reason."""
    start = aligned([(str(text(result)), width) for _, width, text in _COLUMNS])
    if result["status"] == "ok":
        return " ".join([start, *(f"{text(result):>{width}}" for _, width, text in _NUMBERS)])
    if result["status"] == "wrong":
        gate = result["gate"]
        return f"{start} WRONG (error {_short(gate['error'])} > {_short(gate['bound'])}; {gate['worst']})"
    word = {"skipped": "skipped", "failed": "FAILED"}[result["status"]]
    return f"{start} {word}: {result['reason']}"


def _short(value: float | str | None) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def machine(source: dict) -> str:
    """Versions, device and threads of `provenance` in a line."""
    commit = source["commit"][:12] + (" with changes" if source["dirty"] else "") if source["commit"] else "no commit"
    return (
        f"distattn_hf {source['distattn_hf']} ({commit}), torch {source['torch']}, {source['device']}, "
        f"{source['cores']} cores, {source['threads']} threads"
    )


def provenance(device: str) -> dict:
    """Versions, machine, commit and time; a version or commit that is not there is None."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: _version(name) for name in ("distattn_hf", "torch", "transformers", "triton")},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_model(),
        "cuda": torch.version.cuda if device == "cuda" else None,
        **_git(),
    }


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git() -> dict:
    """{"commit", "dirty"} of the checkout this file is tracked in; None and None for an installed package."""

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def with_growth(row: dict, before: list[dict]) -> dict:
    """The row with "growth": (time / time at the length before)^(1 / log2 of the ratio of lengths), 2 where linear."""
    same = [r for r in before if all(r[key] == row[key] for key in ("label", "causal", "pass")) and "seconds" in r]
    if same and "seconds" in row:
        times, lengths = (row["seconds"]["median"] / same[-1]["seconds"]["median"]), row["length"] / same[-1]["length"]
        row["growth"] = times ** (1 / math.log2(lengths))
    return row
