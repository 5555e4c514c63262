"""A check for whoever has a GPU: is every kernel right, how fast is it beside flash attention; eight minutes, one JSON.

python -m distattn_hf.benchmark.gpu_check [--out FILE] [--seconds 440]
    [--parts correctness,exact,retrieval,nystrom,model] [--only TEXT] [--device auto] [--workers N] [--commit HASH]

`scripts/gpu_check.sh` calls it and says how packages travel to a machine without network. On a machine without a GPU it
runs the share of Triton's interpreter, in three minutes. The status is 1 if anything computed was wrong or failed.
"""

import argparse
import os
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

from ..storage.folders import write_json
from .gpu_check_cases import RULE, correctness_cases
from .gpu_check_speed import DEFINITIONS, timings
from .gpu_check_worker import InThisProcess, Worker, ask_in_time, run_all
from .results import machine

# Part -> the share of the time at which it must end. The next part gets the time that it leaves.
SHARES = {
    "cuda": {"correctness": 0.45, "exact": 0.7, "retrieval": 0.8, "nystrom": 0.88, "model": 1.0},
    "cpu": {"correctness": 0.9, "exact": 0.94, "retrieval": 0.97, "nystrom": 1.0, "model": 1.0},
}
PARTS = tuple(SHARES["cuda"])
SECONDS = {"cuda": 440.0, "cpu": 300.0}
# A case that takes longer hangs.
_CASE_SECONDS = 60.0
# A timing makes about this many calls, and is skipped if they would take longer than this.
_CALLS, _LONGEST_SECONDS = 8, 20.0
_MOST_WORKERS, _WORKER_MEGABYTES = 8, 8_000
_SHOWN_FAILURES, _WRITE_EVERY = 10, 10.0


