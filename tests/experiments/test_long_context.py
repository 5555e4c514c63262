"""The experiment on a small checkpoint: every student, gone on with after a stop, and what is refused."""

import json
import math
import re
import signal
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from distattn_hf.experiments import compensation_token, long_context
from distattn_hf.experiments.run_experiment import load_experiment, read_options, run_experiment
from distattn_hf.storage.models import load_checkpoint
from tests.fixtures.load import GPT2_ENGLISH
from tests.test_cli import distattn

HERE = [f"checkpoint={GPT2_ENGLISH}", f"data={GPT2_ENGLISH / 'heldout.txt'}", "samples=1"]
FEW = [*HERE, "lengths=128", "depths=0.5"]


def test_students_are_measured_and_drawn(tmp_path):
    """All but l2, whose fit takes longest: it is in the run that is killed."""
    students = [name for name in long_context.STUDENTS if name != "l2"]
    run = distattn(
        "experiment", "long_context", "--quick", "--out", tmp_path, *FEW, "tasks=kv,perplexity",
        f"students={','.join(students)}", "windows=16,24",
    )  # fmt: skip
    rows = json.loads((tmp_path / "long_context.json").read_text())["rows"]
    labels = ["teacher", "sinks and window", "sinks and window of 24", "sinks, window and a mean",
              "sinks, window of 24 and a mean", "retrieval, weight 0.03", "retrieval, 2 blocks", "2 blocks alone",
              "nystrom", "nystrom + 0.25 retrieval"]  # fmt: skip
    assert [row["key"]["student"] for row in rows[::2]] == labels
    assert [set(row["key"]) for row in rows[:2]] == [
        {"student", "task", "length", "depth"},
        {"student", "task", "length"},
    ]
    # No two of them are the same model.
    assert len({row["values"]["log_loss"] for row in rows if row["key"]["task"] == "perplexity"}) == 10
    sizes = {row["key"]["student"]: row["values"].get("cache_bytes") for row in rows}
    assert sizes["nystrom"] < sizes["nystrom + 0.25 retrieval"] < sizes["teacher"] < sizes["retrieval, 2 blocks"]
    # Blocks of 4: two sinks in one, 15 keys of the window in four, of the query's own, of which the last three of a
    # text see 3 on average. In clusters the window begins at key 64, and two more blocks are read.
    shares = [row["values"].get("share_read") for row in rows[::2]]
    assert shares[:2] + shares[3:5] + shares[6:] == [None, 23 / 128, None, None, 75 / 128, 75 / 128, None, None]
    assert 67 / 128 < shares[5] < 1.0
    assert run.stdout.splitlines()[-1] == f"saved to {tmp_path / 'long_context.json'}"
    assert len(run.stdout.splitlines()) == 21
    names = {f"{name}.{kind}" for name in ("kv", "perplexity") for kind in ("svg", "png")}
    assert {path.name for path in tmp_path.glob("*")} == {"long_context.json", *names}


def test_a_student_is_not_made_for_rows_that_are_there(tmp_path, monkeypatch):
    given = [*FEW, "tasks=kv"]
    run_experiment("long_context", tmp_path, [*given, "students=teacher,nystrom"], quick=True)
    before = (tmp_path / "long_context.json").read_bytes()
    monkeypatch.setattr(long_context, "convert", lambda *args, **kwargs: pytest.fail("a student was made"))
    run_experiment("long_context", tmp_path, [*given, "students=nystrom"], quick=True)
    assert (tmp_path / "long_context.json").read_bytes() == before


def test_a_student_that_was_kept_is_not_fitted_again(tmp_path, monkeypatch):
    given = [*HERE, "depths=0.5", "tasks=kv,perplexity", "students=teacher,nystrom+retrieval"]
    whole = run_experiment("long_context", tmp_path / "whole", [*given, "lengths=128,200"], quick=True)
    run_experiment("long_context", tmp_path / "out", [*given, "lengths=200", "keep=true"], quick=True)
    monkeypatch.setattr(long_context, "convert", lambda *args, **kwargs: pytest.fail("a student was made"))
    again = run_experiment("long_context", tmp_path / "out", [*given, "lengths=128,200", "keep=true"], quick=True)

    def by_key(record):
        return {(row["student"], row["task"], row["length"]): row for row in record.rows}

    assert by_key(again) == by_key(whole)
    model, tokenizer = load_checkpoint(tmp_path / "out" / "nystrom-0-25-retrieval")
    assert model.conversion_report.groups
    assert tokenizer is not None
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"nystrom-0-25-retrieval"}


def test_a_student_of_other_options_is_not_taken_for_the_one_asked_for(tmp_path):
    """As after a run that was killed before its first row: no record says yet what the student in the folder is."""
    given = [*FEW, "tasks=kv", "students=nystrom", "keep=true"]
    run_experiment("long_context", tmp_path, [*given, "steps=1"], quick=True)
    (tmp_path / "long_context.json").unlink()
    with pytest.raises(ValueError, match="keep: .*nystrom' holds a student of another fit, .*'steps': 1, .*'steps': 2"):
        run_experiment("long_context", tmp_path, [*given, "steps=2"], quick=True)
    (tmp_path / "nystrom" / long_context.NOTE).unlink()
    with pytest.raises(ValueError, match="holds no long_context_student.json"):
        run_experiment("long_context", tmp_path, given, quick=True)


