"""`distattn train` and `distattn compare`: native models from scratch on a little real text, resumed and compared."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer
from typer.testing import CliRunner

from distattn_hf.cli import app
from distattn_hf.data.tokenizer import byte_level_bpe
from distattn_hf.evaluation.score import evaluate_model
from distattn_hf.experiments.native_comparison import compare, read_comparison, table
from distattn_hf.storage.models import load_checkpoint
from distattn_hf.training import from_scratch
from distattn_hf.training.arguments_scratch import parse_scratch_config, read_scratch_config
from distattn_hf.training.from_scratch import train_from_scratch

ROOT = Path(__file__).parents[2]
TEXT = str(ROOT / "tests/fixtures/gpt2-english/heldout.txt")
PAIRS = str(ROOT / "tests/fixtures/t5-g2p/heldout.tsv")
MODEL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mechanism": "l2"}
CASES = {
    "causal-lm": (AutoModelForCausalLM, {"max_length": 32}),
    "masked-lm": (AutoModelForMaskedLM, {"max_length": 32}),
    "seq2seq": (AutoModelForSeq2SeqLM, {"source_column": "word", "target_column": "phonemes", "max_length": 40}),
}


def values(out, task="causal-lm", **changed) -> dict:
    data = PAIRS if task == "seq2seq" else TEXT
    common = {
        "model": dict(MODEL), "task": task, "tokenizer": {"vocab_size": 300}, "train_data": data, "eval_data": data,
        "max_train_samples": 64, "max_eval_samples": 4, "per_device_train_batch_size": 4, "max_steps": 6,
        "learning_rate": 3e-3, "save_steps": 2, "logging_steps": 2, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "seed": 0, "output_dir": str(out),
    }  # fmt: skip
    return {**common, **CASES[task][1], **changed}


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("task", CASES)
def test_each_task_trains_scores_and_reloads(task, tmp_path):
    config = parse_scratch_config(values(tmp_path / "run", task, max_steps=30))
    result = train_from_scratch(config)
    model = CASES[task][0].from_pretrained(tmp_path / "run/final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/final")
    assert type(model).__module__.endswith(("modeling_distattn", "modeling_distattn_seq2seq"))
    assert model.config.mechanism in ("l2", "distance")
    assert model.config.vocab_size == len(tokenizer) == 300
    assert result["parameters"] == model.num_parameters()
    assert json.loads((tmp_path / "run/scores.json").read_text()) == result
    assert [step for step, _ in result["curve"]] == list(range(2, 31, 2))
    # It begins at a uniform guess among 300 tokens, and 30 steps are enough to see that it learns.
    assert result["curve"][0][1] == pytest.approx(math.log(300), abs=0.7)
    assert result["scores"]["loss"] < math.log(300) - 0.5
    assert result["scores"]["perplexity"] == pytest.approx(math.exp(result["scores"]["loss"]))


def test_a_run_that_was_cut_off_ends_with_the_same_weights(tmp_path):
    whole = train_from_scratch(parse_scratch_config(values(tmp_path / "whole")))
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    for path in (cut / "final", cut / "checkpoint-6"):
        shutil.rmtree(path)
    (cut / "scores.json").unlink()
    resumed = train_from_scratch(parse_scratch_config(values(cut)))
    first, second = weights(tmp_path / "whole/final"), weights(cut / "final")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed["scores"] == whole["scores"]
    assert resumed["curve"] == whole["curve"]


def test_a_finished_run_is_not_done_again_and_another_one_is_refused(tmp_path):
    first = train_from_scratch(parse_scratch_config(values(tmp_path)))
    saved = (tmp_path / "final/model.safetensors").stat().st_mtime_ns
    assert train_from_scratch(parse_scratch_config(values(tmp_path))) == first
    assert (tmp_path / "final/model.safetensors").stat().st_mtime_ns == saved
    other = parse_scratch_config(values(tmp_path, model={**MODEL, "mechanism": "l1"}))
    with pytest.raises(ValueError, match="holds a run with model="):
        train_from_scratch(other)


def test_a_run_that_came_to_nothing_binds_no_other(tmp_path, monkeypatch):
    from distattn_hf.training.trainer import AdaptationTrainer

    with monkeypatch.context() as patch:
        patch.setattr(AdaptationTrainer, "train", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_from_scratch(parse_scratch_config(values(tmp_path, learning_rate=1.0)))
    assert (tmp_path / "arguments.json").exists()
    train_from_scratch(parse_scratch_config(values(tmp_path)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": "abc"}, "learning_rate must be a number, got 'abc'"),
        ({"task": "embedding"}, "task must be one of causal-lm"),
        ({"model": None}, "model must be given"),
        ({"model": {**MODEL, "hiden_size": 3}}, "hiden_size"),
        ({"model": {**MODEL, "vocab_size": 3}}, "model.vocab_size comes from the tokenizer"),
        ({"model": {**MODEL, "is_decoder": False}}, "model.is_decoder comes from the task"),
        ({"model": {**MODEL, "hidden_size": 33}}, "hidden_size must be a multiple of num_attention_heads"),
        ({"model": {**MODEL, "mechanism": "l7"}}, "l7"),
        ({"tokenizer": {"vocab_size": 100}}, "tokenizer.vocab_size must be an integer >= 260"),
        ({"tokenizer": {"size": 300}}, "size"),
        ({"tokeniser": "x"}, "tokenizer"),
        ({"train_data": None}, "train_data must be given"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_from_scratch(parse_scratch_config({**values(tmp_path / "run"), **changed}))
    assert not (tmp_path / "run").exists()


def test_model_files_and_overrides(tmp_path):
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(MODEL))
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values(tmp_path / "run", model=str(tmp_path / "model.yaml"))))
    config = read_scratch_config(tmp_path / "train.yaml", ["model.mechanism=l1", "max_steps=3"])
    assert config.scratch.model_config(vocab_size=300).metric == "l1"
    assert config.scratch.model_config().is_decoder
    assert config.training.max_steps == 3
    # The command reads the file twice, and knows of the model's file only the second time.
    run = CliRunner().invoke(app, ["train", str(tmp_path / "train.yaml"), "model.mechanism=l7"])
    assert "unknown mechanism 'l7'" in str(run.exception)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values(tmp_path, model="nowhere.yaml")))
    with pytest.raises(ValueError, match="model 'nowhere.yaml' does not exist"):
        read_scratch_config(tmp_path / "train.yaml")


def test_byte_level_bpe_gives_back_any_text():
    tokenizer = byte_level_bpe(["in the beginning"] * 3, 270)
    for text in ("In the beginning God", "naïve 猫 🙂\n\ttab"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>", "<mask>"]) == [0, 1, 2, 3]
    ended = byte_level_bpe(["in the beginning"], 270, add_end=True)
    assert ended("in the")["input_ids"] == [*tokenizer_ids(ended, "in the"), 2]


def tokenizer_ids(tokenizer, text) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_compare_trains_each_choice_with_each_seed_and_goes_on(tmp_path, monkeypatch):
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values("unused", save_strategy="no")))
    (tmp_path / "compare.yaml").write_text(
        yaml.safe_dump(
            {
                "base": str(tmp_path / "train.yaml"),
                "set": {"max_steps": 4},
                "choices": {
                    "dot": {"set": {"model.mechanism": "dot"}, "seeds": [0, 1]},
                    "linear": {"set": {"model.mechanism": "linear"}},
                },
                "output_dir": str(tmp_path / "out"),
            }
        )
    )
    comparison = read_comparison(tmp_path / "compare.yaml", ["learning_rate=1.0e-3"])
    results = compare(comparison)
    assert {choice: list(runs) for choice, runs in results.items()} == {"dot": ["0", "1"], "linear": ["0"]}
    assert results["dot"]["0"]["scores"] != results["dot"]["1"]["scores"]
    saved = json.loads((tmp_path / "out/dot-1/arguments.json").read_text())
    assert (saved["model"]["mechanism"], saved["seed"], saved["max_steps"]) == ("dot", 1, 4)
    assert saved["learning_rate"] == 1e-3
    assert json.loads((tmp_path / "out/comparison.json").read_text()) == results
    assert (tmp_path / "out/comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out/comparison.svg").read_text()
    lines = table(results).splitlines()
    scores = [run["scores"]["perplexity"] for run in results["dot"].values()]
    assert lines[2].split("|")[2].strip() == f"{sum(scores) / 2:.2f}"
    assert lines[3].split("|")[3].strip() == "", "one seed has no standard deviation"
    assert {run["provenance"]["torch"] for runs in results.values() for run in runs.values()} == {torch.__version__}
    # Of the run, and not of the call that reads it again.
    monkeypatch.setattr("distattn_hf.experiments.native_comparison.provenance", lambda device: {})
    assert compare(comparison) == results


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"choices": {}}, "choices must be a mapping"),
        ({"seeds": [0.5]}, "seeds must be a list of different integers"),
        ({"choices": {"a": {"sets": {}}}}, "sets"),
        ({"choices": {"a": {"set": {"model.mechanism": "l7"}}}}, "l7"),
        ({"choices": {"a/../../b": None}}, "a name is made of letters"),
        ({"choices": {1: None, "1": None}}, "a name is made of letters"),
        ({"seeds": [0, 0]}, "different integers"),
        ({"set": [1]}, "set must be a mapping"),
        ({"set": {"seed": 7}}, "set.seed is set by the comparison; use seeds"),
        ({"choices": {"a": None, "b": {"set": {"task": "masked-lm"}}}}, "choices must have one task"),
        ({"choice": {}}, "choice"),
    ],
)
def test_a_wrong_comparison_is_refused(changed, message, tmp_path):
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values("unused")))
    config = {"base": str(tmp_path / "train.yaml"), "choices": {"a": None}, "output_dir": str(tmp_path / "out")}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump({**config, **changed}))
    with pytest.raises(ValueError, match=message):
        read_comparison(tmp_path / "compare.yaml")


def test_a_seed_for_all_runs_is_refused(tmp_path):
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values("unused")))
    config = {"base": str(tmp_path / "train.yaml"), "choices": {"a": None}, "output_dir": str(tmp_path / "out")}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="seed=5.*each choice has seeds of its own"):
        read_comparison(tmp_path / "compare.yaml", ["seed=5"])


def test_a_tokenizer_of_a_run_that_failed_is_not_taken_for_another(tmp_path, monkeypatch):
    monkeypatch.setattr(from_scratch, "AdaptationTrainer", lambda *_, **__: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        train_from_scratch(parse_scratch_config(values(tmp_path)))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "tokenizer")) == 300
    monkeypatch.undo()
    train_from_scratch(parse_scratch_config(values(tmp_path, tokenizer={"vocab_size": 320}, max_steps=1)))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "final")) == 320


def test_missing_evaluation_data_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="eval_data must be given"):
        train_from_scratch(parse_scratch_config(values(tmp_path / "run", eval_data=None)))
    assert not (tmp_path / "run").exists()


def test_what_was_trained_loads_with_its_head_and_is_evaluated(tmp_path):
    train_from_scratch(parse_scratch_config(values(tmp_path, max_steps=1)))
    model, tokenizer = load_checkpoint(str(tmp_path / "final"))
    assert type(model).__name__ == "DistAttnForCausalLM"
    assert evaluate_model(model, tokenizer, ["in the beginning " * 20])["perplexity"] > 1
