"""How an experiment runs: its options as they are written, its rows kept and not measured twice."""

import json
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest

from distattn_hf.experiments import EXPERIMENTS, run_experiment
from distattn_hf.experiments.record import Record
from distattn_hf.experiments.run_experiment import describe, load_experiment, read_options


@dataclass(frozen=True)
class Options:
    """sizes: how large; rate: how fast."""

    sizes: tuple[int, ...] = (1, 2)
    names: tuple[str, ...] = ("a",)
    rate: float = 0.5
    limit: int | None = None
    loud: bool = False
    word: str = "x"


@pytest.fixture
def squares(monkeypatch):
    """An experiment that notes what it measures, and stops where `stop_at` says."""
    module = ModuleType("distattn_hf.experiments.squares", "Squares.")
    module.Options, module.QUICK, module.AXES = Options, {"sizes": [1]}, ("sizes",)
    module.measured, module.stop_at = [], None

    def run(options, results):
        for size in options.sizes:

            def measure(size=size):
                if size == module.stop_at:
                    raise KeyboardInterrupt
                module.measured.append(size)
                return {"square": size * size, "worst": float("inf"), "all": [size]}

            results.row({"size": size}, measure)

    module.run = run
    module.figures = lambda results, folder: (folder / "squares.svg").write_text(str(len(results.rows)))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_a_run_that_was_cut_off_goes_on(squares, tmp_path):
    said = []
    squares.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        run_experiment.run_experiment("squares", tmp_path / "new", ["sizes=1,3,2"], echo=said.append)
    file = tmp_path / "new" / "squares.json"
    assert [row["key"] for row in json.loads(file.read_text())["rows"]] == [{"size": 1}]
    assert not (tmp_path / "new" / "squares.svg").exists()
    squares.stop_at = None
    results = run_experiment.run_experiment("squares", tmp_path / "new", ["sizes=1,3,2"], echo=said.append)
    assert squares.measured == [1, 3, 2]
    assert results.rows == [{"size": n, "square": n * n, "worst": None, "all": [n]} for n in (1, 3, 2)]
    assert [line.partition("  (")[0] for line in said] == [f"size {n}:  square {n * n}  worst None" for n in (1, 3, 2)]
    content = json.loads(file.read_text())
    assert [row["run"] for row in content["rows"]] == [0, 1, 1]
    assert {"distattn_hf", "torch", "transformers", "commit", "cpu", "threads", "date"} <= content["runs"][0].keys()
    assert content["runs"][1]["options"]["sizes"] == [1, 3, 2]
    assert [path.name for path in (tmp_path / "new").glob("*")] == ["squares.json", "squares.svg"]


def test_other_options_are_refused_by_name_but_more_rows_are_not(squares, tmp_path):
    run_experiment.run_experiment("squares", tmp_path, ["sizes=1"])
    run_experiment.run_experiment("squares", tmp_path, ["sizes=1,4"])
    assert squares.measured == [1, 4]
    before = (tmp_path / "squares.json").read_bytes()
    with pytest.raises(ValueError, match=r"rate is 0.7, and .*squares.json' holds rows of rate=0.5; .*--out"):
        run_experiment.run_experiment("squares", tmp_path, ["sizes=9", "rate=0.7"])
    assert (tmp_path / "squares.json").read_bytes() == before
    with pytest.raises(ValueError, match="must be a record of experiment 'cubes', got one of 'squares'"):
        Record(tmp_path / "squares.json", "cubes", Options())
    (tmp_path / "squares.json").write_text('{"experiment": "squares", "rows": []}')
    with pytest.raises(ValueError, match="is no whole record of an experiment: it lacks options, runs"):
        Record(tmp_path / "squares.json", "squares", Options())


def test_a_file_that_is_older_than_an_option_had_its_default(squares, tmp_path):
    run_experiment.run_experiment("squares", tmp_path)
    path = tmp_path / "squares.json"
    old = json.loads(path.read_text())
    del old["options"]["rate"]
    path.write_text(json.dumps(old))
    run_experiment.run_experiment("squares", tmp_path, ["sizes=3"])
    assert squares.measured == [1, 2, 3]
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match="rate is 0.25, and .* holds rows of rate=0.5"):
        run_experiment.run_experiment("squares", tmp_path, ["rate=0.25"])


def test_a_key_is_a_whole_key(tmp_path):
    """A row of two keys is not taken for one of its first; values and key have names of their own."""
    results = Record(tmp_path / "r.json", "r", Options(), echo=lambda line: None)
    assert results.row({"a": 1, "b": (2,)}, lambda: {"v": 1}) == {"a": 1, "b": [2], "v": 1}
    assert results.row({"a": 1}, lambda: {"v": 2})["v"] == 2
    assert results.row({"b": (2,), "a": 1}, lambda: 1 / 0)["v"] == 1
    with pytest.raises(ValueError, match=r"other names than its key, got \['a'\]"):
        results.row({"a": 7}, lambda: {"a": 2})


def test_options_come_from_defaults_file_quick_and_command_line_in_this_order(squares, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("sizes: [5, 6]\nrate: 1\nword: file")
    assert read_options(squares, file, ()) == Options(sizes=(5, 6), rate=1.0, word="file")
    assert read_options(squares, file, ["word=typed", "limit=3"], quick=True) == Options(
        (1,), ("a",), 1.0, 3, False, "typed"
    )
    assert read_options(squares, None, ["names=b,c", "sizes=7", "loud=true"]) == Options((7,), ("b", "c"), loud=True)
    assert isinstance(read_options(squares, file, ()).rate, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size=3", "unknown key 'size' in experiment squares; did you mean sizes?"),
        ("sizes=1,x", r"sizes must be tuple\[int, ...\], got \(1, 'x'\)"),
        ("sizes=1.5", r"sizes must be tuple\[int, ...\], got \(1.5,\)"),
        ("rate=fast", "rate must be float, got 'fast'"),
        ("limit=x", r"limit must be int \| None, got 'x'"),
        ("loud=1", "loud must be bool, got 1"),
        ("word", "override must be key=value, got 'word'"),
    ],
)
def test_options_of_another_type_are_refused(squares, text, message):
    with pytest.raises(ValueError, match=message):
        read_options(squares, None, [text])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_keeps_the_contract(name):
    """And its quick options are options."""
    module = load_experiment(name)
    options = read_options(module, None, (), quick=True)
    assert options != module.Options()
    assert set(getattr(module, "AXES", ())) <= set(vars(options))
    assert all(field in describe(module) for field in vars(options))
