"""Spec files: every one under configs/attention loads, and bad ones say what is wrong."""

from pathlib import Path

import pytest

from distattn_hf import AttentionSpec, convert
from distattn_hf.benchmark.command import read_config as read_benchmark
from distattn_hf.data.config import parse_specs, parse_yaml, read_mapping, read_specs
from tests.conversion.models import gpt2

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
    [("metrik: l2", "AttentionSpec has no field 'metrik'"), ("l2", "must hold a mapping"), ("{", "is not YAML")],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "spec.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_specs(tmp_path / "spec.yaml")
    with pytest.raises(ValueError, match="does not exist"):
        read_specs(tmp_path / "none.yaml")


NUMBERS = {"1e-3": 1e-3, "1.5e3": 1500.0, "-2E+1": -20.0, ".5e-1": 0.05, "1.0e-3": 1e-3, "7": 7, "1e": "1e", "e3": "e3"}


@pytest.mark.parametrize(("text", "number"), NUMBERS.items())
def test_every_reader_knows_the_numbers_of_yaml_1_2(tmp_path, text, number):
    path = tmp_path / "c.yaml"
    path.write_text(f"value: {text}\nlist: [{text}]\nquoted: '{text}'\n")
    wanted = {"value": number, "list": [number], "quoted": text}
    for read in (lambda path: read_mapping(path, "config"), read_benchmark, lambda p: parse_yaml(p.read_text(), "x")):
        found = read(path)
        assert found == wanted
        assert type(found["value"]) is type(number)


def test_lambda_with_an_exponent_in_a_spec_file(tmp_path):
    (tmp_path / "spec.yaml").write_text("metric: l2\nlam: 1e-3\n")
    assert read_specs(tmp_path / "spec.yaml") == [AttentionSpec("l2", lam=1e-3)]


def test_names_and_fields_stand_for_specs():
    wanted = [AttentionSpec("l2")]
    for spec in ("l2", AttentionSpec("l2"), {"metric": "l2"}, ["l2"], ("l2",), iter(["l2"])):
        assert parse_specs(spec) == wanted
    assert parse_specs("nystrom") == [AttentionSpec(mechanism="nystrom")]
    mixed = ["l1", AttentionSpec("cosine", layers=[0]), {"metric": "lp", "p": 3}]
    assert parse_specs(mixed) == [AttentionSpec("l1"), mixed[1], AttentionSpec("lp", p=3)]


@pytest.mark.parametrize(("name", "metric"), [("l2", "l2"), ("Manhattan", "l1"), ("linf", "chebyshev")])
def test_convert_by_name(name, metric):
    for spec in (name, [name]):
        student = convert(gpt2(), spec, init="plain")
        assert [group["metric"] for group in student.conversion_report["groups"]] == [metric] * 2


def test_convert_by_names_and_specs_together():
    student = convert(gpt2(), [AttentionSpec("cosine", layers=[0]), "l1"], layers="1", init="plain")
    assert [group["metric"] for group in student.conversion_report["groups"]] == ["cosine", "l1"]
