"""Spec files: every one under configs/attention loads, and bad ones say what is wrong."""

from pathlib import Path

import pytest

from distattn_hf import AttentionSpec
from distattn_hf.conversion.specs import read_specs

FILES = sorted((Path(__file__).parents[2] / "configs" / "attention").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_shipped_files_load_and_name_their_command(path):
    assert all(isinstance(spec, AttentionSpec) for spec in read_specs(path))
    assert path.read_text().startswith("# distattn convert ")


def test_a_mixed_plan_keeps_its_order():
    specs = read_specs(next(p for p in FILES if p.name == "mixed.yaml"))
    assert [spec.metric for spec in specs] == ["l2", "cosine"]
    assert specs[1].heads == (0, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [("metrik: l2", "unknown AttentionSpec field 'metrik'"), ("l2", "must hold a mapping"), ("{", "is not YAML")],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "spec.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_specs(tmp_path / "spec.yaml")
    with pytest.raises(ValueError, match="does not exist"):
        read_specs(tmp_path / "none.yaml")