@pytest.mark.parametrize("select", ["error", "probe"])
def test_one_fit_serves_all_shares(tmp_path, monkeypatch, select):
    """By error it is the fit of each share, by probe the same heads retrieve."""
    given = ["students=nystrom+retrieval", "shares=0.25,0.5", f"select={select}", "lengths=200", "tasks=perplexity"]
    # A config without a number of key heads.
    given += HERE[:2] if select == "error" else []
    own = run_experiment("long_context", tmp_path / "own", [*given, "keep=true"], quick=True)
    fits, real = [], long_context.convert

    def counted(*args, options, **kwargs):
        fits.append(options)
        return real(*args, options=options, **kwargs)

    monkeypatch.setattr(long_context, "convert", counted)
    made, share = [], long_context.FittedOnce.with_share
    monkeypatch.setattr(long_context.FittedOnce, "with_share", lambda *args: made.append(share(*args)) or made[-1])
    shared = run_experiment("long_context", tmp_path / "shared", [*given, "refit=false"], quick=True)
    assert len(fits) == 1
    assert (shared.rows == own.rows) == (select == "error")
    for student, row in zip(made, own.rows, strict=True):
        kept, _ = load_checkpoint(tmp_path / "own" / re.sub(r"\W+", "-", row["student"]))
        blocks = [model.config.distattn["modules"] for model in (student, kept)]
        retrieving = [
            {
                (name, *group["heads"])
                for name, entry in block.items()
                for group in entry["groups"]
                if group.get("beyond")
            }
            for block in blocks
        ]
        assert retrieving[0] == retrieving[1] != set()


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


@pytest.mark.parametrize(("window", "sinks", "length"), [(7, 2, 40), (300, 4, 520), (1, 0, 9), (50, 4, 20)])
def test_the_compensation_token_is_its_formula(window, sinks, length):
    """Against a row at a time; where all is seen, against PyTorch's own attention."""
    torch.manual_seed(0)
    query, (key, value) = torch.randn(2, 4, length, 8), torch.randn(2, 2, 2, length, 8)
    out = compensation_token.attention(query, key, value, 0.3, window, sinks)
    key, value = (tensor.repeat_interleave(2, 1).double() for tensor in (key, value))
    for i in range(length):
        between = [j for j in range(i + 1) if sinks <= j <= i - window]
        read = [j for j in range(i + 1) if j not in between]
        keys, values = key[:, :, read], value[:, :, read]
        logits = keys @ query[:, :, i, :, None].double() * 0.3
        if between:
            mean = key[:, :, between].mean(2, keepdim=True)
            rest = mean @ query[:, :, i, :, None].double() * 0.3 + math.log(len(between))
            logits = torch.cat((logits, rest), 2)
            values = torch.cat((values, value[:, :, between].mean(2, keepdim=True)), 2)
        torch.testing.assert_close(
            out[:, :, i].double(), (logits.softmax(2).mT @ values)[:, :, 0], atol=1e-5, rtol=1e-4
        )
    if window >= length:
        plain = F.scaled_dot_product_attention(query, key.float(), value.float(), is_causal=True, scale=0.3)
        torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-4)


def test_the_compensated_model_reads_whole_texts_alone():
    """With a window over the whole text it is the teacher; a cache and padding are refused; the teacher is kept."""
    model, tokenizer = load_checkpoint(GPT2_ENGLISH)
    ids = tokenizer("The quick brown fox jumps over the lazy dog", return_tensors="pt").input_ids
    with torch.no_grad():
        plain = model(ids).logits
        control = compensation_token.compensated(model, 64, 4)
        torch.testing.assert_close(control(ids).logits, plain, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(compensation_token.compensated(model, 2, 1)(ids).logits, plain, atol=1e-2)
        torch.testing.assert_close(model(ids).logits, plain)
        cache = control(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="without a cache and padding"):
            control(ids[:, :1], past_key_values=cache)
        mask = torch.ones_like(ids)
        mask[:, 0] = 0
        with pytest.raises(ValueError, match="without a cache and padding"):
            control(ids, attention_mask=mask)


def test_what_the_compensation_token_would_leave_out_is_refused():
    """Before anything is read: a cap, learned sinks, a window of the model's own."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, attn_logit_softcapping=0.5))
    mistral = MistralForCausalLM(MistralConfig(**sizes, sliding_window=8))
    for model, name in ((capped, "attn_logit_softcapping"), (mistral, "sliding_window")):
        with pytest.raises(ValueError, match=f"for full attention alone, and {type(model).__name__} has {name}"):
            compensation_token.compensated(model, 4, 1)
