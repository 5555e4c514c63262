"""Run `distattn benchmark`: check, then measure; print rows as they come, write the JSON file and the plots."""

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

# Word before the reason in the line of a row without times.
_WORDS = {"skipped": "skipped:", "absent": "-", "failed": "FAILED:"}


class Unavailable(Exception):
    """A competitor cannot run a case; the message is its cell in the table."""


class Benchmark(ABC):
    """The benchmark of one mechanism and its output; one subclass per mechanism.

    Attributes:
        Config, Case: dataclasses; a config has the fields of `fields.check_shared` and the method `cases`.
        about: first entries of benchmark.json.
        definitions: meaning of the numbers in benchmark.json; written into it.
        columns, numbers: (title, width, text of a row) of the table; the numbers are shown if the check passed.
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
        """Print a line for each row and write benchmark.json after each; returns the report.

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
        # Garbage is collected after every row: exclude objects from imports, which take 0.2 s each time.
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
        measured = [row for row in report["results"] if row["status"] == "ok"]
        if config.plot and measured:
            written += plot_results({"results": self.plotted(measured), "provenance": report["provenance"]}, folder)
        echo("wrote " + ", ".join(map(str, written)))
        return report

    # What a mechanism says -------------------------------------------------------------------------------------------

    @abstractmethod
    def headline(self) -> str:
        """Describe the run, above the table."""

    @abstractmethod
    def start(self, case, name: str) -> dict:
        """Return the entries of a row that are known before anything runs, "label" first."""

    @abstractmethod
    def check(self, case, name: str, row: dict) -> None:
        """Put the verdict of the check (`summary`) into the row as "gate", if there is a check.

        Raises `Unavailable` where the competitor cannot run the case.
        """

    @abstractmethod
    def measure(self, case, name: str, row: dict) -> dict:
        """Return the entries with times and memory; runs after the check passed."""

    @classmethod
    @abstractmethod
    def call(cls, case, name: str) -> Callable[[], object]:
        """Return the timed call on its own inputs: a forward pass, or a forward and a backward pass."""

    @classmethod
    @abstractmethod
    def short(cls, case, name: str, ran: str | None):
        """Return a case on short inputs, whose call loads and compiles whatever the case itself needs."""

    def competitors(self, case) -> list[str]:
        """Return the competitors, one row each."""
        return ["ours"]

    def footnotes(self, results: list[dict]) -> list[str]:
        """Return the lines below the table."""
        return []

    def plotted(self, rows: list[dict]) -> list[dict]:
        """Return the rows for `plot_results`, in its format."""
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
            return {**row, "status": "ok", **with_tokens(self.measure(case, name, row), case)}
        except Unavailable as reason:
            return {**row, "status": self.unavailable, "reason": str(reason)}
        except Exception as error:  # One case out of memory must not end a run of hours; the exit code tells.
            return {**row, "status": "failed", "reason": one_line(error)}
        finally:
            gc.collect()
            if case.device == "cuda":
                torch.cuda.empty_cache()

    def line(self, row: dict) -> str:
        """Format one row as a line: times only if the check passed; otherwise WRONG, or a word and the reason."""
        start = aligned([(str(text(row)), width) for _, width, text in self.columns])
        if row["status"] == "wrong":
            error, bound, *worst = (row["gate"][key] for key in ("error", "bound", "worst") if key in row["gate"])
            return f"{start} WRONG (error {short(error)} > {short(bound)}{''.join(f'; {note}' for note in worst)})"
        if row["status"] in _WORDS:
            return f"{start} {_WORDS[row['status']]} {row['reason']}"
        return " ".join([start, *(f"{text(row):>{width}}" for _, width, text in self.numbers)])

    def time(self, first: Callable, second: Callable, **changes) -> dict:
        """Run `time_pair` within the limits of the config, some of them changed."""
        limits = {n: getattr(self.config, n) for n in ("repeats", "warmup", "min_seconds", "max_seconds", "seed")}
        return time_pair(first, second, self.config.device, **{**limits, **changes})

    def memory_of(self, case, name: str) -> dict:
        """Return {"memory": megabytes or None} and, if a requested number is missing, "memory_error": the reason."""
        if self.probe is None:
            return {"memory": None}
        measured = self.probe.measure(case, name) if case.device == "cpu" else "measured on CPU only"
        return {"memory": measured} if isinstance(measured, float) else {"memory": None, "memory_error": measured}

    @staticmethod
    def memory_key(case, name: str, ran: str | None):
        """Return the key that memory depends on: equal keys are measured once."""
        return case, name, ran

    @classmethod
    def measure_memory(cls, case, name: str, ran: str | None = None) -> float:
        """Return the megabytes (10⁶ bytes) of one call at its peak above its inputs; its result and gradients count.

        A first call on short inputs, with the backend `ran`, excludes code that is compiled or loaded at first use. On
        CPU the process must have done nothing else (see `MemoryProbe`).
        """
        cls.call(cls.short(case, name, ran), name)()
        return peak_megabytes(cls.call(case, name), case.device)


