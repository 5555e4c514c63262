"""RULER by lm-eval's tasks at lengths of ours: the texts, the scores of models that know or do not, what is refused."""

import json
import random
from types import SimpleNamespace

import numpy
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distattn_hf import convert
from distattn_hf.data.config import read_mapping
from distattn_hf.evaluation import ruler
from distattn_hf.evaluation.ruler import FOLDER, TASKS, RulerOptions, evaluate_ruler, ruler_table
from distattn_hf.experiments.long_context import made_checkpoint
from distattn_hf.storage.folders import save_checkpoint
from tests.conversion.models import bert
from tests.test_cli import distattn


@pytest.fixture(scope="module")
def tiny():
    """A random Llama of 1,200 positions, and a tokenizer of words."""
    tokenizer = made_checkpoint()[1]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=2400,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


def one_that_knows(model, tokenizer):
    """Make a model go on with the number that the prompt has beside the key it asks for."""

    def generate(input_ids, **options):
        text = tokenizer.decode(input_ids[0])
        key = text.rpartition(" for ")[2].partition(" mentioned")[0]
        found = text.partition(f"for {key} is: ")[2].partition(".")[0]
        said = tokenizer(f" {found}", add_special_tokens=False, return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, said], dim=1)

    model.generate = generate
    return model


def test_the_files_include_lm_evals_and_name_each_task():
    files = {path.stem: read_mapping(path, "task") for path in FOLDER.glob("*.yaml")}
    assert set(files) == {*TASKS, "lengths"}
    for name in TASKS:
        assert files[name]["include"] == [f"lm_eval_ruler/{name}.yaml", "lengths.yaml"]
        assert files[name]["task"].startswith("short_")
    assert ruler.scored_lengths() == [512 * 2**n for n in range(9)]


def test_a_task_is_left_out_of_lengths_that_it_cannot_be_made_at():
    def tokenizer(factor):
        return lambda text, **options: {"input_ids": [0] * int(factor * ruler.SAMPLE_TOKENS)}

    of = {n: [t for t, least in TASKS.items() if n >= least] for n in (512, 1024, 2048)}
    assert [len(of[n]) for n in of] == [3, 5, 6]
    assert RulerOptions((512, 1024, 2048)).cells(tokenizer(1)) == [(task, n) for n in of for task in of[n]]
    # Twice the tokens a word: texts of twice the tokens.
    assert RulerOptions((1024, 2048)).cells(tokenizer(2)) == [(t, 2 * n) for n in (512, 1024) for t in of[n]]
    with pytest.raises(ValueError, match="one of 1024 or more for RULER"):
        RulerOptions((512,)).cells(tokenizer(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (1000,)}, r"lengths must be among 512, 1024, .*, got \(1000,\)"),
        ({"lengths": ()}, "lengths must be among"),
        ({"samples": 0}, "samples must be from 1 to lm-eval's 500 texts, got 0"),
        ({"samples": 501}, "got 501"),
    ],
)
def test_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RulerOptions(**options)


def test_models_are_refused_before_anything_runs(tiny, monkeypatch):
    monkeypatch.setattr(ruler, "require_lm_eval", lambda: None)
    monkeypatch.setattr(ruler, "_lay_out", lambda *args: pytest.fail("something ran"))
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="lengths must be at most 2336, the positions of 'it' .2400. less 64"):
        evaluate_ruler({"it": model}, tokenizer, RulerOptions((4096,)))
    with pytest.raises(ValueError, match="task 'ruler' needs a causal model, and 'it' is Bert"):
        evaluate_ruler({"it": bert()}, tokenizer, RulerOptions((1024,)))


