"""A run that is killed and started again ends with the weights of one that was not, bit for bit."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from distattn_hf.evaluation.scorecard import Scorecard
from distattn_hf.training.adapt import adapt
from distattn_hf.training.arguments import parse_config
from tests.conversion.models import gpt2
from tests.training.rows import values

ROOT = Path(__file__).parents[2]

# Kills itself without warning where a step of a stage begins, or while a checkpoint's files are being written.
KILLED = """
import os, signal, sys
import distattn_hf.training.trainer as module
from distattn_hf.training.adapt import adapt
from distattn_hf.training.arguments import read_config

where, stage, step = sys.argv[2], sys.argv[3], int(sys.argv[4])
method = {"step": "training_step", "save": "_save_optimizer_and_scheduler"}[where]
original = getattr(module.AdaptationTrainer, method)

def killed(self, *arguments, **options):
    if self.stage.name == stage and self.state.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments, **options)

setattr(module.AdaptationTrainer, method, killed)
adapt(read_config(sys.argv[1]))
"""


def given(folder, **changes):
    """Dropout is on, so the random state matters; α is annealed, so the step does."""
    return values(
        folder, gpt2(), stages=["transfer", "distillation"], anneal={"alpha": 0.8}, dropout=True, save_total_limit=2,
        gradient_accumulation_steps=2, per_device_train_batch_size=2, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(the configuration, the folder of an uninterrupted run)."""
    folder = tmp_path_factory.mktemp("whole")
    config = given(folder)
    adapt(parse_config(config))
    return config, folder / "run"


SCRIPT = str(ROOT / "scripts" / "adapt_accelerate.py")


