"""What is released: sdist and wheel are built and in order, and a wheel has all that the commands need without a clone.

scripts/check_release.sh installs it with its dependencies in an environment of its own, and uses it.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
# What the working tree has beside the files of the release.
IGNORED = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "build", "dist", "out")

# In an interpreter that finds the installed package first: templates, and configs by the names that help texts use.
USE = """
import sys; sys.path.insert(0, sys.argv[1])
import distattn_hf.hub.card as card
from distattn_hf.experiments.native_comparison import read_comparison
from distattn_hf.experiments.run_experiment import load_experiment, read_options
from distattn_hf.training.arguments import read_config
print(card.__file__)
comparison = read_comparison("configs/experiments/native_comparison.yaml")
assert len(comparison.runs) == 10
assert comparison.runs["l1"][0].scratch.model["hidden_size"] == 320
assert max(read_options(load_experiment("long_context"), "configs/experiments/long_context.yaml", ()).lengths) == 8192
assert read_config("configs/training/minilm_l1.yaml", ["use_cpu=true"]).adaptation.stages
print(card.read_template())
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist and the wheel that was made of it; building writes into the tree, so of a copy."""
    folder = tmp_path_factory.mktemp("release")
    shutil.copytree(ROOT, folder / "source", ignore=IGNORED, symlinks=True)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source"]
    run = subprocess.run(build, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:] + run.stdout[-3000:]
    return folder / "dist"


def test_both_are_in_order(built):
    names = sorted(path.name.partition("-")[2] for path in built.iterdir())
    version = names[0].partition("-")[0]
    assert names == [f"{version}-py3-none-any.whl", f"{version}.tar.gz"]
    check = [sys.executable, "-m", "twine", "check", "--strict", *built.iterdir()]
    run = subprocess.run(check, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("PASSED") == 2


def test_a_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("distattn_hf-")}
    package = ROOT / "distattn_hf"
    expected = {path for path in package.rglob("*") if path.suffix in (".py", ".html", ".md")}
    expected |= {package / path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    assert held == {path.relative_to(ROOT).as_posix() for path in expected}
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert held | {"LICENSE", "README.md", "setup.cfg", "pyproject.toml"} <= inside
    assert not [name for name in inside if name.startswith(("model_cards", "configs", "tests/fixtures"))]


def test_an_installed_wheel_needs_no_clone(built, tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps", "--no-index"]
    prefix = tmp_path / "prefix"
    subprocess.run([*pip, "--ignore-installed", "--prefix", prefix, *built.glob("*.whl")], check=True)
    (site,) = prefix.rglob("site-packages")
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", USE, site], capture_output=True, text=True, check=False, cwd=tmp_path, env=alone
    )
    assert run.returncode == 0, run.stderr[-3000:]
    where, _, template = run.stdout.partition("\n")
    assert Path(where).is_relative_to(prefix)
    assert template.strip() == (ROOT / "distattn_hf" / "hub" / "card_template.md").read_text(encoding="utf-8").strip()


def test_the_changelog_begins_with_the_version_that_is_built(built):
    (wheel,) = built.glob("*.whl")
    version = wheel.name.split("-")[1]
    changes = (ROOT / "model_cards" / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = [line for line in changes.splitlines() if line.startswith("## ")]
    assert headings[0].split()[1] == version


def test_the_readme_can_be_cited():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    entry = text.partition("```bibtex\n")[2].partition("```")[0]
    version = next(
        line for line in (ROOT / "distattn_hf" / "__init__.py").read_text().splitlines() if "__version__ =" in line
    )
    number = yaml.safe_load(version.partition("=")[2])
    assert f"version = {{{number}}}" in entry
    # The same in the form that tools read; the top level has no place for it, so the README says where it is.
    assert "](model_cards/CITATION.cff)" in text
    cited = yaml.safe_load((ROOT / "model_cards" / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["version"] == number
    assert cited["title"] in entry.replace("\\_", "_")
    assert f"{{{{{cited['authors'][0]['name']}}}}}" in entry.replace("\\_", "_")
    assert f"license = {cited['license']}" in (ROOT / "setup.cfg").read_text(encoding="utf-8").splitlines()


def test_what_the_check_keeps_lies_where_the_caller_said(tmp_path):
    """FOLDER is the caller's, not the repository's; the tools that build are stood in for."""
    stub = tmp_path / "python"
    stub.write_text(
        '#!/usr/bin/env bash\ncase "$*" in\n'
        '"-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/twine";;\n'
        '"-m build "*) mkdir -p "$4"; touch "$4/it.whl";;\nesac\n'
    )
    stub.chmod(0o755)
    (caller := tmp_path / "caller").mkdir()
    for folder, place in (("kept/here", caller / "kept" / "here"), (tmp_path / "whole", tmp_path / "whole")):
        command = ["bash", ROOT / "scripts" / "check_release.sh", folder]
        subprocess.run(command, cwd=caller, env=os.environ | {"PYTHON": str(stub)}, check=True, capture_output=True)
        assert [file.name for file in place.iterdir()] == ["it.whl"]
    assert not (ROOT / "kept").exists()
    subprocess.run(command[:2], cwd=caller, env=os.environ | {"PYTHON": str(stub)}, check=True, capture_output=True)
    assert sorted(path.name for path in caller.iterdir()) == ["kept"]
