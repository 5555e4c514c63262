"""`distattn benchmark --mechanism nystrom`: its check, its peers, what it writes. No test asserts a speed."""

import json
import math
import shutil
import sys
from dataclasses import fields, replace

import pytest
import torch
import yaml
from torch.nn import functional as F

from distattn_hf.benchmark import nystrom_inputs as inputs
from distattn_hf.benchmark import nystrom_peers as peers
from distattn_hf.benchmark import run_nystrom as module
from distattn_hf.benchmark.command import load_config, read_config, run_benchmark
from distattn_hf.benchmark.nystrom_options import NystromConfig
from distattn_hf.benchmark.run import Benchmark, exit_code
from distattn_hf.functional.landmarks import STRATEGIES
from tests.benchmark_cases import CONFIGS, WrongSlope, command_line, recorded
from tests.tolerances import assert_close

TINY = {
    "lengths": [48, 96], "strategies": "segment_means", "heads": 2, "head_size": 8, "num_landmarks": 8,
    "window_size": 5, "num_sinks": 2, "repeats": 1, "warmup": 0, "min_seconds": 0, "memory": False, "plot": False,
    "device": "cpu", "peers": "transformers",
}  # fmt: skip


def config(folder, **options) -> NystromConfig:
    return NystromConfig(**{**TINY, "out": str(folder / "out"), **options})


def run(folder, **options) -> tuple[dict, str]:
    """(the report, what was printed) of one run."""
    return recorded(run_benchmark, config(folder, **options))


# Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mechanism": "linear"}, "mechanism must be one of nystrom, got 'linear'"),
        ({"strategies": "lloyd"}, "unknown landmark strategy 'lloyd'"),
        ({"strategies": []}, "strategies must name at least one"),
        ({"peers": "longformer"}, "peers must be one of transformers, nystrom-attention, performer"),
        ({"passes": "decode"}, "passes must be one of forward, forward_backward, got 'decode'"),
        ({"lengths": [64, 8]}, "lengths must be a whole number >= 16, got 8"),
        ({"num_landmarks": 0}, "num_landmarks must be a whole number >= 1, got 0"),
        ({"window_size": -1}, "window_size must be a whole number >= 0, got -1"),
        ({"sdpa_max_length": "far"}, "sdpa_max_length must be a whole number >= 0, got 'far'"),
        ({"causal": "maybe"}, "causal must be one of false, true, both"),
        ({"memory": 1}, "memory must be true or false, got 1"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_option_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        NystromConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"metrics": "l2", "head_sizes": 64},
            "mechanism nystrom has no option metrics, head_sizes, which only mechanism distance has; its own",
        ),
        ({"landmarks": 8}, "unknown benchmark option landmarks; expected one of lengths, causal, passes, strategies"),
    ],
    ids=["of distance", "unknown"],
)
def test_option_that_there_is_not(options, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, {"mechanism": "nystrom", **options})


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if read_config(p).get("mechanism") == "nystrom"], ids=lambda path: path.stem
)
def test_shipped_configs_are_valid(path):
    found = load_config(path)
    assert isinstance(found, NystromConfig)
    assert found.cases()
    assert set(yaml.safe_load(path.read_text())) <= {field.name for field in fields(NystromConfig)}


def test_the_mechanism_comes_from_the_option_or_the_file(monkeypatch, tmp_path):
    asked = []

    def ran(self, **_):
        asked.append((self.about.get("mechanism", "distance"), self.config.out))
        return {"results": [{"status": "ok"}]}

    monkeypatch.setattr(Benchmark, "run", ran)
    path = tmp_path / "some.yaml"
    path.write_text("mechanism: nystrom\nout: a")
    for arguments in (["--config", path], ["--mechanism", "nystrom", "--out", "b"], ["--out", "c"]):
        assert command_line(*arguments).exit_code == 0
    path.write_text("mechanism: distance\nout: d")
    assert command_line("--config", path).exit_code == 0
    assert asked == [("nystrom", "a"), ("nystrom", "b"), ("distance", "c"), ("distance", "d")]
    for arguments, message in (
        (["--mechanism", "linear"], "mechanism must be one of distance, nystrom, native, got 'linear'"),
        (
            ["--mechanism", "nystrom", "--metrics", "l2"],
            "mechanism nystrom has no option metrics, which only mechanism",
        ),
    ):
        found = command_line(*arguments)
        assert isinstance(found.exception, ValueError)
        assert message in str(found.exception)


# The check ----------------------------------------------------------------------------------------------------------


