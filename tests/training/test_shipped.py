"""A path of configs/ is the package's own file where the working directory has none of that name, and said so."""

from pathlib import Path

import pytest

from distattn_hf.commands.shared import check_config
from distattn_hf.data.config import read_specs, read_yaml
from distattn_hf.data.shipped import CONFIGS, find_config
from tests.conversion.models import gpt2
from tests.test_cli import distattn

NAME = "configs/training/minilm_l1.yaml"


def test_the_packages_own_where_there_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = CONFIGS / "training" / "minilm_l1.yaml"
    assert find_config(NAME) == own
    assert read_yaml(NAME, "config")["teacher"] == "minilm"
    check_config(Path(NAME))
    assert capsys.readouterr().err == f"config: {own}, the package's own\n"


def test_a_file_of_the_working_directory_comes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / NAME
    mine.parent.mkdir(parents=True)
    mine.write_text("teacher: mine")
    assert read_yaml(NAME, "config") == {"teacher": "mine"}
    check_config(mine.relative_to(tmp_path))
    assert capsys.readouterr().err == ""


def test_a_spec_that_is_the_packages_own_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    name = "configs/attention/l2.yaml"
    said = [f"spec file: {CONFIGS / 'attention' / 'l2.yaml'}, the package's own"]
    assert read_specs(name)[0].metric == "l2"
    assert caplog.messages == said
    gpt2().save_pretrained(tmp_path / "teacher")
    run = distattn("convert", tmp_path / "teacher", tmp_path / "out", "--spec", name, "--init", "plain")
    assert f"warning: {said[0]}" in run.stderr.splitlines()
    assert "the package's own" not in run.stdout
    caplog.clear()
    mine = tmp_path / name
    mine.parent.mkdir(parents=True)
    mine.write_text("metric: l1")
    assert read_specs(name)[0].metric == "l1"
    assert caplog.messages == []


@pytest.mark.parametrize(
    "name", ["configs/training/none.yaml", "training/minilm_l1.yaml", "/configs/attention/l2.yaml"]
)
def test_nothing_else_is_looked_for_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"config '{name}' does not exist"):
        read_yaml(name, "config")
