"""The experiment `compute`: what is timed beside what, what is left out, and that a wrong result has no time."""

import pytest

from distattn_hf.benchmark.run import Unavailable
from distattn_hf.benchmark.run_exact import ExactBenchmark
from distattn_hf.experiments import compute
from distattn_hf.experiments.run_experiment import run_experiment

FEW = ["lengths=64", "pairs=1", "seconds=0.2"]


def test_rows_and_figures(tmp_path):
    """Metrics and retrieval in both passes, Nyström in one, each beside SDPA; again, nothing is measured."""
    given = [*FEW, "attentions=l2,lp3,retrieval,nystrom,transformers"]
    rows = run_experiment("compute", tmp_path, given, quick=True).rows
    assert [(row["attention"], row["pass"]) for row in rows] == [
        *((name, pass_name) for name in ("l2", "lp3", "retrieval") for pass_name in ("forward", "decode")),
        ("nystrom", "forward"), ("transformers", "forward"),
    ]  # fmt: skip
    for row in rows:
        assert row["seconds"] > 0
        # Of one pair; of retrieval's steps the median of twenty.
        near = 0.5 if row["attention"] == "retrieval" else 1e-6
        assert row["ratio"] == pytest.approx(row["sdpa_seconds"] / row["seconds"], rel=near)
        assert row["causal"] == (row["attention"] != "transformers")
    # A window that holds the whole text: Nyström attention is exact; the other package's has no window.
    assert rows[6]["error_normal"] < 1e-5
    assert 0.1 < rows[7]["error_normal"] < 2
    assert {path.name for path in tmp_path.glob("*.svg")} == {"compute_forward.svg", "compute_decode.svg"}
    before = (tmp_path / "compute.json").read_bytes()
    run_experiment("compute", tmp_path, given, quick=True)
    assert (tmp_path / "compute.json").read_bytes() == before


def test_a_package_that_is_absent_is_left_out_and_measured_later(tmp_path, monkeypatch):
    def absent(case, name, kind="normal"):
        raise Unavailable("not installed")

    lines, given = [], [*FEW, "lengths=64,128", "attentions=transformers"]
    with monkeypatch.context() as patch:
        patch.setattr("distattn_hf.benchmark.run_nystrom.competitor", absent)
        run_experiment("compute", tmp_path, given, quick=True, echo=lines.append)
    assert lines == ["left out: transformers: not installed"]
    assert len(run_experiment("compute", tmp_path, given, quick=True).rows) == 2


def test_passes_that_an_attention_has_not_are_said(tmp_path):
    lines, given = [], ["lengths=64,128", "passes=decode", "attentions=nystrom,performer"]
    assert run_experiment("compute", tmp_path, given, quick=True, echo=lines.append).rows == []
    assert [line.partition(": ")[2][:24] for line in lines if line.startswith("left out")] == [
        "nystrom, decode: a step ", "performer, decode: it ha",
    ]  # fmt: skip


def test_a_wrong_result_has_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(
        ExactBenchmark, "check", lambda self, case, name, row: row.update(gate={"passed": False, "error": 1.0})
    )
    with pytest.raises(RuntimeError, match="l2, forward of 64 tokens: wrong: .*'error': 1.0"):
        run_experiment("compute", tmp_path, [*FEW, "attentions=l2"], quick=True)
    assert not (tmp_path / "compute.json").exists()
    monkeypatch.setattr(compute, "gate", lambda case, strategy: {"passed": False, "error": 2.0})
    with pytest.raises(RuntimeError, match="nystrom of 64 tokens is not its formula: .*'error': 2.0"):
        run_experiment("compute", tmp_path, [*FEW, "attentions=nystrom"], quick=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("attentions=l3", "unknown metric 'l3'"),
        ("passes=backward", "passes must be some of forward, decode, got backward"),
        ("lengths=0", r"lengths must be >= 1, got \(0,\)"),
        ("pairs=0", "pairs must be >= 1, got 0"),
    ],
)
def test_bad_options(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_experiment("compute", tmp_path / "out", [given], quick=True)
    assert not (tmp_path / "out").exists()
