"""The GPU check itself, on the CPU: it sees a broken kernel, goes on after any failure, and leaves complete JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distattn_hf.benchmark import gpu_check, gpu_check_cases, gpu_check_retrieval, gpu_check_speed
from distattn_hf.benchmark.gpu_check_cases import Case, correctness_cases
from distattn_hf.benchmark.gpu_check_speed import Timing, measure, timings
from distattn_hf.benchmark.gpu_check_worker import Worker, run_all
from distattn_hf.core import backend_triton

ROOT = Path(__file__).parents[1]

# A kernel that is slightly wrong, one that fails, and the check in the same process.
BROKEN = """
import sys
from distattn_hf.benchmark import gpu_check
from distattn_hf.core import backend_triton

right = backend_triton._Attention.forward

def forward(ctx, *arguments):
    metric = arguments[-3]
    if metric == "lp":
        raise RuntimeError("out of resource: shared memory")
    output = right(ctx, *arguments)
    return output * 1.01 if metric == "chebyshev" else output

backend_triton._Attention.forward = staticmethod(forward)
sys.exit(gpu_check.main(sys.argv[1:]))
"""


def test_a_broken_kernel_is_reported_and_the_run_goes_on(tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "new" / "gpu_check.json"
    options = ["--device", "cpu", "--workers", "0", "--only", "float32 full 1x40", "--out", str(out), "--commit", "abc"]
    result = subprocess.run(
        [sys.executable, "-c", BROKEN, *options],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    report = json.loads(out.read_text())
    rows = report["rows"]["correctness"]
    assert [row["name"] for row in rows] == [c.name for c in correctness_cases(True) if options[5] in c.name]
    status = {(row["case"]["metric"], row["case"]["p"]): row["status"] for row in rows}
    assert status == {
        ("l2", None): "failed", ("l1", None): "ok", ("chebyshev", None): "wrong", ("lp", 3.0): "failed",
        ("lp", 1.5): "failed", ("lp", 2.2): "failed", ("sqeuclidean", None): "ok", ("cosine", None): "ok",
    }  # fmt: skip
    wrong = next(row for row in rows if row["status"] == "wrong")
    assert {f["what"].partition(",")[0] for f in wrong["failures"]} == {"output"}
    assert all(f["error"] > f["bound"] for f in wrong["failures"])
    failed = next(row for row in rows if row["status"] == "failed")
    assert "out of resource" in failed["reason"]
    assert "forward" in " ".join(failed["trace"])
    assert report["complete"]
    assert (report["device"], report["interpreter"]) == ("cpu", True)
    assert set(report["parts"]) == set(gpu_check.PARTS)
    assert report["provenance"]["commit"] == "abc"
    assert {"date", "torch", "triton", "transformers", "device"} <= set(report["provenance"])
    assert "WRONG: triton chebyshev float32 full 1x40" in result.stdout
    assert "Triton's interpreter" in result.stdout
    assert "NOT OK" in result.stdout


STUB = """
import json, sys, time
for line in sys.stdin:
    case = json.loads(line)["case"]
    if case == "dies":
        sys.exit(3)
    if case == "hangs":
        time.sleep(60)
    print(json.dumps({"status": "ok", "case": case}), flush=True)
