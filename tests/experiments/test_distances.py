"""The experiment `distances` in its quick setting, and the numbers that it takes of a matrix."""

import pytest
import torch
from scipy.stats import spearmanr

from distattn_hf.experiments import distances
from distattn_hf.experiments.run_experiment import run_experiment


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distances")
    results = run_experiment("distances", folder, ["metrics=l2,sqeuclidean"], quick=True)
    assert {path.name for path in folder.glob("*.png")} == {"distances_l2.png", "distances_sqeuclidean.png"}
    return results.rows


def test_rows(rows):
    # Of each kind of points and metric: indyk, jl, svd, and two methods of two strategies.
    assert len(rows) == 2 * 2 * (3 + 2 * 2)
    assert {tuple(row["ranks"]) for row in rows} == {(4, 6, 8, 16)}
    floors = {(row["points"], row["metric"]): row["relative_error"] for row in rows if row["method"] == "svd"}
    for row in rows:
        floor = floors[row["points"], row["metric"]]
        if row["method"] != "jl":
            assert all(error >= least * 0.999 - 1e-12 for error, least in zip(row["relative_error"], floor))
        assert row["error_at_root_n"] == row["relative_error"][1]
        assert row["below_10_percent_at_root_n"] == (row["error_at_root_n"] < 0.1)
    assert all(row["entries_read"] == [1] * 4 for row in rows if row["method"] == "svd")


def test_squared_distances_are_exact_from_d_plus_2_on(rows):
    """d = 4: rank 6, of which every method of low rank reads all there is."""
    for row in rows:
        if row["metric"] == "sqeuclidean" and row["method"] != "jl":
            assert max(row["relative_error"][1:]) < 1e-8
            assert min(row["spearman"][1:]) > 0.999


def test_spearman_is_scipys():
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(500, generator=generator, dtype=torch.float64).round(decimals=1)
    right = (left + torch.randn(500, generator=generator, dtype=torch.float64)).round(decimals=1)
    assert distances.rank_correlation(left, right) == pytest.approx(spearmanr(left, right).statistic)


def test_a_power_law_is_found():
    ranks = [4, 8, 16, 32]
    assert distances.power_law(ranks, [3 * k**-0.5 for k in ranks]) == {"slope": -0.5, "slope_r2": 1.0}
    assert distances.power_law(ranks, [0.1, 0.05, 1e-16, 1e-16]) == {"slope": None, "slope_r2": None}


def test_clusters_are_clusters():
    x, y = distances.draw_points("clusters", 200, 0, dimensions=8, num_clusters=3)
    nearest = torch.cdist(x, y).amin(1)
    assert float(nearest.mean()) < 4 < float(torch.cdist(x, y).amax(1).mean())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "points=spiral",
            "points must be among gaussian, clusters, smollm2, smollm2_before_rotary, minilm, got 'spiral'",
        ),
        ("methods=pca", "methods must be among indyk, nystrom, cur, jl, svd, got 'pca'"),
        ("strategies=grid", "strategies must be among"),
        ("sizes=0", "sizes must be integers >= 1"),
        ("seeds=0", "seeds must be >= 1, got 0"),
    ],
)
def test_bad_options(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_experiment("distances", tmp_path / "out", [given], quick=True)
    assert not (tmp_path / "out").exists()
