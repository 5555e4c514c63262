"""The experiment on a small checkpoint: every student, gone on with after a stop, and what is refused."""

import json
import signal
import subprocess
import sys

import pytest

from distattn_hf.experiments import long_context
from distattn_hf.experiments.run_experiment import load_experiment, read_options, run_experiment
from tests.fixtures.load import GPT2_ENGLISH
from tests.test_cli import distattn

HERE = [f"checkpoint={GPT2_ENGLISH}", f"data={GPT2_ENGLISH / 'heldout.txt'}", "samples=1"]
FEW = [*HERE, "lengths=128", "depths=0.5"]


def test_students_are_measured_and_drawn(tmp_path):
    """All but l2, whose fit takes longest: it is in the run that is killed."""
    students = [name for name in long_context.STUDENTS if name != "l2"]
    run = distattn(
        "experiment", "long_context", "--quick", "--out", tmp_path, *FEW, "tasks=kv,perplexity",
        f"students={','.join(students)}",
    )  # fmt: skip
    rows = json.loads((tmp_path / "long_context.json").read_text())["rows"]
    labels = ["teacher", "sinks and window", "retrieval, weight 0.03", "retrieval, 2 blocks", "2 blocks alone",
              "nystrom", "nystrom + 0.25 retrieval"]  # fmt: skip
    assert [row["key"]["student"] for row in rows[::2]] == labels
    assert [set(row["key"]) for row in rows[:2]] == [
        {"student", "task", "length", "depth"},
        {"student", "task", "length"},
    ]
    # No two of them are the same model.
    assert len({row["values"]["log_loss"] for row in rows if row["key"]["task"] == "perplexity"}) == 7
    sizes = {row["key"]["student"]: row["values"].get("cache_bytes") for row in rows}
    assert sizes["nystrom"] < sizes["nystrom + 0.25 retrieval"] < sizes["teacher"] < sizes["retrieval, 2 blocks"]
    # Blocks of 4: two sinks in one, 15 keys of the window in four, of the query's own, of which the last three of a
    # text see 3 on average. In clusters the window begins at key 64, and two more blocks are read.
    shares = [row["values"].get("share_read") for row in rows[::2]]
    assert shares[:2] + shares[3:] == [None, 23 / 128, 75 / 128, 75 / 128, None, None]
    assert 67 / 128 < shares[2] < 1.0
    assert run.stdout.splitlines()[-1] == f"saved to {tmp_path / 'long_context.json'}"
    assert len(run.stdout.splitlines()) == 15
    names = {f"{name}.{kind}" for name in ("kv", "perplexity") for kind in ("svg", "png")}
    assert {path.name for path in tmp_path.glob("*")} == {"long_context.json", *names}


def test_a_student_is_not_made_for_rows_that_are_there(tmp_path, monkeypatch):
    given = [*FEW, "tasks=kv"]
    run_experiment("long_context", tmp_path, [*given, "students=teacher,nystrom"], quick=True)
    before = (tmp_path / "long_context.json").read_bytes()
    monkeypatch.setattr(long_context, "convert", lambda *args, **kwargs: pytest.fail("a student was made"))
    run_experiment("long_context", tmp_path, [*given, "students=nystrom"], quick=True)
    assert (tmp_path / "long_context.json").read_bytes() == before


def test_a_run_that_was_killed_goes_on(tmp_path):
    """Its rows are those of one that was not, fitted students' too, and none is measured twice."""
    given = [*HERE, "lengths=128,200", "depths=0,1", "tasks=kv,perplexity", "students=teacher,l2"]
    whole = run_experiment("long_context", tmp_path / "whole", given, quick=True)
    command = [sys.executable, "-m", "distattn_hf.cli", "experiment", "long_context", "--quick", *given]
    file = tmp_path / "cut" / "long_context.json"
    process = subprocess.Popen([*command, "--out", str(file.parent)], stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = json.loads(file.read_text())["rows"]
    assert 3 <= len(kept) < 12
    again = run_experiment("long_context", file.parent, given, quick=True)
    assert again.content["rows"][: len(kept)] == kept
    assert [row["run"] for row in again.content["rows"]] == [0] * len(kept) + [1] * (12 - len(kept))
    assert again.rows == whole.rows


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["students=teacher,linear"], "students must be some of teacher, window, .*, got teacher, linear"),
        (["tasks=[]"], "tasks must be some of passkey, needle, kv, perplexity, got none"),
        (["depths=2"], r"depths must be shares from 0 to 1, got \(2.0,\)"),
        (["device=gpu"], "device must be one of auto, cpu, cuda, got 'gpu'"),
        (["select=luck"], "select must be one of error, probe, got 'luck'"),
        (["shares=1.5"], "beyond_share must be None or 0 < share <= 1, got 1.5"),
        (["blocks=-1"], "num_blocks must be"),
        (["lengths=512"], "lengths must be at most 256, the positions of"),
    ],
)
def test_options_are_refused_before_anything_is_measured(tmp_path, monkeypatch, given, message):
    monkeypatch.setattr(long_context, "score_cell", lambda *args: pytest.fail("a model was run"))
    with pytest.raises(ValueError, match=message):
        run_experiment("long_context", tmp_path, [*HERE, *given], quick=True)
    assert not list(tmp_path.glob("*"))


def test_the_config_file_is_read():
    options = read_options(load_experiment("long_context"), "configs/experiments/long_context.yaml", ())
    assert max(options.lengths) == 8192
    assert options.samples >= 20


def test_the_quick_setting_needs_no_file(tmp_path, monkeypatch):
    """Where nothing but the package is: model and text are made, the same ones each time."""
    monkeypatch.chdir(tmp_path)
    given = ["students=teacher,retrieval", "tasks=passkey,perplexity", "lengths=200", "depths=0.5", "samples=1"]
    first, again = (run_experiment("long_context", tmp_path / name, given, quick=True).rows for name in ("a", "b"))
    assert first == again
    assert [row["student"] for row in first] == [
        "teacher",
        "teacher",
        "retrieval, weight 0.03",
        "retrieval, weight 0.03",
    ]
    assert first[1]["log_loss"] != first[3]["log_loss"]
