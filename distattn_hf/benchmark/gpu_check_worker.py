"""Processes that run the cases of the GPU check, so that one that dies, hangs or poisons its GPU affects no other.

`python -m distattn_hf.benchmark.gpu_check_worker DEVICE` reads one request per line from standard input and answers
each with a line of JSON. `Worker` is the other end.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from . import gpu_check_cases, gpu_check_speed
from .measure import one_line
from .results import provenance

# Extra time for the first answer: imports and GPU start.
_START_SECONDS = 90
_TRACE_LINES = 8


class Worker:
    """One process, started at the first request and again after it ended; `command` replaces it in tests."""

    def __init__(self, device: str, command: list[str] | None = None):
        self._command = command or [sys.executable, "-m", __name__, device]
        self._environment = dict(os.environ)
        # The same package, even if it is imported from a folder and not installed.
        package = str(Path(__file__).parents[2])
        self._environment["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        if device == "cpu":
            self._environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self._process, self._answers = None, None

    def ask(self, request: dict, timeout: float) -> dict:
        """Return the answer; {"status", "reason"} with "late" after `timeout` seconds, "failed" if the process died."""
        if self._process is None:
            self._start()
            timeout += _START_SECONDS
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.close()
            return {"status": "late", "reason": f"no answer within {timeout:.0f} s; the process was ended"}
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            self.close()
            return {"status": "failed", "reason": f"the process ended with status {status}"}
        answer = json.loads(line)
        if answer.pop("last", False):
            self.close()
        return answer

    def _start(self):
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
        )
        self._answers = answers = queue.Queue()
        stream = self._process.stdout

        def read():
            for line in stream:
                answers.put(line)
            answers.put("")

        threading.Thread(target=read, daemon=True).start()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin = None
            self._process = None


class InThisProcess:
    """`Worker` without another process, for debugging."""

    def __init__(self, device: str):
        self._device = device

    def ask(self, request: dict, timeout: float) -> dict:
        answer = answer_to(request, self._device)
        answer.pop("last", None)
        return answer

    def close(self) -> None:
        """Do nothing; there is no process."""


def ask_in_time(worker, request: dict, left: float, timeout: float) -> dict:
    """Return the answer; "skipped" if the time `left` for all was too short, "failed" if the case took `timeout`."""
    if left <= 0:
        return {"status": "skipped", "reason": "time"}
    answer = worker.ask(request, min(timeout, left))
    if answer["status"] != "late":
        return answer
    return {"status": "skipped", "reason": "time"} if left < timeout else {**answer, "status": "failed"}


def run_all(requests: list[dict], workers: list, seconds_left: Callable[[], float], timeout: float, report: Callable):
    """Distribute the requests to free workers; `report(number, answer)` is called in this thread.

    When `seconds_left()` is used up, requests not yet started are skipped and running ones are ended.
    """
    todo, done = queue.Queue(), queue.Queue()
    for number in range(len(requests)):
        todo.put(number)

    def work(worker):
        while True:
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            try:
                answer = ask_in_time(worker, requests[number], seconds_left(), timeout)
            except Exception as error:  # The thread must go on: the caller waits for all requests.
                answer = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
            done.put((number, answer))

    for worker in workers:
        threading.Thread(target=work, args=(worker,), daemon=True).start()
    for _ in requests:
        report(*done.get())


def answer_to(request: dict, device: str) -> dict:
    """Answer a request: {"part": "correctness" or "speed", "case": fields}, or {"part": "provenance"}."""
    try:
        answer = _run(request, device)
    except Exception as error:
        trace = traceback.format_exc().splitlines()[-_TRACE_LINES:]
        answer = {"status": "failed", "reason": one_line(error), "trace": trace}
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            # After an illegal access this process cannot use the GPU any more.
            answer |= {"status": "failed", "reason": answer.get("reason", one_line(error)), "last": True}
    return answer


def _run(request: dict, device: str) -> dict:
    if request["part"] == "provenance":
        return {"status": "ok", **_provenance(device)}
    if request["part"] == "correctness":
        result = gpu_check_cases.check(gpu_check_cases.Case(**request["case"]), device)
        return {"status": "ok" if result["passed"] else "wrong", **result}
    return gpu_check_speed.measure(gpu_check_speed.Timing(**request["case"]), device)


def _provenance(device: str) -> dict:
    source = provenance(device)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        source |= {
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_mb": properties.total_memory // 10**6,
        }
    return source


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Output of compilers or libraries must not look like an answer.
    for line in sys.stdin:
        answers.write(json.dumps(answer_to(json.loads(line), sys.argv[1])) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