"""


def run_stub(cases, left=lambda: 100.0, workers=1, timeout=20.0):
    answers = {}
    pool = [Worker("cpu", [sys.executable, "-c", STUB]) for _ in range(workers)]
    run_all([{"case": case} for case in cases], pool, left, timeout, answers.__setitem__)
    for worker in pool:
        worker.close()
    return [answers[i] for i in range(len(cases))]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_dies_spoils_no_other_case(workers):
    answers = run_stub(["a", "dies", "b", "dies", "c"], workers=workers)
    assert [a["status"] for a in answers] == ["ok", "failed", "ok", "failed", "ok"]
    assert answers[1]["reason"] == "the process ended with status 3"


def test_a_case_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr("distattn_hf.benchmark.gpu_check_worker._START_SECONDS", 0)
    answers = run_stub(["hangs", "a"], timeout=3.0)
    assert [a["status"] for a in answers] == ["failed", "ok"]
    assert "no answer within 3 s" in answers[0]["reason"]


def test_what_the_time_does_not_reach_is_said(monkeypatch):
    """Also a case that the end of the time cuts off: that is no failure of its own."""
    monkeypatch.setattr("distattn_hf.benchmark.gpu_check_worker._START_SECONDS", 0)
    assert run_stub(["a"], left=lambda: -1.0) == [{"status": "skipped", "reason": "time"}]
    assert run_stub(["hangs"], left=lambda: 2.0) == [{"status": "skipped", "reason": "time"}]


@pytest.mark.parametrize("interpreted", [False, True])
def test_cases_cover_every_kernel_and_dtype(interpreted):
    cases = correctness_cases(interpreted)
    assert len({case.name for case in cases}) == len(cases)
    for metric in backend_triton._KERNEL_METRICS.values():
        mine = [case for case in cases if case.path == "triton" and case.metric == metric]
        for dtype in ("float32", "bfloat16", "float16"):
            kinds = {(c.causal, c.mask, c.queries == 1, c.backward) for c in mine if c.dtype == dtype}
            assert {(True, None, False, True), (False, "padding", False, True), (False, None, True, False)} <= kinds
    assert {c.head_size for c in cases if c.path == "triton"} >= (set() if interpreted else {32, 40, 64, 128, 256})
    assert {c.path for c in cases} == {"triton", "sdpa", "chunked", "nystrom", "retrieval", "model", "paged"}


NYSTROM = {
    "landmarks": {"causal": True}, "near": {"causal": True, "window": 5, "sinks": 2}, "both": {"window": 5, "sinks": 2},
    "lifted, padded": {"lift": True, "mask": "padding", "sinks": 2}, "chosen": {"chosen": True, "lift": True},
}  # fmt: skip


@pytest.mark.parametrize("options", NYSTROM)
def test_nystrom_cases_hold_and_a_wrong_one_does_not(options, monkeypatch):
    case = Case("nystrom", "sqeuclidean", "float32", 21, 21, 8, heads=4, key_heads=2, **NYSTROM[options])
    assert gpu_check_cases.check(case, "cpu")["passed"]
    right = gpu_check_cases._nystrom

    def wrong(case, mask):
        return lambda query, **rest: right(case, mask)(query * 1.05, **rest)

    monkeypatch.setattr(gpu_check_cases, "_nystrom", wrong)
    assert not gpu_check_cases.check(case, "cpu")["passed"]


@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize("mask", [None, "padding"])
def test_retrieval_cases_hold_and_wrong_ones_do_not(metric, mask, monkeypatch):
    """Of blocks of alike keys, on two levels; wrong in what is computed, and in which keys are read."""
    case = next(
        c
        for c in correctness_cases(True)
        if (c.path, c.metric, c.dtype, c.mask, c.clustered) == ("retrieval", metric, "float32", mask, True)
    )
    assert gpu_check_cases.check(case, "cpu")["passed"]
    right, chosen = gpu_check_retrieval.run_retrieval, gpu_check_retrieval.visible_keys
    with monkeypatch.context() as patch:
        patch.setattr(gpu_check_retrieval, "run_retrieval", lambda problem: (right(problem)[0] * 1.001, None))
        assert {f["what"].partition(",")[0] for f in gpu_check_cases.check(case, "cpu")["failures"]} >= {"output"}

    def otherwise(problem):
        """Queries in float32, as on a device, choose for the token before them."""
        seen = chosen(problem)
        if problem.inputs.query.dtype == torch.float64:
            return seen
        return lambda start, stop: seen(start, stop).roll(4, dims=-1)

    monkeypatch.setattr(gpu_check_retrieval, "visible_keys", otherwise)
    failed = {failure["what"] for failure in gpu_check_cases.check(case, "cpu")["failures"]}
    assert "keys read otherwise than in float64" in failed
    assert len(failed) > 1


def test_paged_cases_hold_and_a_wrong_one_does_not(monkeypatch):
    (case,) = (c for c in correctness_cases(True) if (c.path, c.metric) == ("paged", "l2"))
    assert gpu_check_cases.check(case, "cpu")["passed"]
    right = LlamaForCausalLM.generate

    def wrong(self, ids, **options):
        return right(self, ids, **options).roll(1, dims=-1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", wrong)
    assert "tokens after prompt 0" in gpu_check_cases.check(case, "cpu")["failures"][0]["what"]


def test_what_was_timed_is_kept_when_a_run_is_stopped(tmp_path, monkeypatch):
    """The file is written while a part goes on, and each part's rows before the next."""

    class Stops:
        def __init__(self):
            self.asked = 0

        def ask(self, request, timeout):
            if request["part"] == "provenance":
                return {"status": "ok", "commit": None, "triton": "-", "transformers": "-", "torch": "-", "cpu": "-",
                        "cores": 1, "device": "-", "threads": 1}  # fmt: skip
            self.asked += 1
            if self.asked == 3:
                raise KeyboardInterrupt
            return {"status": "skipped", "reason": "a test"}

        def close(self):
            pass

    monkeypatch.setattr(gpu_check, "_WRITE_EVERY", -1.0)
    monkeypatch.setattr(gpu_check, "machine", lambda source: "")
    monkeypatch.setattr(gpu_check.GpuCheck, "_new_worker", lambda self: Stops())
    out = tmp_path / "check.json"
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--device", "cpu", "--parts", "exact,retrieval", "--out", str(out)])
    report = json.loads(out.read_text())
    assert not report["complete"]
    assert {part: len(rows) for part, rows in report["rows"].items()} == {"exact": 1, "retrieval": 1}


