"""A path of configs/ is the package's own file where the working directory has none of that name, and said so."""

from pathlib import Path

import pytest

from distattn_hf.commands.shared import check_config
from distattn_hf.data.config import read_yaml
from distattn_hf.data.shipped import CONFIGS, find_config

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


@pytest.mark.parametrize(
    "name", ["configs/training/none.yaml", "training/minilm_l1.yaml", "/configs/attention/l2.yaml"]
)
def test_nothing_else_is_looked_for_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"config '{name}' does not exist"):
        read_yaml(name, "config")
