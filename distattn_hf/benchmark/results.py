"""Context of the results of `distattn benchmark`: machine, versions, and growth from one length to the next."""

import math
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch


def aligned(cells) -> str:
    """Join cells (text, width): the first two left-aligned, the rest right-aligned."""
    return " ".join(f"{text:<{width}}" if i < 2 else f"{text:>{width}}" for i, (text, width) in enumerate(cells))


def short(value: float | str | None) -> str:
    """Format an error with two digits."""
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def machine(source: dict) -> str:
    """Format versions, device and threads of `provenance` in one line."""
    commit = source["commit"][:12] + (" with changes" if source["dirty"] else "") if source["commit"] else "no commit"
    return (
        f"distattn_hf {source['distattn_hf']} ({commit}), torch {source['torch']}, {source['device']}, "
        f"{source['cores']} cores, {source['threads']} threads"
    )


def provenance(device: str) -> dict:
    """Return versions, machine, commit and time; a missing version or commit is None."""
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
    """Return {"commit", "dirty"} of the checkout that tracks this file; both None for an installed package."""

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def with_growth(row: dict, before: list[dict]) -> dict:
    """Add "growth" to the row: (time / time at the length before)^(1 / log2 of the ratio of lengths), 2 if linear."""
    same = [r for r in before if all(r[key] == row[key] for key in ("label", "causal", "pass")) and "seconds" in r]
    if same and "seconds" in row:
        times, lengths = (row["seconds"]["median"] / same[-1]["seconds"]["median"]), row["length"] / same[-1]["length"]
        row["growth"] = times ** (1 / math.log2(lengths))
    return row