def test_without_lm_eval_the_install_command_is_said(tiny, tmp_path, monkeypatch):
    save_checkpoint(*tiny, tmp_path / "model")
    monkeypatch.setattr(ruler, "find_spec", lambda name: None if name == "wonderwords" else SimpleNamespace())
    run = distattn("evaluate", tmp_path / "model", "--task", "ruler", check=False)
    assert run.stderr.splitlines()[-1].endswith("wonderwords is absent: pip install 'lm-eval[ruler]'")
    run = distattn("evaluate", tmp_path / "model", "--task", "ruler", "--data", "news", check=False)
    assert "--data does nothing with --task ruler" in run.stderr


def test_what_is_outside_is_left_as_it_was(tiny, monkeypatch):
    """Also after an error: what is drawn next, and where nltk looks, which had a deleted folder more for each call."""
    nltk = pytest.importorskip("nltk")
    model, tokenizer = tiny

    def stop(*args, **kwargs):
        random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
        nltk.data.path.append("nowhere")
        raise RuntimeError("stop")

    monkeypatch.setattr(ruler, "require_lm_eval", lambda: None)
    monkeypatch.setattr(ruler, "_lay_out", stop)

    def drawn():
        return random.random(), numpy.random.rand(), float(torch.rand(()))

    random.seed(7), numpy.random.seed(7), torch.manual_seed(7)
    expected, path = drawn(), list(nltk.data.path)
    random.seed(7), numpy.random.seed(7), torch.manual_seed(7)
    with pytest.raises(RuntimeError, match="stop"):
        evaluate_ruler({"it": model}, tokenizer, RulerOptions((2048,)))
    assert drawn() == expected
    assert nltk.data.path == path


def test_one_that_knows_finds_all_and_one_that_does_not_finds_nothing(tiny, monkeypatch):
    """By lm-eval's own tasks and scores."""
    monkeypatch.setattr(ruler, "TASKS", {"niah_single_1": 512, "niah_multikey_2": 512})
    model, tokenizer = tiny
    knows = one_that_knows(LlamaForCausalLM(model.config).eval(), tokenizer)
    options = RulerOptions((2048,), samples=3)
    import nltk

    path = list(nltk.data.path)
    random.seed(7)
    numpy.random.seed(7)
    expected = random.random(), numpy.random.rand()
    random.seed(7)
    numpy.random.seed(7)
    rows = evaluate_ruler({"knows": knows, "guesses": model}, tokenizer, options)
    assert (random.random(), numpy.random.rand()) == expected
    assert nltk.data.path == path
    assert [(row["model"], row["task"], row["length"]) for row in rows] == [
        (name, task, 2048) for task in ("niah_single_1", "niah_multikey_2") for name in ("knows", "guesses")
    ]
    assert [row["score"] for row in rows] == [1.0, 0.0, 1.0, 0.0]
    assert {row["samples"] for row in rows} == {3}
    assert "1.00" in ruler_table(rows)


def test_the_command_writes_what_a_card_shows(tiny, tmp_path, monkeypatch):
    """All tasks there are at a length, of a student, its control and its teacher."""
    model, tokenizer = tiny
    save_checkpoint(model, tokenizer, tmp_path / "teacher")
    save_checkpoint(convert(model, "retrieval"), tokenizer, tmp_path / "student")
    monkeypatch.setattr(ruler, "SAMPLE_TOKENS", 10**6)
    run = distattn(
        "evaluate", tmp_path / "student", "--against", tmp_path / "teacher", "--task", "ruler", "--lengths", "2048",
        "--samples", "1", "--control", "--out", tmp_path / "out",
    )  # fmt: skip
    assert "niah_single_1" in run.stdout
    assert "Max length" not in run.stdout
    written = json.loads((tmp_path / "out" / "ruler.json").read_text())
    assert len(written["rows"]) == 3 * 6
    card = distattn(
        "push", tmp_path / "student", "user/x", "--license", "mit", "--dry-run", "--results",
        tmp_path / "out" / "ruler.json",
    ).stdout  # fmt: skip
    assert "| **this checkpoint** | `niah_single_1` | 0% |" in card
    assert "config: vt, 2048 tokens" in card
