"""Every file under configs/ is read by what reads it, and its first line is a command that names it."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from distattn_hf.core.encodings import POSITIONAL_ENCODINGS
from distattn_hf.data.config import read_specs
from distattn_hf.experiments.native_comparison import read_comparison
from distattn_hf.training.arguments import read_config
from distattn_hf.training.arguments_scratch import read_scratch_config

ROOT = Path(__file__).parents[2]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))
OF = {f: [p for p in FILES if p.parts[1] == f] for f in ("attention", "training", "accelerate", "model")}
NATIVE = [p for p in OF["training"] if p.name.startswith("native_")]

DISTANCES = ("sqeuclidean", "l2", "l1", "lp", "cosine", "chebyshev")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_first_line_is_the_command_that_uses_it(path):
    first = (ROOT / path).read_text().splitlines()[0]
    assert first.startswith("# ")
    assert str(path) in first


@pytest.mark.parametrize("path", OF["attention"], ids=str)
def test_attention(path):
    assert read_specs(ROOT / path)


@pytest.mark.parametrize("path", OF["training"], ids=str)
def test_training(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    if path in NATIVE:
        config = read_scratch_config(path, ["use_cpu=true"])
        assert config.training.max_steps > 0
    else:
        config = read_config(path, ["use_cpu=true"])
        for stage in config.adaptation.stages:
            assert config.training_for(stage).max_steps > 0
            config.adaptation.options_for(stage)
    # What it writes goes under out/, which git ignores, in a folder of its own.
    assert config.training.output_dir.startswith("out/")
    others = [yaml.safe_load((ROOT / p).read_text())["output_dir"] for p in OF["training"] if p != path]
    assert config.training.output_dir not in others


@pytest.mark.parametrize("path", OF["model"], ids=str)
def test_model(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = path.read_text().splitlines()[0].split()[3:]
    values = read_scratch_config(command[0], command[1:]).scratch.model
    assert values == yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", OF["accelerate"], ids=str)
def test_accelerate(path):
    config = load_config_from_file(str(ROOT / path))
    assert isinstance(config, ClusterConfig)
    command = (ROOT / path).read_text().splitlines()[0].split()[3:]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert arguments.num_processes == config.num_processes
    text = (ROOT / path).read_text().splitlines()[1]
    assert text.startswith(("# Run here", "# Not run"))


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[1] not in OF], ids=str)
def test_what_others_test_is_a_mapping(path):
    """configs/experiments is read by tests of its own."""
    assert isinstance(yaml.safe_load((ROOT / path).read_text()), dict)


@pytest.mark.parametrize(
    ("name", "field", "expected"),
    [
        ("native_comparison", "mechanism", {"dot", "nystrom", "performer", "linear", *DISTANCES}),
        ("native_encodings", "positional_encoding", set(POSITIONAL_ENCODINGS)),
    ],
)
def test_comparisons(name, field, expected, monkeypatch):
    """Each choice is a model that can be; metrics and encodings that are registered are all among them."""
    monkeypatch.chdir(ROOT)
    comparison = read_comparison(f"configs/experiments/{name}.yaml", ["use_cpu=true"])
    configs = {choice: runs[0].scratch.model for choice, runs in comparison.runs.items()}
    assert {config[field] for config in configs.values()} == expected
    assert set(configs) == expected


def test_no_kind_is_missing():
    assert {p.parts[1] for p in FILES} == {"attention", "training", "accelerate", "experiments", "evaluation", "model"}
