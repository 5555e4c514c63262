"""`distattn benchmark --mechanism native`: its options, its check, what it writes. No test asserts a speed."""

import json

import pytest
import torch

from distattn_hf.benchmark.command import load_config, run_benchmark
from distattn_hf.benchmark.native_options import NativeCase, NativeConfig
from distattn_hf.benchmark.run import exit_code
from distattn_hf.benchmark.run_native import NativeBenchmark
from distattn_hf.core.mechanism_base import MECHANISMS
from tests.benchmark_cases import CONFIGS, recorded

TINY = {
    "lengths": [48, 96], "heads": 2, "head_size": 8, "repeats": 1, "warmup": 0, "min_seconds": 0, "memory": False,
    "plot": False, "device": "cpu",
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mechanism": "nystrom"}, "the benchmark of mechanism nystrom has no option mechanisms"),
        ({"mechanisms": "locale"}, "mechanisms must be one of .*local"),
        ({"mechanisms": []}, "mechanisms must name at least one"),
        ({"passes": "decode"}, "passes must be one of forward, forward_backward"),
        ({"lengths": [8]}, "lengths must be a whole number >= 16"),
        ({"strategies": "kmeans"}, "has no option strategies, which only mechanism nystrom has"),
    ],
)
def test_option_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, {"mechanism": "native", "mechanisms": "local", **TINY, **options})


def test_the_shipped_config_is_valid():
    found = load_config(next(path for path in CONFIGS if path.stem == "benchmark_native"))
    assert isinstance(found, NativeConfig)
    assert found.lengths[0] == 1024
    assert found.lengths[-1] == 16384
    assert {case.mechanism for case in found.cases() if case.causal} == set(found.mechanisms)


def test_forms_that_do_not_exist_are_left_out():
    config = NativeConfig(**{**TINY, "mechanisms": ["linformer", "linear"], "lengths": [48]})
    assert [(case.mechanism, case.causal) for case in config.cases()] == [
        ("linformer", False), ("linear", False), ("linear", True),
    ]  # fmt: skip


def test_every_mechanism_passes_its_check_and_is_written(tmp_path):
    config = NativeConfig(**{**TINY, "mechanisms": [*MECHANISMS, "nystrom", "retrieval"], "out": str(tmp_path / "out")})
    report, printed = recorded(run_benchmark, config)
    assert exit_code(report) == 0
    assert json.loads((tmp_path / "out/benchmark.json").read_text())["complete"]
    rows = report["results"]
    assert {row["label"] for row in rows} == {*MECHANISMS, "nystrom", "retrieval"}
    for row in rows:
        assert row["gate"]["passed"]
        checked = row["label"] not in ("nystrom", "relative")
        assert (row["gate"]["error"] is not None) == checked
        assert row["seconds"]["median"] > 0
        assert ("growth" in row) == (row["length"] == 96)
        rate = row["batch"] * row["length"] / row["seconds"]["median"]
        assert row["tokens_per_second"] == pytest.approx(rate)
        assert f"{rate:,.0f}" in printed
        line = [row["label"], "forward", "yes" if row["causal"] else "no", str(row["length"])]
        assert any(text.split()[:4] == line for text in printed.splitlines())


def test_a_wrong_mechanism_gets_no_time(tmp_path, monkeypatch):
    attend = MECHANISMS.get("linear")._attend
    monkeypatch.setattr(MECHANISMS.get("linear"), "_attend", lambda self, call: attend(self, call) * 1.001)
    report, printed = recorded(
        run_benchmark, NativeConfig(**{**TINY, "mechanisms": "linear", "out": str(tmp_path / "out")})
    )
    assert {row["status"] for row in report["results"]} == {"wrong"}
    assert "WRONG" in printed
    assert exit_code(report) == 1


def test_memory_and_gradients_are_those_of_the_case():
    case = NativeCase("local", True, "forward_backward", 4096, 1, 2, 16, "cpu", 0)
    gradients = NativeBenchmark.call(case, "ours")()
    assert [g.shape for g in gradients] == [torch.Size((1, 2, 4096, 16))] * 3
    # Three gradients of 0.5 MB each at least, and far less than the 134 MB of two heads' (N, M) weights.
    assert 1.5 < NativeBenchmark.measure_memory(case, "ours") < 60
