"""A run of `distattn benchmark`: the check before the clock, rows as they come, the table, the JSON file, the plot."""

import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict

import torch

from ..storage.folders import check_output, write_json
from .measure import MemoryProbe, one_line, peak_megabytes, time_pair
from .plot import plot_results, require_matplotlib
from .results import aligned, machine, provenance, short, with_growth

# What the line of a row without times says before the reason.
_WORDS = {"skipped": "skipped:", "absent": "-", "failed": "FAILED:"}


class Unavailable(Exception):
    """A competitor cannot run a case; the message is its cell in the table."""


class Benchmark(ABC):
    """What is measured for one mechanism, and how it is said; a subclass a mechanism.

    Attributes:
        Config, Case: dataclasses; a config has the fields of `fields.check_shared` and the method `cases`.
        about: first entries of benchmark.json.
        definitions: what the numbers of benchmark.json mean; written into it.
        columns, numbers: (title, width, text of a row) of the table; the numbers stand where the check passed.
        unavailable: the status of a competitor that cannot run a case.
    """

    Config: type
    Case: type
    about: dict = {}
    definitions: dict
    columns: tuple
    numbers: tuple
    unavailable = "absent"

    def __init__(self, config):
        self.config, self.probe = config, None

    def run(self, *, overwrite: bool = False, echo: Callable = print) -> dict:
        """Print a line for each row and write benchmark.json after each; returns what was written.

        Raises `ValueError` before anything runs for an output folder that is not empty (unless `overwrite`) and for a
        plot without matplotlib. A run that is interrupted leaves the rows so far in benchmark.json, with "complete":
        false.
        """
        config = self.config
        if config.plot:
            require_matplotlib()
        folder = check_output(config.out, overwrite, marker=None)
        folder.mkdir(parents=True, exist_ok=True)
        threads = torch.get_num_threads()
        # Garbage is collected after every row: leave what the imports made out of it, 0.2 s a time.
        gc.freeze()
        try:
            if config.threads:
                torch.set_num_threads(config.threads)
            report = {
                "schema": 1,
                **self.about,
                "complete": False,
                "provenance": provenance(config.device),
                "config": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()},
                "definitions": self.definitions,
                "results": [],
            }
            echo(f"{machine(report['provenance'])}\n{self.headline()}")
            echo(aligned([(title, width) for title, width, _ in (*self.columns, *self.numbers)]))
            probe = MemoryProbe(type(self), torch.get_num_threads()) if config.memory else nullcontext()
            with probe as self.probe:
                for case in config.cases():
                    for row in self.rows(case):
                        report["results"].append(with_growth(row, report["results"]))
                        write_json(folder / "benchmark.json", report)
                        echo(self.line(row))
            report["complete"] = True
            write_json(folder / "benchmark.json", report)
        finally:
            gc.unfreeze()
            torch.set_num_threads(threads)
        for note in self.footnotes(report["results"]):
            echo(note)
        written = [folder / "benchmark.json"]
        done = [row for row in report["results"] if row["status"] == "ok"]
        if config.plot and done:
            written += plot_results({"results": self.plotted(done), "provenance": report["provenance"]}, folder)
        echo("wrote " + ", ".join(map(str, written)))
        return report

    # What a mechanism says -------------------------------------------------------------------------------------------

    @abstractmethod
    def headline(self) -> str:
        """What was run, above the table."""

    @abstractmethod
    def start(self, case, name: str) -> dict:
        """The entries of a row that are known before anything runs; "label" is the first of them."""

    @abstractmethod
    def check(self, case, name: str, row: dict) -> None:
        """Put the verdict of the check (`summary`) into the row as "gate", where there is one.

        Raises `Unavailable` where the competitor cannot run the case.
        """

    @abstractmethod
    def measure(self, case, name: str, row: dict) -> dict:
        """The entries with times and memory; runs after the check passed."""

    @classmethod
    @abstractmethod
    def call(cls, case, name: str) -> Callable[[], object]:
        """What is timed, on inputs of its own: one forward pass, or a forward and a backward pass."""

    @classmethod
    @abstractmethod
    def short(cls, case, name: str, ran: str | None):
        """A case on short inputs, whose call loads and compiles what the case itself needs."""

    def competitors(self, case) -> list[str]:
        """Who is measured, a row each."""
        return ["ours"]

    def footnotes(self, results: list[dict]) -> list[str]:
        """Lines below the table."""
        return []

    def plotted(self, rows: list[dict]) -> list[dict]:
        """The rows that `plot_results` draws, in its form."""
        return rows

    # What all have in common -----------------------------------------------------------------------------------------

    def rows(self, case) -> Iterator[dict]:
        """Yield a row for each competitor."""
        for name in self.competitors(case):
            yield self.row(case, name)

    def row(self, case, name: str) -> dict:
        """Check one competitor, then measure it; "status" is ok, wrong, failed, or `unavailable`."""
        row = self.start(case, name)
        try:
            self.check(case, name, row)
            if "gate" in row and not row["gate"]["passed"]:
                return {**row, "status": "wrong"}
            return {**row, "status": "ok", **self.measure(case, name, row)}
        except Unavailable as reason:
            return {**row, "status": self.unavailable, "reason": str(reason)}
        except Exception as error:  # One case out of memory must not end a run of hours; the exit code tells.
            return {**row, "status": "failed", "reason": one_line(error)}
        finally:
            gc.collect()
            if case.device == "cuda":
                torch.cuda.empty_cache()

    def line(self, row: dict) -> str:
        """One row in a line: times only where the check passed; otherwise WRONG, or a word and the reason."""
        start = aligned([(str(text(row)), width) for _, width, text in self.columns])
        if row["status"] == "wrong":
            error, bound, *worst = (row["gate"][key] for key in ("error", "bound", "worst") if key in row["gate"])
            return f"{start} WRONG (error {short(error)} > {short(bound)}{''.join(f'; {what}' for what in worst)})"
        if row["status"] in _WORDS:
            return f"{start} {_WORDS[row['status']]} {row['reason']}"
        return " ".join([start, *(f"{text(row):>{width}}" for _, width, text in self.numbers)])

    def time(self, first: Callable, second: Callable, **changes) -> dict:
        """`time_pair` within the limits of the config, some of them changed."""
        limits = {n: getattr(self.config, n) for n in ("repeats", "warmup", "min_seconds", "max_seconds", "seed")}
        return time_pair(first, second, self.config.device, **{**limits, **changes})

    def memory_of(self, case, name: str) -> dict:
        """{"memory": megabytes or None} and, where a number was asked for and is not there, "memory_error": why."""
        if self.probe is None:
            return {"memory": None}
        found = self.probe.measure(case, name) if case.device == "cpu" else "measured on CPU only"
        return {"memory": found} if isinstance(found, float) else {"memory": None, "memory_error": found}

    @staticmethod
    def memory_key(case, name: str, ran: str | None):
        """What memory depends on: equal keys are measured once."""
        return case, name, ran

    @classmethod
    def measure_memory(cls, case, name: str, ran: str | None = None) -> float:
        """Megabytes (10⁶ bytes) that one call takes at its peak beyond its inputs; its result and gradients count.

        Before, everything runs once on short inputs, with the backend `ran`: code that is compiled or loaded at first
        use is not counted. On CPU this must be a process that has done nothing else (see `MemoryProbe`).
        """
        cls.call(cls.short(case, name, ran), name)()
        return peak_megabytes(cls.call(case, name), case.device)