def loop(monkeypatch, path, stop=None):
    """Run the Accelerate loop; with `stop`, it is cut off where that step begins."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, str(path)])
    names = runpy.run_path(SCRIPT)
    step, original = [0], names["train_step"]

    def stopping(*arguments):
        step[0] += 1
        if step[0] == stop:
            raise KeyboardInterrupt
        return original(*arguments)

    names["main"].__globals__["train_step"] = stopping
    names["main"]()


@pytest.mark.parametrize(
    ("where", "stage", "step", "left"),
    [("step", "transfer", 3, "checkpoint-2"), ("save", "distillation", 4, "checkpoint-2")],
)
def test_killed_and_started_again(tmp_path, whole, where, stage, step, left):
    config, expected = whole
    config = {**config, "output_dir": str(tmp_path / "run")}
    shutil.copytree(expected / "calibrated", tmp_path / "run" / "calibrated")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "c.yaml"), where, stage, str(step)]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    complete = [p.parent.name for p in (tmp_path / "run" / stage).glob("checkpoint-*/trainer_state.json")]
    assert complete == [left]
    assert not (tmp_path / "run" / stage / "final").exists()
    if where == "save":
        # It was cut off in the middle of this one.
        assert (tmp_path / "run" / stage / f"checkpoint-{step}" / "model.safetensors").exists()
    card = adapt(parse_config(config))
    for name in ("transfer", "distillation"):
        one, other = (load_file(run / name / "final" / "model.safetensors") for run in (expected, tmp_path / "run"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    reference = Scorecard.load(expected / "student")
    for row in reference.rows:
        mine = card.row(row.name)
        assert (mine.score, mine.tokens, mine.trained_parameters) == (row.score, row.tokens, row.trained_parameters)


def test_killed_between_training_and_saving_the_student(tmp_path, whole, monkeypatch):
    """All steps are done, but the stage's result is not there: it is made from the last checkpoint."""
    config, expected = whole
    shutil.copytree(expected / "calibrated", tmp_path / "run" / "calibrated")
    with monkeypatch.context() as patched:
        # They go with the stage's result, which is about to be missing.
        patched.setattr("distattn_hf.storage.runs.remove_checkpoints", lambda folder: None)
        adapt(parse_config({**config, "output_dir": str(tmp_path / "run")}))
    for path in ("distillation/final", "student"):
        shutil.rmtree(tmp_path / "run" / path)
    adapt(parse_config({**config, "output_dir": str(tmp_path / "run")}))
    one, other = (load_file(run / "student" / "model.safetensors") for run in (expected, tmp_path / "run"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_accelerate_loop_resumes_and_agrees_with_the_trainer(tmp_path, monkeypatch):
    """Same data in the same order: the two drivers' losses are the same numbers, resumed or not."""
    config = values(tmp_path, gpt2(), stages=["transfer", "distillation"], train_sampling_strategy="sequential",
                    anneal={"alpha": 0.8}, dropout=True, logging_steps=1, max_grad_norm=0.5)  # fmt: skip
    adapt(parse_config({**config, "output_dir": str(tmp_path / "trainer")}))

    def run(folder, stop=None):
        path = tmp_path / f"{folder}.yaml"
        path.write_text(yaml.safe_dump({**config, "output_dir": str(tmp_path / folder)}))
        if not (tmp_path / folder).exists():
            shutil.copytree(tmp_path / "trainer" / "calibrated", tmp_path / folder / "calibrated")
        loop(monkeypatch, path, stop)

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop=9)  # in distillation, after its step 2 was saved
    run("cut")
    for stage in ("transfer", "distillation"):
        final = [load_file(tmp_path / f / stage / "final" / "model.safetensors") for f in ("whole", "cut", "trainer")]
        for key, tensor in final[0].items():
            assert torch.equal(tensor, final[1][key]), (stage, key)
            # The same operations in the same order; dropout is drawn from the same generator.
            torch.testing.assert_close(tensor, final[2][key], rtol=1e-5, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy must be one of random, sequential"),
        ({"stage_options": {"transfer": {"train_sampling_strategy": "group_by_length"}}}, "transfer.train_sampling_st"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last=True: this loop does not do that"),
        ({"streaming": True}, "streaming=True: this loop does not do that"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0: this loop"),
        ({"stage_options": {"distillation": {"bf16": True}}}, "stage_options.distillation.bf16=True: all stages"),
    ],
)
def test_the_accelerate_loop_refuses_what_it_does_not_do(changes, message, tmp_path, monkeypatch):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(values(tmp_path, gpt2(), **changes)))
    with pytest.raises(ValueError, match=message):
        loop(monkeypatch, path)
    assert not (tmp_path / "run").exists()


def test_the_accelerate_loop_goes_through_the_data_again(tmp_path, monkeypatch):
    """In whole steps an epoch, the last one of fewer batches, and from where it stopped in the fourth epoch."""
    config = values(tmp_path, gpt2(), stages=["distillation"], train_sampling_strategy="sequential", max_steps=12,
                    max_train_samples=14, gradient_accumulation_steps=2, save_steps=5, calibration_steps=1)  # fmt: skip

    def run(folder, stop=None):
        path = tmp_path / f"{folder}.yaml"
        path.write_text(yaml.safe_dump({**config, "output_dir": str(tmp_path / folder)}))
        if folder != "whole" and not (tmp_path / folder).exists():
            shutil.copytree(tmp_path / "whole" / "calibrated", tmp_path / folder / "calibrated")
        loop(monkeypatch, path, stop)

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop=8)
    assert [path.name for path in (tmp_path / "cut" / "distillation").iterdir()] == ["checkpoint-5"]
    run("cut")
    assert not list((tmp_path / "cut").rglob("checkpoint-*"))
    whole, cut = (tmp_path / f / "distillation" for f in ("whole", "cut"))
    assert len(json.loads((cut / "losses.json").read_text())) == 12
    assert json.loads((cut / "losses.json").read_text()) == json.loads((whole / "losses.json").read_text())
    expected, found = (load_file(folder / "final" / "model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def test_a_run_of_the_other_driver_or_of_an_older_version_is_refused(tmp_path, monkeypatch):
    config = values(tmp_path, gpt2(), stages=["distillation"], max_steps=4, calibration_steps=1)
    path, folder = tmp_path / "c.yaml", tmp_path / "run" / "distillation"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(KeyboardInterrupt):
        loop(monkeypatch, path, stop=3)
    with pytest.raises(ValueError, match=r"checkpoint-2' was saved by scripts/adapt_accelerate.py: go on with that"):
        adapt(parse_config(config))
    (folder / "checkpoint-2" / "loop_state.json").rename(folder / "checkpoint-2" / "trainer_state.json")
    with pytest.raises(ValueError, match=r"checkpoint-2' was saved by transformers' Trainer"):
        loop(monkeypatch, path)
    (folder / "checkpoint-2").rename(folder / "state-2")
    with pytest.raises(ValueError, match="state-2' is of an unfinished run of an older version"):
        loop(monkeypatch, path)


def test_the_accelerate_loop_rounds_epochs_up(tmp_path, monkeypatch):
    config = values(tmp_path, gpt2(), stages=["transfer"], max_steps=-1, num_train_epochs=0.01)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    loop(monkeypatch, tmp_path / "c.yaml")
    assert len(json.loads((tmp_path / "run" / "transfer" / "losses.json").read_text())) == 1


def test_the_accelerate_loop_refuses_what_adapt_refuses(tmp_path, monkeypatch):
    config = values(tmp_path, gpt2(), stages=["distillation"], max_steps=1)
    path = tmp_path / "c.yaml"

    def refused(said, **changes):
        path.write_text(yaml.safe_dump({**config, **changes}))
        with pytest.raises(ValueError, match=said):
            loop(monkeypatch, path)

    late = {"distillation": {"train": "lora", "lora_targets": ["nope"]}}
    refused("nope", stages=["transfer", "distillation"], stage_options=late)
    assert not list((tmp_path / "run").glob("*/final"))
    path.write_text(yaml.safe_dump(config))
    loop(monkeypatch, path)
    refused(r"holds a run with stages=\['distillation'\]", stages=["transfer", "distillation"])
    refused("holds a run with learning_rate=0.001, now 0.002", learning_rate=2e-3)


def test_killed_in_the_middle_of_annealing_softening(tmp_path):
    """ε on its way to 0, λ with it: where it goes and from where is that of the run that was not killed."""
    config = given(tmp_path) | {"stages": ["distillation"], "anneal": {"softening": 0.0, "hold": 0.3}}
    adapt(parse_config({**config, "output_dir": str(tmp_path / "whole")}))
    shutil.copytree(tmp_path / "whole" / "calibrated", tmp_path / "run" / "calibrated")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "c.yaml"), "step", "distillation", "3"]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    stage = tmp_path / "run" / "distillation"
    calibrated, cut = (
        load_file(f / "model.safetensors") for f in (tmp_path / "run" / "calibrated", stage / "checkpoint-2")
    )
    moved = [cut[key] - tensor for key, tensor in calibrated.items() if key.endswith("log_softening")]
    # On its way: from the fitted ε, and not yet at the hundredth of it from where the last step is to 0.
    assert moved
    assert all(bool(((step < -0.1) & (step > -4.6)).all()) for step in moved)
    adapt(parse_config(config))
    one, other = (load_file(tmp_path / run / "student" / "model.safetensors") for run in ("whole", "run"))
    assert one.keys() == other.keys()
    assert not any("softening" in key for key in one)
    assert all(torch.equal(one[key], other[key]) for key in one)
    specs = [
        json.loads((tmp_path / run / "student" / "config.json").read_text())["distattn"]["specs"]
        for run in ("whole", "run")
    ]
    assert specs[0] == specs[1]
    assert specs[0][0]["softening"] == 0.0
