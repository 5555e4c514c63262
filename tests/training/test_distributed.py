"""Two processes with gloo, really started, give the losses of one process with twice the batch."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conversion.models import llama
from tests.training.rows import values
from tests.training.worker import CASES, losses

ROOT = Path(__file__).parents[2]
# float32 sums in another order, 6e-8 each, through five steps of Adam, whose first steps are about signs. A wrong scale
# of the gradients or of the loss is a factor 2.
RELATIVE = 5e-4


def start(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    return ended


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found: see `tests.training.worker`."""
    out = tmp_path_factory.mktemp("two") / "losses.json"
    start(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
          "--rdzv-endpoint", "localhost:0", "-m", "tests.training.worker", str(out))  # fmt: skip
    found = json.loads(out.read_text())
    assert found["processes"] == 2
    return found


@pytest.mark.parametrize(
    "number",
    range(len(CASES)),
    ids=["-".join(map(str, (*case[:4], *(name for anneal in case[5:] for name in anneal)))) for case in CASES],
)
def test_two_processes_are_one_with_twice_the_batch(two, number):
    expected = losses(CASES[number], 1)
    *training, evaluation = expected
    found = two["losses"][number]
    assert found[:-1] == pytest.approx(training, rel=RELATIVE)
    assert found[-1] == pytest.approx(evaluation, rel=RELATIVE)
    # The losses differ from step to step by much more than the tolerance.
    assert max(training) - min(training) > 20 * RELATIVE * training[0]


def test_short_texts_give_every_landmark_a_gradient(two):
    """With `exact_below` no landmark is used in a short text; DDP stops where a parameter gets no gradient at all."""
    assert two["steps"] == dict.fromkeys(("llama", "bert", "DistAttnForCausalLM", "DistAttnForMaskedLM"), 2)


def test_the_accelerate_loop_with_the_config_for_two_cpu_processes(tmp_path, monkeypatch):
    config = values(tmp_path, llama(), stages=["transfer", "distillation"], train_sampling_strategy="sequential",
                    max_steps=3, save_steps=100)  # fmt: skip
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    script = str(ROOT / "scripts" / "adapt_accelerate.py")
    monkeypatch.setattr(sys, "argv", [script, str(path), f"output_dir={tmp_path / 'one'}"])
    runpy.run_path(script, run_name="__main__")
    shutil.copytree(tmp_path / "one" / "calibrated", tmp_path / "two" / "calibrated")
    launch = (ROOT / "configs" / "accelerate" / "two_processes_cpu.yaml").read_text().splitlines()[0].split()[1:4]
    assert launch[:2] == ["accelerate", "launch"]
    start(sys.executable, "-m", "accelerate.commands.launch", "--config_file",
          "configs/accelerate/two_processes_cpu.yaml", "--main_process_port", "0", script, str(path),
          f"output_dir={tmp_path / 'two'}", "per_device_train_batch_size=2")  # fmt: skip
    for stage in ("transfer", "distillation"):
        one, other = (json.loads((tmp_path / f / stage / "losses.json").read_text()) for f in ("one", "two"))
        assert other == pytest.approx(one, rel=RELATIVE)