def summary(checks: list[dict]) -> dict:
    """Summarise checks {"what", "error", "bound"} in a verdict; NaN, infinity and an empty list fail."""
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
    """Return 0 if every case that could run was right and measured; 1 if one was wrong or failed, or none could run."""
    states = {row["status"] for row in report["results"]}
    return 0 if "ok" in states and not states & {"wrong", "failed"} else 1


def with_tokens(measured: dict, case) -> dict:
    """Add "tokens_per_second" to what was measured of a case: its queries by the median time of a call."""
    queries = case.batch * (1 if case.pass_name == "decode" else case.length)
    times = measured["ours"] if "ours" in measured else measured["seconds"]
    return {**measured, "tokens_per_second": queries / times["median"]}


def plot_row(row: dict, backend: str, sdpa: dict | None, sdpa_memory: float | None = None) -> dict:
    """Convert a row with "seconds" and "memory" for `plot_results`; `sdpa`: seconds of PyTorch's attention."""
    return {
        **{name: row[name] for name in ("label", "pass", "length", "causal", "head_size", "status")},
        "dtype": "float32", "backend": backend, "ours": row["seconds"], "sdpa": sdpa,
        "memory": {"ours": row["memory"], "sdpa": sdpa_memory}, "naive": {"absent": "off"},
    }  # fmt: skip


def named_columns(title: str, width: int) -> tuple:
    """Return the columns of a table whose rows differ in a name, the pass, causality and the length."""
    return (
        (title, width, lambda r: r["label"]),
        ("pass", 16, lambda r: r["pass"]),
        ("causal", 6, lambda r: "yes" if r["causal"] else "no"),
        ("N", 6, lambda r: r["length"]),
    )


def cell(text: str, read: Callable[[dict], float | None]) -> Callable[[dict], str]:
    """Return a function that formats a row's number by the format `text`; a dash if `read` finds none."""

    def write(row):
        try:
            value = read(row)
        except KeyError:
            value = None
        return "-" if value is None else format(value, text)

    return write


def memory_cell(row: dict) -> str:
    """Format megabytes; n/a if they could not be measured."""
    return "n/a" if "memory_error" in row else cell(".1f", lambda r: r["memory"])(row)


# Columns that several tables share, and their meaning.
MILLISECONDS = ("ms", 10, cell(".2f", lambda r: 1e3 * r["seconds"]["median"]))
TOKENS = ("tokens/s", 11, cell(",.0f", lambda r: r["tokens_per_second"]))
GROWTH = ("x2 N", 6, cell(".2f", lambda r: r["growth"]))
MEGABYTES = ("MB", 8, memory_cell)
MEANING = {
    "tokens_per_second": "queries / the median of the seconds of a call, in all sequences and of one layer's attention",
    "growth": "factor of the time for each doubling of the length, since the length before: 2 where time is linear",
    "memory": "10^6 bytes at the peak of one call, above its inputs; the output (and gradients) count; on CPU",
}
