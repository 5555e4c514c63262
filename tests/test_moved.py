"""What had another name or form before works, or says the new one."""

import importlib
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distattn_hf import AttentionSpec, ConversionReport, convert
from distattn_hf.analysis.statistics import measure
from distattn_hf.moved import MOVED
from distattn_hf.storage.folders import change_options
from distattn_hf.storage.runs import ARGUMENTS, RunFolder
from tests.conversion.models import gpt2, token_batch
from tests.without_package import HIDE_PACKAGE

OLD = Path(__file__).parent / "fixtures" / "old_checkpoints"


@pytest.mark.parametrize("name", MOVED)
def test_a_module_of_before_says_where_it_is(name):
    assert find_spec(f"distattn_hf.{MOVED[name]}")
    with pytest.raises(ModuleNotFoundError, match=f"distattn_hf.{name} is distattn_hf.{MOVED[name]} now"):
        importlib.import_module(f"distattn_hf.{name}")


def test_a_module_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="No module named 'distattn_hf.nowhere'"):
        importlib.import_module("distattn_hf.nowhere")


def load_without_package(folder, tmp_path, monkeypatch):
    """Logits of the folder's own code in a process that cannot import the package."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = HIDE_PACKAGE + (
        "import torch\nhide_package()\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()\n"
        f"torch.save(model(torch.arange(1, 13)[None]).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-1500:]
    return torch.load(tmp_path / "logits.pt")


@pytest.mark.parametrize("change", ["options", "config"])
def test_an_old_folder_that_is_changed_still_runs_without_the_package(change, tmp_path, monkeypatch):
    folder = tmp_path / "old"
    shutil.copytree(OLD / "distance", folder)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(torch.arange(1, 13)[None]).logits
    if change == "options":
        change_options(folder, backend="reference")
        assert json.loads((folder / "config.json").read_text())["distattn"]["specs"][0]["backend"] == "reference"
    else:
        AutoConfig.from_pretrained(folder).save_pretrained(folder)
    torch.testing.assert_close(load_without_package(folder, tmp_path, monkeypatch), expected, rtol=0, atol=1e-5)


def test_a_report_is_read_as_the_dict_it_was():
    report = convert(gpt2(), AttentionSpec("l2"), init="plain").conversion_report
    data = report.to_dict()
    assert dict(report) == dict(report.items()) == data
    assert [*report] == [*data]
    assert ("init" in report, "nothing" in report) == (True, False)
    assert (report.get("init"), report["groups"], report.get("nothing", 3)) == ("plain", data["groups"], 3)
    assert ConversionReport.from_dict(report) == report
    assert ConversionReport.from_dict({**data, "mine": 1}) == report
    with pytest.raises(ValueError, match="a conversion report must have base_architecture, init, groups, got only a"):
        ConversionReport.from_dict({"a": 1})


def test_a_run_in_the_words_of_before_goes_on(tmp_path):
    (tmp_path / "transfer").mkdir()
    (tmp_path / ARGUMENTS).write_text(json.dumps({"spec": {"metric": "l2", "transform": "linear"}, "stages": []}))
    RunFolder(tmp_path, {"spec": {"metric": "l2", "transform": "maps"}, "stages": []}, None).check(stages=("transfer",))
    with pytest.raises(ValueError, match="holds a run with spec="):
        RunFolder(tmp_path, {"spec": {"metric": "l1", "transform": "maps"}, "stages": []}, None).check()


def test_a_model_of_a_checkpoints_own_code_is_not_analysed():
    model = convert(gpt2(), AttentionSpec("l2"), init="plain")
    model.attention_modules()["h.0.attn"].distattn = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="runs the code that came with its checkpoint"):
        measure(model, [token_batch(model)])
