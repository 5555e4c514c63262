"""The experiment `patterns` in its quick setting, on the self-trained GPT-2."""

import math

import pytest

from distattn_hf.data.sources import calibration_and_held_out
from distattn_hf.experiments.run_experiment import run_experiment
from tests.fixtures.load import GPT2_ENGLISH


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patterns")
    given = [f"checkpoint={GPT2_ENGLISH}", f"data={GPT2_ENGLISH / 'heldout.txt'}", f"folders={GPT2_ENGLISH}"]
    results = run_experiment("patterns", folder, given, quick=True)
    assert (folder / "patterns.png").exists()
    return {(row["attention"], row["init"]): row for row in results.rows}


def test_rows(rows):
    assert list(rows) == [("dot", "teacher"), ("l2", "plain"), ("l2", "calibrated"), (str(GPT2_ENGLISH), "scratch")]
    for row in rows.values():
        assert 0 < row["entropy"] < math.log(32)
        assert 0 < row["distance"] < 31
        assert row["distance"] == pytest.approx(sum(row["distance_by_layer"]) / 4, abs=1e-3)
        assert sum(row["pattern_counts"].values()) == 4 * 4


def test_the_teacher_by_its_folder_is_the_teacher(rows):
    teacher, again = rows["dot", "teacher"], rows[str(GPT2_ENGLISH), "scratch"]
    names = ("entropy", "sparsity", "distance", "perplexity", "output_cosine")
    assert [teacher[name] for name in names] == [again[name] for name in names]
    assert teacher["output_cosine"] is None


def test_a_fit_is_nearer_than_none(rows):
    plain, fitted = rows["l2", "plain"], rows["l2", "calibrated"]
    assert fitted["output_cosine"] > plain["output_cosine"]
    assert fitted["correlation"] > plain["correlation"]
    assert fitted["perplexity"] < plain["perplexity"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("inits=exact", "inits must be among plain, calibrated, got 'exact'"),
        ("max_length=1", "max_length must be >= 2, got 1"),
    ],
)
def test_bad_options(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_experiment("patterns", tmp_path / "out", [given], quick=True)


def test_texts_that_calibrate_are_not_measured(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(f"text {i}" for i in range(25)))
    calibration, held_out = calibration_and_held_out(str(file))
    assert calibration == [f"text {i}" for i in range(23)]
    assert held_out == ["text 23", "text 24"]
    file.write_text("one text")
    with pytest.raises(ValueError, match="data must hold two texts or more"):
        calibration_and_held_out(str(file))