def last_rows(output):
    """Wrong at the timed length alone."""
    return output * 1.05 if output.shape[2] == 96 else output


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "distort",
    [lambda o: o * 1.001, lambda o: o * math.nan, lambda o: o.roll(1, 2), WrongSlope.apply, last_rows],
    ids=["scale", "nan", "shifted", "gradient", "timed length"],
)
def test_a_wrong_result_has_no_time(distort, causal, monkeypatch, tmp_path):
    right = module.nystrom_attention
    monkeypatch.setattr(module, "nystrom_attention", lambda *args, **options: distort(right(*args, **options)))
    report, printed = run(tmp_path, causal=causal, lengths=96, peers=[])
    (row,) = [row for row in report["results"] if row["label"].startswith("ours")]
    assert row["status"] == "wrong"
    assert not {"seconds", "times_ours", "errors", "memory"} & set(row)
    (line,) = [line for line in printed.splitlines() if line.startswith("ours")]
    assert "WRONG (error " in line
    assert exit_code(report) == 1
    assert json.loads((tmp_path / "out" / "benchmark.json").read_text()) == report


def test_the_command_exits_with_1_after_a_wrong_result(monkeypatch, tmp_path):
    right = module.nystrom_attention
    monkeypatch.setattr(module, "nystrom_attention", lambda *args, **options: 1.01 * right(*args, **options))
    path = tmp_path / "some.yaml"
    path.write_text(yaml.safe_dump({**TINY, "mechanism": "nystrom", "out": str(tmp_path / "out")}))
    found = command_line("--config", path, "--lengths", 48)
    assert found.exit_code == 1
    assert found.stdout.count("WRONG") == 2


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("strategy", ["segment_means", "kmeans_sample", "kmeans", "rpcholesky"])
def test_the_check_passes_what_is_right(strategy, causal, tmp_path):
    case = config(tmp_path, causal=causal, lengths=50).cases()[0]
    assert module.gate(case, strategy)["passed"]


# Inputs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_yardstick_is_exact_attention(causal, monkeypatch, tmp_path):
    monkeypatch.setattr(inputs, "_ERROR_ROWS", 7)
    monkeypatch.setattr(inputs, "_LOGITS", 300)
    case = config(tmp_path, causal=causal, lengths=50).cases()[0]
    tensors, rows = [t.double() for t in inputs.make_inputs(case, "clustered")], inputs.error_rows(case)
    assert len(rows) == 7
    assert rows[-1] == 49
    expected = F.scaled_dot_product_attention(*tensors, is_causal=causal)[:, :, rows]
    assert_close(inputs.exact_rows(case, *tensors, rows), expected, "float64")


def test_inputs_are_a_function_of_the_seed(tmp_path):
    case = config(tmp_path, lengths=2000).cases()[0]
    for kind in inputs.KINDS:
        first, again, other = (inputs.make_inputs(replace(case, seed=seed), kind) for seed in (0, 0, 1))
        for a, b, c in zip(first, again, other):
            assert torch.equal(a, b)
            assert not torch.equal(a, c)
    # Another sample has the same centres: its keys lie as near to these keys as these to each other.
    keys, others = (inputs.make_inputs(case, "clustered", sample=sample)[1][0, 0] for sample in (0, 1))
    nearest = torch.cdist(others, keys).amin(1).mean()
    unrelated = torch.cdist(inputs.make_inputs(replace(case, seed=1), "clustered")[1][0, 0], keys).amin(1).mean()
    assert nearest < 0.7 * unrelated


# Runs and peers -----------------------------------------------------------------------------------------------------


def test_a_run_writes_and_prints_every_row(tmp_path):
    report, printed = run(
        tmp_path, passes="forward,forward_backward", strategies="segment_means,kmeans", sdpa_max_length=48,
        error_max_length=48,
    )  # fmt: skip
    assert json.loads((tmp_path / "out" / "benchmark.json").read_text()) == report
    assert report["complete"]
    assert report["provenance"]["torch"] == torch.__version__
    assert set(report["definitions"]["inputs"]) == set(inputs.KINDS)
    assert exit_code(report) == 0
    labels = ["ours:segment_means", "ours:kmeans", "sdpa", "transformers"]
    rows = [row for row in report["results"] if row["status"] != "yardstick"]
    assert [row["label"] for row in rows] == 8 * labels
    for row in rows:
        if row["label"] == "transformers" and row["causal"]:
            assert (row["status"], row["reason"]) == ("absent", "no causal form")
            continue
        if row["label"] == "sdpa" and row["length"] == 96:
            assert (row["status"], row["reason"]) == ("absent", "N > sdpa_max_length (48)")
            continue
        assert row["status"] == "ok"
        for name in ("seconds", "times_ours"):
            assert 0 < row[name]["p10"] <= row[name]["median"] <= row[name]["p90"]
        assert ("growth" in row) == (row["length"] == 96)
        assert [error is None for error in row["errors"].values()] == 2 * [row["length"] == 96]
        assert ("gate" in row) == row["label"].startswith("ours")
    assert sum(line.startswith(tuple(labels)) for line in printed.splitlines()) == len(rows)


