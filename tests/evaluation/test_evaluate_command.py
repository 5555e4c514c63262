"""`distattn evaluate --task` as a user types it."""

import json
import sys

import pytest
from transformers import BertForSequenceClassification

from distattn_hf import AttentionSpec, convert
from distattn_hf.storage.folders import save_checkpoint
from tests.conversion.models import bert
from tests.evaluation.test_classification import TOKENIZER
from tests.fixtures.load import GPT2_ENGLISH, gpt2_english
from tests.test_cli import distattn

DATA = ("--data", GPT2_ENGLISH / "heldout.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    teacher, tokenizer, _ = gpt2_english()
    spec = AttentionSpec(mechanism="retrieval", window_size=16, block_size=8, num_blocks=2)
    save_checkpoint(convert(teacher, spec), tokenizer, folder / "retrieval")
    save_checkpoint(convert(teacher, "l2", init="plain"), tokenizer, folder / "l2")
    save_checkpoint(bert(BertForSequenceClassification, num_labels=3), TOKENIZER, folder / "labels")
    (folder / "data.csv").write_text("text,kind\n" + "the cat sat,0\nthe dog ran,2\n" * 5)
    return folder


def test_a_student_its_control_and_its_teacher_in_numbers_and_a_picture(folder, tmp_path):
    student, out = folder / "retrieval", tmp_path / "new" / "out"
    run = distattn(
        "evaluate", student, "--against", GPT2_ENGLISH, "--task", "kv", *DATA, "--lengths", "120,200", "--depths",
        "0,1", "--samples", "2", "--control", "--json", "--out", out,
    )  # fmt: skip
    rows = json.loads(run.stdout)["rows"]
    names = [str(student), str(GPT2_ENGLISH), f"{student}, sinks and window"]
    assert [row["model"] for row in rows] == names * 4
    assert [(row["length"], row["depth"]) for row in rows[::3]] == [(120, 0.0), (120, 1.0), (200, 0.0), (200, 1.0)]
    losses = [tuple(row["log_loss"] for row in rows if row["model"] == name) for name in names]
    assert len(set(losses)) == 3
    written = json.loads((out / "kv.json").read_text())
    assert written["rows"] == rows
    assert {"task", "lengths", "depths", "samples", "data", "distattn_hf", "torch", "commit", "date"} <= written.keys()
    assert sorted(path.name for path in out.glob("*")) == ["kv.json", "kv.png", "kv.svg"]
    assert "sinks and window" in (out / "kv.svg").read_text() or (out / "kv.svg").stat().st_size > 5000


def test_a_picture_that_cannot_be_drawn_is_said_before_anything_runs(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    given = ("evaluate", folder / "l2", "--task", "kv", *DATA, "--lengths", "120", "--out", tmp_path / "out")
    monkeypatch.setattr("distattn_hf.storage.models.load_checkpoint", lambda path: pytest.fail("a model was loaded"))
    assert "error: figures need matplotlib: pip install" in distattn(*given, check=False).stderr
    assert not (tmp_path / "out").exists()


def test_generation_and_perplexity_are_tables(folder):
    given = (folder / "retrieval", "--against", GPT2_ENGLISH, *DATA, "--samples", "1")
    table = distattn("evaluate", *given, "--task", "generation", "--lengths", "100", "--new-tokens", "4").stdout
    assert table.split()[:5] == ["model", "length", "agreement", "first_divergence", "identical"]
    assert len(table.splitlines()) == 2
    table = distattn("evaluate", *given, "--task", "perplexity", "--lengths", "256", "--tail", "32").stdout
    assert len(table.splitlines()) == 3


def test_labels(folder, tmp_path):
    given = ("evaluate", folder / "labels", "--task", "classification", "--data", folder / "data.csv")
    run = distattn(*given, "--label-column", "kind", "--json", "--out", tmp_path)
    (row,) = json.loads(run.stdout)["rows"]
    assert (row["texts"], row["model"]) == (10, str(folder / "labels"))
    assert 0 <= row["f1"] <= 1
    assert [path.name for path in tmp_path.glob("*")] == ["classification.json"]
    table = distattn(*given, "--label-column", "kind").stdout
    assert table.split()[:4] == ["model", "loss", "accuracy", "f1"]
    assert "--data: --label-column must name a column of the data" in distattn(*given, check=False).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["L2", "--task", "kv", "--lengths", "257"], "--lengths must be at most 256, the positions of"),
        (["L2", "--task", "kv", "--lengths", "50"], "--lengths must be at least 97 tokens for this task, got 50"),
        (["L2", "--task", "perplexity", "--lengths", "256"], "--tail must be from 1 to fewer tokens than lengths"),
        (["L2", "--task", "kv", "--depths", "0,2"], "--depths must be shares from 0 to 1"),
        (
            ["L2", "--task", "kv", "--lengths", "200", "--control"],
            "--control runs the model with sinks and window alone, and in",
        ),
        (["minilm", "--task", "passkey"], "task 'passkey' needs a causal language model, and 'minilm' is BertModel"),
        (["L2", "--task", "generation"], "--task generation compares with a teacher: give --against"),
        (["L2", "--task", "generation", "--against", "L2"], "--against must be another model than"),
        (
            ["L2", "--task", "perplexity", "--depths", "0"],
            "--depths does nothing with --task perplexity: it is for --task passkey, needle, kv; with --task "
            "perplexity there are --lengths, --samples, --tail, --control",
        ),
        (
            ["L2", "--samples", "3"],
            "--samples does nothing without --task: it is for --task passkey, needle, kv, perplexity, generation, "
            "ruler; without --task there are --max-tokens, --max-length, --max-texts",
        ),
        (
            ["L2", "--task", "speech", "--max-tokens", "9"],
            "speech: it is for evaluation without --task; with --task",
        ),
        (
            ["L2", "--task", "kv", "--max-texts", "9"],
            "for --task classification, speech and evaluation without",
        ),
        (["L2", "--task", "kv", "--out", "FILE"], "--out must be a folder, got the file"),
        (["L2", "--task", "classification"], "task 'classification' needs one of the heads"),
        (["L2", "--task", "kv", "--against", "minilm"], "tokenizers with different vocabularies"),
    ],
)
def test_bad_input_is_one_line(folder, arguments, message):
    places = {"L2": folder / "l2", "FILE": folder / "data.csv"}
    run = distattn("evaluate", *[places.get(a, a) for a in arguments], *DATA, check=False)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: ")
    assert message in run.stderr.splitlines()[-1]
