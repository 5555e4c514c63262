"""What the command line answers without torch, and what an import of the package leaves for later."""

import os
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from distattn_hf import cli
from distattn_hf.commands import choices, flags, shared
from distattn_hf.conversion.beyond import SELECTIONS
from distattn_hf.conversion.convert import INITS
from distattn_hf.core import attention_spec
from distattn_hf.core.metrics import BUILT_IN
from distattn_hf.evaluation.classification import KINDS
from distattn_hf.evaluation.retrieval_tasks import LONG_TEXT_TASKS


@pytest.fixture
def distattn(tmp_path):
    """The command line in an environment where an import of torch is an error."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "COLUMNS": "80"}

    def run(*arguments):
        command = [sys.executable, "-m", "distattn_hf.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return run


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], ["convert", "-h"], ["benchmark", "--help"]])
def test_help_needs_no_torch(distattn, arguments):
    run = distattn(*arguments)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "minilm", "OUT", "--metric", "l3"], "unknown metric 'l3'; --metric is one of sqeuclidean ("),
        (
            ["convert", "minilm", "OUT", "--metric", "retreival"],
            "did you mean --mechanism retrieval? --metric is one",
        ),
        (["convert", "minilm", "OUT", "--mechanism", "nystroem"], "--mechanism must be one of distance, nystrom"),
        (["convert", "minilm", "OUT", "--init", "best"], "--init must be one of exact, calibrated, plain, got 'best'"),
        (["convert", "minilm", "OUT", "--metric", "lp", "--p", "0.5"], "--p must be a finite number >= 1, got 0.5"),
        (["convert", "minilm", "OUT", "--metric", "l2", "--p", "3"], "--p 3 was given with --metric l2"),
        (["convert", "minilm", "OUT", "--exact-below", "-1"], "--exact-below must be an integer >= 0, got -1"),
        (["convert", "minilm", "OUT", "--max-error", "0"], "--max-error must be a positive finite number, got 0"),
        (["convert", "minilm", "OUT"], "--init calibrated needs --calibration"),
        (["convert", "./none", "OUT", "--init", "exact"], "folder './none' does not exist"),
        (["evaluate", "./none", "--data", "news"], "folder './none' does not exist"),
        (["evaluate", "minilm", "--data", "news", "--max-texts", "0"], "--max-texts must be an integer >= 1, got 0"),
        (["evaluate", "minilm", "--task", "passkeys"], "--task must be one of passkey, needle, kv, perplexity, gen"),
        (["evaluate", "minilm", "--task", "kv", "--lengths", "1k"], "--lengths must be whole numbers separated by com"),
        (["evaluate", "minilm", "--task", "kv", "--max-tokens", "9"], "--max-tokens does nothing with --task kv"),
        (["evaluate", "minilm", "--data", "news", "--depths", "0"], "--depths does nothing without --task"),
        (["evaluate", "minilm"], "--data must be given"),
        (["analyse", "minilm", "--out", "OUT"], "give either --text or --data"),
        (["push", "./none", "me/x"], "'none' is not a folder"),
        (["adapt", "none.yaml"], "config 'none.yaml' does not exist"),
        (["experiment", "long_contex"], "unknown experiment 'long_contex'; did you mean long_context?"),
        (["experiment", "long_context", "--config", "none.yaml"], "config 'none.yaml' does not exist"),
        (["train", "none.yaml"], "config 'none.yaml' does not exist"),
    ],
)
def test_bad_arguments_are_refused_without_torch(distattn, tmp_path, arguments, message):
    run = distattn(*[tmp_path / "out" if a == "OUT" else a for a in arguments])
    assert run.returncode == 1
    assert run.stderr.startswith("error: ")
    assert message in run.stderr


def test_names_known_without_torch_are_those_of_the_package():
    assert {name: metric.aliases for name, metric in BUILT_IN.items()} == choices.METRICS
    assert {
        "mechanism": attention_spec.MECHANISMS,
        "select": SELECTIONS,
        "init": INITS,
        "attention": attention_spec.ATTENTION_KINDS,
        "transform": attention_spec.TRANSFORMS,
        "beyond": attention_spec.BEYOND,
        "task": (*LONG_TEXT_TASKS, "ruler", *KINDS),
    } == choices.CHOICES


@pytest.mark.parametrize("arguments", [[], ["convert"], ["evaluate"], ["push"], ["benchmark"], ["experiment"]])
def test_help_is_not_cut(arguments):
    text = CliRunner().invoke(cli.app, [*arguments, "--help"], env={"COLUMNS": "80"}).output
    cut = [line for line in text.splitlines() if re.search(r"(\\.\\.\\.|…)$", line)]
    assert text
    assert not [line for line in cut if "[OPTIONS]" not in line]


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("max_error=0.3 is for mechanism='nystrom', which no spec has",
         "--max-error 0.3 is for --mechanism 'nystrom', which no spec has"),
        ("lam (λ) must be a positive finite number, got -1", "--lam (λ) must be a positive finite number, got -1"),
        ("short texts: set exact_below=2048", "short texts: set --exact-below 2048"),
        ("steps must be None or an integer >= 0, got -1", "--steps must be an integer >= 0, got -1"),
        ("fold_alpha=True needs spec", "--fold-alpha needs spec"),
        ("data file '/a/max_error/init=1' does not exist", "data file '/a/max_error/init=1' does not exist"),
        ("layers= names no layer", "layers= names no layer"),
    ],
)  # fmt: skip
def test_messages_name_flags(message, shown):
    options = ["metric", "mechanism", "init", "lam", "steps", "max_error", "exact_below", "fold_alpha", "spec_file"]
    assert flags.as_flags(message, options) == shown


LIGHT = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, AutoConfig
before = set(sys.modules)
import distattn_hf
heavy = {"torch._dynamo", "transformers.modeling_utils", "scipy.optimize"}
print("HEAVY", sorted(heavy & (set(sys.modules) - before)))
from distattn_hf.core.configuration_native import DistAttnConfig
sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 20}
print(type(AutoModelForCausalLM.from_config(DistAttnConfig(is_decoder=True, mechanism="l1", **sizes))).__name__)
try:
    DistAttnConfig(mechanism="l11", **sizes)
except ValueError as error:
    print("REFUSED", "l11" in str(error))
config = AutoConfig.for_model("distattn_bert", intermediate_size=16, distattn={"specs": [{"metric": "l2"}]}, **sizes)
print(type(AutoModel.from_config(config)).__name__, set(distattn_hf.__all__) <= set(dir(distattn_hf)))
print([n for n in distattn_hf.__all__ if not hasattr(distattn_hf, n)])
"""


def test_the_package_imports_no_model_until_one_is_asked_for():
    run = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False)
    assert run.stdout.splitlines() == [
        "HEAVY []", "DistAttnForCausalLM", "REFUSED True", "DistAttnBertModel True", "[]"
    ], run.stderr[-2000:]  # fmt: skip


def test_ctrl_c_says_how_to_go_on(capsys):
    with pytest.raises(typer.Exit) as stopped, shared.resumable("out/run"):
        raise KeyboardInterrupt
    assert stopped.value.exit_code == 130
    assert "The same command again goes on from the last checkpoint in out/run" in capsys.readouterr().err