def test_transformers_peer_is_its_own_module(tmp_path):
    """As many landmarks as positions: its module then computes exact attention, which tells layout and scaling."""
    pytest.importorskip("transformers")
    case = config(tmp_path, causal=False, lengths=48, num_landmarks=48).cases()[0]
    prepare, attention = peers.COMPETITORS["transformers"](case)
    tensors = inputs.make_inputs(case, "normal")
    assert_close(attention(*prepare(*tensors)), F.scaled_dot_product_attention(*tensors), "float32_forward")
    with pytest.raises(peers.Unavailable, match="N is no multiple of m"):
        peers.COMPETITORS["transformers"](replace(case, num_landmarks=5))


@pytest.mark.parametrize(("name", "package"), [("nystrom-attention", "einops"), ("performer", "performer_pytorch")])
def test_peers_of_other_packages(name, package, tmp_path):
    pytest.importorskip({"nystrom-attention": "nystrom_attention"}.get(name, package))
    report, _ = run(tmp_path, peers=name, causal=False, passes="forward_backward")
    rows = [row for row in report["results"] if row["label"] == name]
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert all(0 < error < 2 for row in rows for error in row["errors"].values())


def test_peers_that_are_not_installed_say_so(monkeypatch, tmp_path):
    for name in ("nystrom_attention.nystrom_attention", "performer_pytorch.performer_pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    report, printed = run(tmp_path, peers="nystrom-attention,performer", causal=False, lengths=48)
    for name, packages in (("nystrom-attention", "nystrom-attention einops"), ("performer", "performer-pytorch")):
        (row,) = [row for row in report["results"] if row["label"] == name]
        assert row["status"] == "absent"
        assert f"not installed (pip install --no-deps {packages}" in row["reason"]
        assert row["reason"] in printed
    assert exit_code(report) == 0


def test_a_competitor_that_fails_does_not_end_the_run(monkeypatch, tmp_path):
    def broken(case):
        raise RuntimeError("not enough memory\nand details")

    monkeypatch.setitem(peers.COMPETITORS, "transformers", broken)
    report, printed = run(tmp_path, causal=False, lengths=48)
    assert report["complete"]
    assert "FAILED: RuntimeError: not enough memory" in printed
    assert exit_code(report) == 1


def test_memory_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    report, printed = run(tmp_path, causal=False, lengths=[512, 1024], head_size=64, memory=True, plot=True)
    output = 2 * 64 * 4 / 1e6
    for row in report["results"]:
        if row["status"] == "ok":
            assert row["memory"] > 0.9 * output * row["length"], row["label"]
            assert "memory_error" not in row
    for ending, start in ((".png", b"\x89PNG\r\n"), (".svg", b"<?xml")):
        path = tmp_path / "out" / f"benchmark-float32-d64-full-nystrom{ending}"
        assert path.read_bytes().startswith(start)
        assert str(path) in printed


def check_memory_errors(report, printed, reasons: dict[str, str]):
    """Every row has its time; those of the labels in `reasons` have these instead of memory, and below the table."""
    rows = [row for row in report["results"] if row["status"] != "yardstick"]
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["label"]: row["memory_error"] for row in rows if "memory_error" in row} == reasons
    assert all((row["memory"] is None) == (row["label"] in reasons) for row in rows)
    notes = [line for line in printed.splitlines() if line.startswith("no MB of ")]
    for label, reason in reasons.items():
        assert any(label in note and note.endswith(f" at N = 48, 96: {reason}") for note in notes)
    assert len(notes) == len(set(reasons.values()))
    assert exit_code(report) == 0


def test_memory_of_what_the_measuring_process_does_not_know(monkeypatch, tmp_path):
    names = {"mine": STRATEGIES.get("segment_means"), **STRATEGIES._entries}
    monkeypatch.setattr(STRATEGIES, "_entries", names)
    report, printed = run(tmp_path, causal=False, strategies="mine,segment_means", memory=True)
    (reason,) = {row["memory_error"] for row in report["results"] if row["label"] == "ours:mine"}
    assert reason.startswith("ValueError: unknown landmark strategy 'mine'")
    check_memory_errors(report, printed, {"ours:mine": reason})


def test_a_measuring_process_that_cannot_start_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    report, printed = run(tmp_path, causal=False, memory=True)
    labels = ("ours:segment_means", "sdpa", "transformers")
    check_memory_errors(report, printed, dict.fromkeys(labels, "the measuring process ended"))
