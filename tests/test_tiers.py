"""The table of tiers, against the tests there are."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import COLLECTED
from tests.tiers import MANY, SHARE, TABLE, TIERS, TOGETHER, beyond_the_sample, left_out, lines, tier_of, together

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("entry", [*TABLE, *TOGETHER])
def test_every_entry_names_a_test_that_is_there(entry, request):
    path, _, name = entry.partition("::")
    assert (ROOT / path).exists()
    if name:
        names = [node.name for node in ast.parse((ROOT / path).read_text()).body if hasattr(node, "name")]
        function, _, parameters = name.partition("[")
        assert function in names if parameters else any(each.startswith(name) for each in names)
        # Of a file that this run collected, what stands in the brackets, too.
        nodes = [node for node in request.config.stash[COLLECTED] if node.startswith(f"{path}::")]
        assert not nodes or any(node.startswith(entry) for node in nodes)
    assert TABLE.get(entry, "unit") in TIERS


def test_the_longest_entry_decides():
    assert tier_of("tests/core/test_masks.py::test_no_mask_says_nothing") == "unit"
    assert tier_of("tests/core/test_triton.py::TestCompiler::test_kernels_compile_without_a_gpu[80]") == "system"
    assert tier_of("tests/conversion/test_save_load.py::test_config_and_report_travel") == "model"


def test_of_a_table_of_many_cases_a_part_runs_each_time():
    """Every third, and the first of each metric; a table that is short, or concerns every file, stays whole."""
    few = [f"tests/core/test_cpp.py::test_few[l1-{n}]" for n in range(MANY - 1)]
    many = [f"tests/core/test_cpp.py::test_many[{metric}-{n}]" for metric in ("l1", "cosine") for n in range(50)]
    whole = [f"tests/core/test_layering.py::test_files[{n}]" for n in range(200)]
    beyond = beyond_the_sample([*few, *many, *whole])
    assert beyond < set(many)
    kept = [name for name in many if name not in beyond]
    assert 100 / SHARE <= len(kept) <= 100 / SHARE + 2
    assert sum("cosine" in name for name in kept) >= 50 // SHARE
    # One alone, as a caller names it, is no table.
    assert not beyond_the_sample(many[1:2])


def test_what_is_left_out_is_said():
    pushes = [(f"tests/hub/test_push.py::{name}", "system") for name in "ab"]
    counts = left_out([*pushes, ("tests/quality/test_quality.py::c", "quality")])
    said = lines(counts)
    assert [line.split(" (")[0] for line in said] == ["left out of system", "left out of quality"]
    assert said[0].endswith(": 2 tests: hub/test_push.py 2")


SHARED = """
import os, pytest
@pytest.mark.parametrize("number", range(8))
def test_it(number, worker_id):
    with open(os.environ["WORKERS"], "a") as file:
        file.write(f"{os.environ['GROUP']} {worker_id}\\n")
"""


def test_what_shares_a_fixture_runs_in_one_worker(tmp_path):
    """Whatever pytest-xdist's own groups do; other tests are divided."""
    together_file, other = tmp_path / "tests" / "test_release.py", tmp_path / "tests" / "test_other.py"
    together_file.parent.mkdir()
    (tmp_path / "conftest.py").write_text("from tests.tiers import scheduler as pytest_xdist_make_scheduler\n")
    for file in (together_file, other):
        file.write_text(SHARED.replace("os.environ['GROUP']", repr(file.stem)))
    environment = {**os.environ, "WORKERS": str(tmp_path / "workers"), "PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "--import-mode=importlib"]
    run = subprocess.run(
        [*command, "--rootdir", tmp_path, "tests"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    workers = [line.split() for line in (tmp_path / "workers").read_text().splitlines()]
    assert len(workers) == 16
    assert len({worker for name, worker in workers if name == "test_release"}) == 1


def test_names_that_share_a_fixture():
    assert together("tests/hub/test_push.py::test_the_card_on_the_hub") == "tests/hub/test_push.py"
    assert together("tests/core/test_masks.py::test_no_mask") == "tests/core/test_masks.py::test_no_mask"


def test_every_tier_has_its_command():
    script = (ROOT / "scripts" / "test.sh").read_text()
    assert all(tier in script for tier in TIERS)
