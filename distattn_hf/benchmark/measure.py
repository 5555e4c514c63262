"""Time and peak memory of one call, for `distattn benchmark`.

CPU memory is measured in a separate process, whose main program is the benchmark's module: it reads one case per line
from standard input and answers each from a fresh fork.
"""

import contextlib
import ctypes
import gc
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from logging import ERROR, getLogger
from pathlib import Path

import torch

from ..analysis.monitor import resident_bytes

# Least length of a sample, by repeating the call: clocks and scheduling have milliseconds of noise.
SAMPLE_SECONDS = 5e-3
_MOST_CALLS = 10_000


@contextlib.contextmanager
def only_errors(*libraries: str):
    """Keep back these libraries' warnings meanwhile; a decorator as well. The levels that they had come back."""
    levels = {logger: logger.level for logger in map(getLogger, libraries)}
    for logger in levels:
        logger.setLevel(ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def one_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def spread(values: list[float]) -> dict[str, float]:
    """Return {"median", "p10", "p90"}, percentiles interpolated between neighbours."""
    ordered = sorted(values)

    def percentile(share):
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return {"median": statistics.median(ordered), "p10": percentile(0.1), "p90": percentile(0.9)}


def _sample(call: Callable, calls: int, device: str) -> float:
    """Return seconds per call over `calls` calls: by the clock on CPU, by events on the stream on CUDA."""
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def _warm_up(call: Callable, device: str, warmup: int, deadline: float) -> int:
    """Call it `warmup` times, at least once, unless the deadline passes; returns how many calls make one sample."""
    seconds = _sample(call, 1, device)
    for _ in range(warmup - 1):
        if time.perf_counter() > deadline:
            break
        seconds = _sample(call, 1, device)
    calls = 1
    # A single short call reads slow, so measure again with the number of calls it suggests.
    for _ in range(2):
        suggested = max(1, min(_MOST_CALLS, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9))))
        if suggested <= calls:
            break
        calls, seconds = suggested, _sample(call, suggested, device)
    return calls


def timed_call(attention: Callable, leaves: tuple[torch.Tensor, ...], upstream: torch.Tensor | None) -> Callable:
    """Return the timed call: a forward pass without gradient, or with `upstream` forward and backward to the leaves."""
    if upstream is not None:
        return lambda: torch.autograd.grad(attention(*leaves), leaves, upstream)

    def forward():
        with torch.no_grad():
            return attention(*leaves)

    return forward


def time_pair(
    first: Callable, second: Callable, device: str, *, repeats: int, warmup: int, min_seconds: float,
    max_seconds: float, seed: int = 0,
) -> dict:  # fmt: skip
    """Time two calls back to back, in random order, and divide: {"first", "second", "ratio", "pairs"}.

    `first` and `second` are seconds per call, `ratio` is second / first within a pair; each has its median, 10th and
    90th percentile over the pairs. A temporary slowdown of the machine affects both halves of a pair.
    """
    generator = random.Random(seed)
    pair = (first, second)
    begin = time.perf_counter()
    calls = [_warm_up(call, device, warmup, begin + max_seconds) for call in pair]
    samples = []
    collecting = gc.isenabled()
    gc.disable()
    start = time.perf_counter()
    try:
        while True:
            order = [0, 1]
            generator.shuffle(order)
            sample = {i: _sample(pair[i], calls[i], device) for i in order}
            samples.append((sample[0], sample[1]))
            now = time.perf_counter()
            if now - begin >= max_seconds or (len(samples) >= repeats and now - start >= min_seconds):
                break
    finally:
        if collecting:
            gc.enable()
    return {
        "first": spread([a for a, _ in samples]),
        "second": spread([b for _, b in samples]),
        "ratio": spread([b / a for a, b in samples]),
        "pairs": len(samples),
    }


def ratio_with_spread(timed: dict) -> str:
    """Return what `time_pair` found, "1.25 x [1.10-1.40 in 5 pairs]": median, 10th and 90th percentile of the ratio.

    Where these are more than half apart, the words say so: the machine was busy.
    """
    ratio = timed["ratio"]
    busy = "; other work on the machine: run it again" if ratio["p90"] > 1.5 * ratio["p10"] else ""
    return f"{ratio['median']:.2f} x [{ratio['p10']:.2f}-{ratio['p90']:.2f} in {timed['pairs']} pairs{busy}]"


def _cpu_peak(call: Callable) -> int:
    """Return the largest rise in bytes of this process's resident memory during one call.

    Uses the kernel's high-water mark, reset before the call, after returning freed memory to the kernel (the call would
    reuse it unseen). Where the mark cannot be reset, `getrusage` gives the peak since the process began, which was that
    of the small warm-up.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc
    try:
        Path("/proc/self/clear_refs").write_text("5")
        baseline = resident_bytes("VmRSS")
        result = call()
        peak = resident_bytes("VmHWM")
    except (OSError, KeyError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        baseline = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = call()
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del result
    return max(0, peak - baseline)


def _cuda_peak(call: Callable) -> int:
    """Return the largest rise in bytes of memory allocated by CUDA's allocator during one call."""
    call()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    baseline = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return peak - baseline


def peak_megabytes(call: Callable, device: str) -> float:
    """Return the megabytes (10⁶ bytes) that one call takes at its peak above those before; its result counts."""
    gc.collect()
    return (_cuda_peak if device == "cuda" else _cpu_peak)(call) / 1e6


class MemoryProbe:
    """Measures CPU memory in another process, in a fresh fork for every call, so that no earlier allocation counts.

    A metric or backend registered at run time is unknown there: `measure` then returns the reason instead of a number.

    Args:
        benchmark: a subclass of `Benchmark`, which defines the call. Its module calls `serve` as the main program.
        threads: CPU threads of PyTorch there; None: its own choice.
    """

    def __init__(self, benchmark: type, threads: int | None = None):
        self._benchmark, self._threads, self._process, self._known = benchmark, threads, None, {}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):  # It has already ended.
                self._process.stdin.close()
            self._process.wait()

    def measure(self, case, competitor: str, ran: str | None = None) -> float | str:
        """Return megabytes as in `Benchmark.measure_memory`, or the reason why there is no number."""
        key = self._benchmark.memory_key(case, competitor, ran)
        if key not in self._known:
            self._known[key] = self._measure(case, competitor, ran)
        return self._known[key]

    def _measure(self, case, competitor, ran):
        if case.device == "cuda":
            try:
                return self._benchmark.measure_memory(case, competitor, ran)
            except (RuntimeError, ValueError) as error:
                return one_line(error)
        if not hasattr(os, "fork"):
            return "this system has no fork"
        if self._process is None:
            command = [sys.executable, "-m", self._benchmark.__module__]
            # The same package, even if it is imported from a folder and not installed.
            path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
            environment = {**os.environ, "PYTHONPATH": path}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._process = subprocess.Popen(command, **pipes, text=True, env=environment)
        request = {"case": asdict(case), "competitor": competitor, "ran": ran, "threads": self._threads}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else "the measuring process ended"


def serve(benchmark: type) -> None:
    """Answer each line of standard input from a fork of this process, which itself never computes anything."""
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Output of compilers or libraries must not look like an answer.
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                answers.write(json.dumps(_answer(json.loads(line), benchmark)) + "\n")
                answers.flush()
                status = 0
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            answers.write(json.dumps(f"the measuring process ended with status {status}") + "\n")
            answers.flush()


def _answer(request: dict, benchmark: type) -> float | str:
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    try:
        return benchmark.measure_memory(benchmark.Case(**request["case"]), request["competitor"], request["ran"])
    except Exception as error:
        return one_line(error)