def test_targets_are_those_that_were_set():
    targets = {t.name: t.target for t in timings("cuda") if t.target is not None}
    assert targets["exact l2 forward 2048"] == pytest.approx(1 / 0.6)
    assert targets["exact cosine forward_backward 32768"] == pytest.approx(1 / 0.9)
    assert targets["retrieval decode 65536 parts of 268435456"] == 0.1
    assert targets["nystrom forward 65536"] == 0.2
    assert not [name for name in targets if " l1 " in name or "16384" in name or name.startswith("model")]
    rows = {"exact": [{"name": "a", "status": "ok", "ours": {"median": 1}, "peer": {"median": 1}, "megabytes": {},
                       "ratio": {"median": 1, "p10": 1, "p90": 1}, "target": 0.2}]}  # fmt: skip
    assert any(line.endswith("target 0.20") for line in gpu_check.table({"rows": rows, "parts": {}}))


@pytest.mark.parametrize("metric", gpu_check_cases.MODELS)
def test_small_models_hold(metric):
    case = Case("model", metric, "float32", 20, 20, 16, causal=True, backward=False)
    assert gpu_check_cases.check(case, "cpu")["passed"]


def test_timings_on_the_cpu(monkeypatch):
    monkeypatch.setattr(gpu_check_speed, "_MIN_SECONDS", 0.0)
    for timing in timings("cpu"):
        row = measure(timing, "cpu")
        assert row["status"] == "ok"
        assert row["ratio"]["median"] > 0
        if timing.kind == "exact":
            # 64 queries of two heads see 32 keys each on average, of 64 coordinates.
            assert row["coordinates_per_second"] * row["ours"]["median"] == pytest.approx(2 * 64 * 32 * 64)
    names = [timing.name for timing in timings("cuda")]
    assert len(set(names)) == len(names)


def test_models_are_timed_beside_the_untouched_one(monkeypatch):
    config = LlamaConfig(
        vocab_size=40000, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    teacher = LlamaForCausalLM(config).eval().bfloat16()
    monkeypatch.setattr(gpu_check_speed, "_teacher", lambda device: (teacher, "tiny"))
    monkeypatch.setattr(gpu_check_speed, "_MIN_SECONDS", 0.0)
    monkeypatch.setattr(gpu_check_speed, "NEW_TOKENS", 2)
    gpu_check_speed._student.cache_clear()
    row = measure(Timing("model", "sqeuclidean exact", "prefill", 12), "cpu")
    assert (row["status"], row["model"]) == ("ok", "tiny")
    assert row["difference_to_untouched"] < 0.02
    assert measure(Timing("model", "nystrom", "generate", 12), "cpu")["status"] == "ok"
    gpu_check_speed._student.cache_clear()


def test_a_wrong_result_is_not_timed(monkeypatch):
    right = gpu_check_speed.our_attention
    monkeypatch.setattr(gpu_check_speed, "our_attention", lambda case: lambda *t: right(case)(*t) * 1.1)
    row = measure(timings("cpu")[0], "cpu")
    assert row["status"] == "wrong"
    assert "ours" not in row
    assert gpu_check.exit_status({"rows": {"exact": [row]}}) == 1


def test_what_would_take_too_long_is_foretold():
    short, long = Timing("exact", "l1", "forward", 1000, heads=4), Timing("exact", "l1", "forward", 4000, heads=4)
    row = {"case": {**vars(short)}, "work": short.work(), "ours": {"median": 0.5}}
    assert gpu_check.foretell(long, [row]) == pytest.approx(gpu_check._CALLS * 0.5 * 16)
    assert gpu_check.foretell(Timing("exact", "l2", "forward", 4000), [row]) == 0.0


@pytest.mark.parametrize(
    ("words", "reason"),
    [(["--parts", "speed"], "--parts"), (["--seconds", "0"], "--seconds"), (["--workers", "-1"], "--workers")],
)
def test_arguments_are_checked_by_flag(words, reason, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(words)
    assert reason in capsys.readouterr().err


def test_one_h100_has_room_for_the_float64_reference():
    """The differences q - k of eight processes at a time, several times over."""
    largest = max(c.batch * c.heads * c.queries * c.keys * c.head_size for c in correctness_cases(False))
    assert 8 * 6 * largest * torch.float64.itemsize < 75e9