class GpuCheck:
    """One run: its arguments, its deadline, and the report so far."""

    def __init__(self, arguments: argparse.Namespace):
        self.device = arguments.device
        self.begin = time.monotonic()
        self.seconds = arguments.seconds or SECONDS[self.device]
        self.out, self.only, self.parts, self.workers = (
            arguments.out,
            arguments.only,
            arguments.parts,
            arguments.workers,
        )
        self.report = {
            "check": "gpu_check",
            "device": self.device,
            "interpreter": self.device == "cpu",
            "provenance": {},
            "budget_seconds": self.seconds,
            "only": self.only,
            "complete": False,
            "definitions": {"correctness": RULE, **DEFINITIONS},
            "parts": {},
            "rows": {},
        }
        self.commit, self.shown, self.written = arguments.commit, 0, 0.0

    def run(self) -> int:
        """Run all parts, writing the file after each and at intervals; returns the exit status."""
        worker = self._new_worker()
        source = worker.ask({"part": "provenance"}, _CASE_SECONDS)
        if source.pop("status") != "ok":
            raise SystemExit(f"the first process on {self.device} failed: {source['reason']}")
        self.report["provenance"] = source | {"commit": self.commit or source["commit"]}
        print(machine(self.report["provenance"]))
        print(f"Triton {source['triton']}, transformers {source['transformers']}, at most {self.seconds:.0f} s")
        if self.device == "cpu":
            print("no GPU: kernels run in Triton's interpreter at small sizes, and times say nothing about a GPU")
        try:
            for part in self.parts:
                started = time.monotonic()
                self._correctness(worker) if part == "correctness" else self._speed(part, worker)
                counts = Counter(row["status"] for row in self.report["rows"][part] if row)
                self.report["parts"][part] = {"seconds": round(time.monotonic() - started, 1), **counts}
                self._write()
        finally:
            worker.close()
        self.report["complete"] = True
        self._write()
        for line in table(self.report):
            print(line)
        print(f"written: {self.out}")
        return exit_status(self.report)

    def _new_worker(self):
        return InThisProcess(self.device) if self.workers == 0 else Worker(self.device)

    def _left(self, part: str) -> float:
        return self.begin + SHARES[self.device][part] * self.seconds - time.monotonic()

    def _correctness(self, first) -> None:
        cases = [candidate for candidate in correctness_cases(self.device == "cpu") if self.only in candidate.name]
        rows = self.report["rows"]["correctness"] = [None] * len(cases)
        count = 1 if self.workers == 0 else min(self.workers or self._default_workers(), max(1, len(cases)))
        workers = [first, *(self._new_worker() for _ in range(count - 1))]

        def report(number, answer):
            rows[number] = {"name": cases[number].name, "case": asdict(cases[number]), **answer}
            self._show(rows[number])
            self._write_at_times()

        requests = [{"part": "correctness", "case": asdict(case)} for case in cases]
        run_all(requests, workers, lambda: self._left("correctness"), _CASE_SECONDS, report)
        for worker in workers[1:]:
            worker.close()

    def _default_workers(self) -> int:
        source = self.report["provenance"]
        if self.device == "cpu":
            return min(_MOST_WORKERS, source["cores"])
        # Most of the time is compilation, on the CPU.
        return max(1, min(_MOST_WORKERS, source["cores"] // 2, source["gpu_memory_mb"] // _WORKER_MEGABYTES))

    def _speed(self, part: str, worker) -> None:
        rows = self.report["rows"][part] = []
        for timing in timings(self.device):
            if timing.kind != part or self.only not in timing.name:
                continue
            remaining, predicted = self._left(part), foretell(timing, rows)
            if predicted > _LONGEST_SECONDS:
                answer = {"status": "skipped", "reason": f"would take about {predicted:.0f} s"}
            else:
                answer = ask_in_time(worker, {"part": "speed", "case": asdict(timing)}, remaining, _CASE_SECONDS)
            rows.append({"name": timing.name, "case": asdict(timing), "work": timing.work(), **answer})
            self._show(rows[-1])
            # Whoever stops the run, or loses the machine, keeps what was timed.
            self._write_at_times()

    def _show(self, row: dict) -> None:
        """Print the first failures as they occur."""
        if row["status"] in ("ok", "skipped"):
            return
        self.shown += 1
        if self.shown <= _SHOWN_FAILURES:
            print(f"{row['status'].upper()}: {row['name']}: {reason(row)}", flush=True)
            for line in row.get("trace", []):
                print(f"    {line}")
        elif self.shown == _SHOWN_FAILURES + 1:
            print("more failures are in the file", flush=True)

    def _write_at_times(self) -> None:
        if time.monotonic() - self.written > _WRITE_EVERY:
            self._write()

    def _write(self) -> None:
        self.written = time.monotonic()
        rows = {part: [row for row in rows if row] for part, rows in self.report["rows"].items()}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.out, {**self.report, "seconds": round(self.written - self.begin, 1), "rows": rows})


def reason(row: dict) -> str:
    """Return why a row is not ok."""
    if row["status"] != "wrong":
        return row["reason"]
    failures = row.get("failures") or [{"what": "output", **row["check"]}]
    return "; ".join(f"{f.get('what', '')} {_short(f['error'])} > {_short(f['bound'])}" for f in failures)


def _short(value) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def foretell(timing, rows: list[dict]) -> float:
    """Predict the seconds of a timing's calls from the same at the length before; 0 if there is none."""
    fields = ("kind", "metric", "p", "pass_name", "backend", "causal", "part_entries")
    case = asdict(timing)
    earlier = [row for row in rows if "ours" in row and all(row["case"][name] == case[name] for name in fields)]
    if not earlier:
        return 0.0
    return _CALLS * earlier[-1]["ours"]["median"] * timing.work() / earlier[-1]["work"]


def exit_status(report: dict) -> int:
    """Return 1 if a correctness case was wrong or failed, or a timed result was wrong, else 0."""
    rows = report["rows"]
    failures = [row for row in rows.get("correctness", []) if row["status"] in ("wrong", "failed")]
    return int(bool(failures or any(row["status"] == "wrong" for part in rows.values() for row in part)))


def table(report: dict):
    """Yield the lines of the report: correctness by path, metric and dtype; then every timing."""
    groups: dict[tuple, list[dict]] = {}
    for row in report["rows"].get("correctness", []):
        case = row["case"]
        label = case["metric"] if case["p"] is None else f"{case['metric']}{case['p']:g}"
        groups.setdefault((case["path"], label, case["dtype"]), []).append(row)
    if groups:
        yield f"{'path':<10}{'metric':<20}{'dtype':<10}{'ok':>8}{'error / bound':>16}"
    for (path, label, dtype), rows in sorted(groups.items()):
        num_ok = sum(row["status"] == "ok" for row in rows)
        shares = [r["error"] / r["bound"] for r in rows if isinstance(r.get("error"), float) and r["bound"]]
        skipped = sum(row["status"] == "skipped" for row in rows)
        note = (f"  {skipped} skipped" if skipped else "") + ("" if num_ok + skipped == len(rows) else "  <- NOT OK")
        worst = f"{max(shares):.2f}" if shares else "-"
        yield f"{path:<10}{label:<20}{dtype:<10}{f'{num_ok}/{len(rows)}':>8}{worst:>16}{note}"
    for part in PARTS[1:]:
        rows = report["rows"].get(part, [])
        if rows:
            yield f"{part:<46}{'ms':>10}{'peer ms':>10}{'ours / peer [p10-p90]':>24}{'MB':>9}{'peer MB':>9}"
        for row in rows:
            if row["status"] != "ok":
                yield f"{row['name']:<46} {row['status']}: {reason(row)}"
                continue
            ours, peer = (f"{1e3 * row[name]['median']:.3f}" for name in ("ours", "peer"))
            ratio = "{median:.2f} [{p10:.2f}-{p90:.2f}]".format(**row["ratio"])
            memory = [f"{row['megabytes'][name]:.0f}" if row["megabytes"] else "-" for name in ("ours", "peer")]
            target = "" if row.get("target") is None else f"  target {row['target']:.2f}"
            yield f"{row['name']:<46}{ours:>10}{peer:>10}{ratio:>24}{memory[0]:>9}{memory[1]:>9}{target}"
    for part, counts in report["parts"].items():
        yield f"{part}: " + ", ".join(f"{value:g} {name}" for name, value in counts.items())


def _arguments(words: list[str] | None) -> argparse.Namespace:
    folder = Path(os.environ.get("OUT") or "out")
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=folder / "gpu_check.json", help="JSON; default $OUT or out/")
    parser.add_argument("--seconds", type=float, help=f"time for all; default {SECONDS}")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--workers", type=int, help="processes of the correctness part; 0: this process, to debug")
    parser.add_argument("--commit", help="what to record where git is not at hand")
    arguments = parser.parse_args(words)
    arguments.parts = arguments.parts.split(",")
    for part in arguments.parts:
        if part not in PARTS:
            parser.error(f"--parts: expected some of {', '.join(PARTS)}, got {part!r}")
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.seconds is not None and not arguments.seconds > 0:
        parser.error(f"--seconds must be > 0, got {arguments.seconds}")
    if arguments.workers is not None and arguments.workers < 0:
        parser.error(f"--workers must be >= 0, got {arguments.workers}")
    if arguments.device == "cpu" and arguments.workers == 0 and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--workers 0 without a GPU needs TRITON_INTERPRET=1")
    return arguments


def main(words: list[str] | None = None) -> int:
    """Run the check that the command line asks for; returns the exit status."""
    return GpuCheck(_arguments(words)).run()


if __name__ == "__main__":
    sys.exit(main())
