"""The command line as a user types it, on a small checkpoint folder and real files."""

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, BertTokenizerFast

from distattn_hf import DistAttnConfig, DistAttnForCausalLM, cli
from tests.conversion.models import gpt2

TEXT = "\n\n".join(" ".join(["the cat sat on the mat and the dog sat on the log"] * 6) for _ in range(8))
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(TEXT.split()))]


@dataclass
class Run:
    """What a command printed, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


def distattn(*arguments, check=True) -> Run:
    """The command line in this process, from `main` to the exit code."""
    said, complained = io.StringIO(), io.StringIO()
    typed = mock.patch("sys.argv", ["distattn", *map(str, arguments)])
    with typed, redirect_stdout(said), redirect_stderr(complained), pytest.raises(SystemExit) as stopped:
        cli.main()
    run = Run(stopped.value.code or 0, said.getvalue(), complained.getvalue())
    assert not check or run.returncode == 0, run.stderr[-3000:]
    return run


def in_a_process(*arguments) -> subprocess.CompletedProcess:
    """The same as a user starts it: torch is imported by the command line, and Python ends with its exit code."""
    command = [sys.executable, "-m", "distattn_hf.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    gpt2().save_pretrained(folder / "teacher")
    tokenizer = BertTokenizerFast(vocab={w: i for i, w in enumerate(WORDS)})
    tokenizer.save_pretrained(folder / "teacher")
    (folder / "text.txt").write_text(TEXT)
    distattn(
        "convert", folder / "teacher", folder / "l2", "--metric", "l2", "--calibration", folder / "text.txt",
        "--layers", "0", "--steps", "20",
    )  # fmt: skip
    return folder


def test_convert_writes_a_loadable_checkpoint_with_tokenizer(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "l2")
    assert list(model.attention_states) == ["h.0.attn"]
    assert (folder / "l2" / "tokenizer.json").exists()


def test_alpha_is_folded_on_request(folder):
    text, out = folder / "text.txt", folder / "folded"
    given = [folder / "teacher", out, "--calibration", text, "--steps", "2", "--fold-alpha"]
    run = distattn("convert", *given, "--metric", "cosine", check=False)
    assert "--fold-alpha: no spec has α" in run.stderr
    assert not out.exists()
    distattn("convert", *given, "--metric", "l2")
    assert "mean α 1.000" in distattn("inspect", out).stdout


def test_convert_to_linear_time(folder):
    """Two of the heads, so that --heads and the options of Nyström attention are seen to arrive."""
    run = distattn(
        "convert", folder / "teacher", folder / "linear", "--mechanism", "nystrom", "--num-landmarks", "8",
        "--window-size", "5", "--num-sinks", "1", "--calibration", folder / "text.txt", "--steps", "2",
        "--heads", "0,1",
    )  # fmt: skip
    assert "window off: the same of sinks and window alone" in run.stdout
    assert "attention " in run.stdout.splitlines()[0]
    assert "sinks and window alone" in run.stdout
    model = AutoModelForCausalLM.from_pretrained(folder / "linear")
    state = model.attention_states["h.1.attn"]
    assert state.head_lists == [[0, 1]]
    assert state.groups[0].landmarks.shape[1] == 8
    assert (state.groups[0].spec.window_size, state.groups[0].spec.num_sinks) == (5, 1)
    distattn("set", folder / "linear", "--exact-below", "7", "--window-size", "6")
    (spec,) = AutoModelForCausalLM.from_pretrained(folder / "linear").config.attention_specs
    assert (spec.exact_below, spec.window_size) == (7, 6)
    said = distattn("set", folder / "l2", "--backend", "triton").stderr
    assert torch.cuda.is_available() or "note: on this machine it would be refused: backend 'triton' cannot" in said
    assert not distattn("set", folder / "l2", "--backend", "auto").stderr
    run = distattn("set", folder / "l2", "--exact-below", "7", check=False)
    assert "--exact-below 7 belongs to mechanism='nystrom', which this model does not have" in run.stderr


def test_inspect_shows_the_fitted_values(folder):
    text = distattn("inspect", folder / "l2").stdout
    assert "h.0.attn" in text
    assert "init=calibrated" in text
    report = json.loads(distattn("inspect", folder / "l2", "--json").stdout)
    model = AutoModelForCausalLM.from_pretrained(folder / "l2")
    expected = model.attention_states["h.0.attn"].groups[0].lam().tolist()
    assert report["groups"][0]["lam"] == pytest.approx(expected, abs=1e-5)
    assert report["groups"][0]["divergence_after"] is not None
    assert report["unconverted"] == ["h.1.attn"]


def test_evaluate_prints_teacher_and_student(folder):
    out = distattn("evaluate", folder / "l2", "--against", folder / "teacher", "--data", folder / "text.txt", "--json")
    result = json.loads(out.stdout)
    student, teacher = result[str(folder / "l2")], result[str(folder / "teacher")]
    assert student["ratio"] == pytest.approx(student["perplexity"] / teacher["perplexity"])
    assert teacher["ratio"] == 1.0


def test_evaluate_says_what_it_scored(folder):
    out = distattn(
        "evaluate", folder / "teacher", "--data", folder / "text.txt", "--max-tokens", "100", "--max-length", "40"
    ).stdout
    assert "perplexity of 78 tokens" in out
    assert "from 2 texts" in out


def test_revert_gives_the_teachers_weights(folder):
    distattn("revert", folder / "l2", folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    assert type(again) is type(teacher)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "TEACHER", "L2", "--init", "plain"], "is not empty; pass --overwrite"),
        (
            ["convert", "TEACHER", "TEACHER", "--init", "plain", "--overwrite"],
            "is or holds the model that is read",
        ),
        (
            ["revert", "L2", "L2", "--overwrite"],
            "is or holds the model that is read, which it would replace; give another",
        ),
        (["convert", "TEACHER", "NEW", "--metric", "l7", "--init", "plain"], "unknown metric 'l7'"),
        (["convert", "TEACHER", "NEW", "--metric", "nystrom"], "give --mechanism nystrom"),
        (["convert", "TEACHER", "NEW", "--metric", "lp"], "--metric lp needs its order: give --p"),
        (["convert", "TEACHER", "NEW", "--metric", "l2", "--init", "exact"], "--init exact needs --metric sqeuclidean"),
        (["convert", "TEACHER", "NEW", "--layers", "8", "--init", "plain"], "there is no layer 8"),
        (["convert", "TEACHER", "NEW", "--heads", "x", "--init", "plain"], "--heads must be a list of indices"),
        (["convert", "TEACHER", "NEW", "--calibration", "nowhere.txt"], "'nowhere.txt' does not exist"),
        (["convert", "EMPTY", "NEW", "--init", "exact"], "holds no config.json"),
        (
            ["convert", "TEACHER", "NEW", "--init", "exact", "--calibration", "nowhere.txt"],
            "--calibration is for the fit of --init calibrated; --init exact fits nothing, leave it out",
        ),
        (
            ["convert", "TEACHER", "NEW", "--init", "plain", "--steps", "9"],
            "--steps is for the fit of --init",
        ),
        (["convert", "TEACHER", "NEW", "--metric", "l2"], "--init calibrated needs --calibration: a text file"),
        (
            ["convert", "TEACHER", "NEW", "--layers", "0-", "--init", "plain"],
            "--layers must be numbers and ranges such as '0-2,5', got '0-'",
        ),
        (
            ["convert", "TEACHER", "NEW", "--spec", "x.yaml", "--p", "3"],
            "--p and --spec both say what the attention is",
        ),
        (["convert", "TEACHER", "NEW", "--calibration", "EMPTY"], "is a folder that Dataset.save_to_disk did not make"),
        (
            ["convert", "TEACHER", "NEW", "--calibration", "TEXT", "--max-error", "0.4"],
            "--max-error belongs to --mechanism nystrom, got --mechanism distance",
        ),
        # What belongs to another mechanism comes before what is absent.
        (
            ["convert", "TEACHER", "NEW", "--metric", "l2", "--num-landmarks", "8"],
            "--num-landmarks belongs to --mechanism 'nystrom', got --num-landmarks 8 with 'distance'",
        ),
        (
            ["convert", "TEACHER", "NEW", "--mechanism", "nystrom", "--min-weight", "0.1"],
            "--min-weight belongs to --mechanism 'retrieval' or --beyond 'retrieval'",
        ),
        (["convert", "TEACHER", "NEW", "--select", "probe"], "--select belongs to --mechanism nystrom"),
        (["inspect", "TEACHER"], "is not a converted model"),
        (["revert", "TEACHER", "NEW"], "is not a converted model"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, arguments, message):
    (folder / "empty").mkdir(exist_ok=True)
    names = {"TEACHER": folder / "teacher", "L2": folder / "l2", "NEW": folder / "new", "EMPTY": folder / "empty"}
    names["TEXT"] = folder / "text.txt"
    run = distattn(*[names.get(a, a) for a in arguments], check=False)
    assert run.returncode == 1
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in run.stderr
    assert not (folder / "new").exists()


def test_a_folder_that_holds_the_model_is_not_replaced(folder, tmp_path):
    """As a Trainer leaves them: a whole model, and checkpoints in folders of it."""
    shutil.copytree(folder / "teacher", tmp_path / "run")
    shutil.copytree(folder / "teacher", tmp_path / "run" / "checkpoint-5")
    source = tmp_path / "run" / "checkpoint-5"
    run = distattn("convert", source, tmp_path / "run", "--init", "plain", "--overwrite", check=False)
    assert "is or holds the model that is read" in run.stderr
    assert (source / "config.json").is_file()


def test_overwrite_replaces_the_folder(folder):
    distattn("convert", folder / "teacher", folder / "twice", "--init", "exact")
    (folder / "twice" / "stale.txt").write_text("old")
    distattn("convert", folder / "teacher", folder / "twice", "--init", "plain", "--overwrite")
    assert not (folder / "twice" / "stale.txt").exists()
    assert AutoModelForCausalLM.from_pretrained(folder / "twice").config.distattn["init"] == "plain"
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    "verb", ["convert", "inspect", "evaluate", "revert", "benchmark", "push", "adapt", "train", "compare", "analyse"]
)
def test_help_has_an_example(verb):
    assert "Example" in distattn(verb, "--help").stdout


def test_a_process_of_its_own(folder):
    """What it prints, and that its exit code and standard error say what is wrong: a Hub name without the Hub."""
    run = in_a_process("inspect", folder / "l2")
    assert run.returncode == 0
    assert run.stdout == distattn("inspect", folder / "l2").stdout
    run = in_a_process("inspect", "openai-community/gpt2")
    assert run.returncode == 1
    assert len([line for line in run.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in run.stderr


def test_native_models_are_inspected_by_their_config_and_no_plan_is_made_for_them(tmp_path):
    config = DistAttnConfig(
        mechanism="performer", mechanism_options={"num_features": 8}, is_decoder=True, num_hidden_layers=2,
        hidden_size=16, num_attention_heads=2, vocab_size=32, intermediate_size=16,
    )  # fmt: skip
    DistAttnForCausalLM(config).save_pretrained(tmp_path / "native")
    told = distattn("inspect", tmp_path / "native").stdout.splitlines()
    assert told[0] == "native model: 2 layers of 2 heads, head_dim 8"
    assert told[1] == "attention: performer, num_features=8"
    assert told[-1] == "positions: rotary"
    assert json.loads(distattn("inspect", tmp_path / "native", "--json").stdout)["attention"] == told[1][11:]
    refused = distattn("inspect", tmp_path / "native", "--per-head", check=False)
    assert "--per-head is about what a conversion fitted" in refused.stderr
    refused = distattn("plan", tmp_path / "native", "--length", "64", "--memory", "1GB", check=False)
    assert "is a native model with mechanism='performer'" in refused.stderr


def test_text_for_a_folder_without_a_tokenizer_is_refused_by_its_name(folder, tmp_path):
    gpt2().save_pretrained(tmp_path / "bare")
    text = folder / "text.txt"
    run = distattn("convert", tmp_path / "bare", tmp_path / "out", "--metric", "l2", "--calibration", text, check=False)
    assert "bare' has no tokenizer files, so it cannot read the text of --calibration" in run.stderr