def summary(checks: list[dict]) -> dict:
    """The verdict over checks {"what", "error", "bound"}; NaN and infinity fail, and so does an empty list."""
    if not checks:
        return {"passed": False, "worst": "nothing was checked", "error": None, "bound": None, "checks": 0}

    def badness(check):
        return check["error"] / check["bound"] if math.isfinite(check["error"]) and check["bound"] > 0 else math.inf

    worst = max(checks, key=badness)
    return {
        "passed": badness(worst) <= 1,
        "worst": worst["what"],
        "error": worst["error"] if math.isfinite(worst["error"]) else str(worst["error"]),
        "bound": worst["bound"],
        "checks": len(checks),
    }


def exit_code(report: dict) -> int:
    """0: every case that could run was right and measured; 1: one was wrong or failed, or none could run."""
    states = {row["status"] for row in report["results"]}
    return 0 if "ok" in states and not states & {"wrong", "failed"} else 1


def plot_row(row: dict, backend: str, sdpa: dict | None, sdpa_memory: float | None = None) -> dict:
    """A row with "seconds" and "memory" in the form of `plot_results`; `sdpa`: seconds of PyTorch's attention."""
    return {
        **{name: row[name] for name in ("label", "pass", "length", "causal", "head_size", "status")},
        "dtype": "float32", "backend": backend, "ours": row["seconds"], "sdpa": sdpa,
        "memory": {"ours": row["memory"], "sdpa": sdpa_memory}, "naive": {"absent": "off"},
    }  # fmt: skip


def named_columns(title: str, width: int) -> tuple:
    """The columns of a table whose rows differ in a name, the pass, causality and the length."""
    return (
        (title, width, lambda r: r["label"]),
        ("pass", 16, lambda r: r["pass"]),
        ("causal", 6, lambda r: "yes" if r["causal"] else "no"),
        ("N", 6, lambda r: r["length"]),
    )


def cell(text: str, read: Callable[[dict], float | None]) -> Callable[[dict], str]:
    """A number's text by its format; a dash where `read` finds none."""

    def write(row):
        try:
            value = read(row)
        except KeyError:
            value = None
        return "-" if value is None else format(value, text)

    return write


def memory_cell(row: dict) -> str:
    """Megabytes; n/a where they could not be measured."""
    return "n/a" if "memory_error" in row else cell(".1f", lambda r: r["memory"])(row)


# Numbers of more than one table, and what they mean.
MILLISECONDS = ("ms", 10, cell(".2f", lambda r: 1e3 * r["seconds"]["median"]))
GROWTH = ("x2 N", 6, cell(".2f", lambda r: r["growth"]))
MEGABYTES = ("MB", 8, memory_cell)
MEANING = {
    "growth": "factor of the time for each doubling of the length, since the length before: 2 where time is linear",
    "memory": "10^6 bytes at the peak of one call, above its inputs; the output (and gradients) count; on CPU",
}
