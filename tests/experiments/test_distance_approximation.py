"""Approximate distance matrices: never better than the best rank, exact where the rank is reached, entries counted."""

import pytest
import torch
from scipy.spatial.distance import cdist

from distattn_hf.functional.distance_approximation import (
    METHODS,
    METRICS,
    DistanceMatrix,
    _draw,
    approximate_distances,
    random_projection,
    relative_error,
    sample_optimal,
)
from distattn_hf.functional.landmarks import STRATEGIES

LOW_RANK = [method for method in METHODS if method != "jl"]
N, M, D = 40, 30, 5


def points(seed: int = 0, n: int = N, m: int = M, d: int = D):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, d, generator=generator, dtype=torch.float64),
        torch.randn(m, d, generator=generator, dtype=torch.float64) + 0.5,
    )


def oracle(x, y, metric: str) -> torch.Tensor:
    names = {"l2": "euclidean", "sqeuclidean": "sqeuclidean", "l1": "cityblock"}
    return torch.from_numpy(cdist(x.numpy(), y.numpy(), names[metric]))


class Counting(DistanceMatrix):
    """Notes which entries are read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = torch.zeros(self.shape, dtype=torch.bool)

    def rows(self, index):
        self.read[index] = True
        return super().rows(index)

    def columns(self, index):
        self.read[:, index] = True
        return super().columns(index)


@pytest.mark.parametrize("metric", METRICS)
def test_the_matrix_is_scipys(metric):
    x, y = points()
    torch.testing.assert_close(
        DistanceMatrix(x.float(), y.float(), metric).full(), oracle(x, y, metric), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("method", LOW_RANK)
def test_none_is_better_than_the_best_rank(method, metric):
    """Eckart and Young: the singular values beyond k are what every matrix of rank k misses at least."""
    x, y = points()
    exact = oracle(x, y, metric)
    for rank in (1, 4, 6, 12):
        found = approximate_distances(x, y, rank, method, metric, oversampling=2)
        assert (found.left.shape, found.right.shape) == ((N, rank), (rank, M))
        floor = torch.linalg.svdvals(exact)[rank:].norm() / exact.norm()
        error = relative_error(found.matrix(), exact)
        assert error >= floor - 1e-9
        if method == "svd":
            assert error == pytest.approx(float(floor), abs=1e-9)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("method", ["nystrom", "cur"])
def test_landmarks_recover_squared_distances(method, strategy):
    """‖x - y‖² has rank d + 2, so d + 2 landmarks in general position give all of it."""
    x, y = points()
    found = approximate_distances(x, y, D + 4, method, "sqeuclidean", strategy=strategy)
    assert relative_error(found.matrix(), oracle(x, y, "sqeuclidean")) < 1e-8
    assert found.entries_read == (D + 4) * (N + M + D + 4)


@pytest.mark.parametrize("oversampling", [2, 3.5, 100])
def test_sampling_recovers_squared_distances(oversampling):
    x, y = points()
    found = approximate_distances(x, y, D + 4, "indyk", "sqeuclidean", oversampling=oversampling)
    assert relative_error(found.matrix(), oracle(x, y, "sqeuclidean")) < 1e-8


def test_sampling_is_near_the_best_rank_and_reads_little():
    x, y = points(n=300, m=260, d=16)
    exact = oracle(x, y, "l2")
    floor = relative_error(approximate_distances(x, y, 8, "svd").matrix(), exact)
    errors, reads = [], []
    for seed in range(5):
        distances = Counting(x, y, "l2")
        found = sample_optimal(distances, 8, seed=seed)
        errors.append(relative_error(found.matrix(), exact))
        reads.append(found.entries_read)
        assert found.entries_read == int(distances.read.sum())
    # A row and a column for the norms, then 32 draws of each: repeated draws and crossings count once.
    assert max(reads) <= (300 + 260) * 33
    assert sum(errors) / 5 < 1.3 * floor


def test_draws_are_weighted_without_bias():
    """E Σ w_i²·f_i = Σ f_i; for f ∝ the weights that draws go by, of every draw."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(50, generator=generator, dtype=torch.float64)
    index, scale = _draw(weights, 20, generator)
    assert len(index) < 20
    assert float((scale.square() * weights[index]).sum()) == pytest.approx(float(weights.sum()))


def test_sampling_does_not_miss_what_is_far():
    """One point of 400 that is far from all others has most of the matrix's norm."""
    x, y = points(n=50, m=400)
    y[123] += 1e3
    exact = oracle(x, y, "l2")
    for seed in range(10):
        found = approximate_distances(x, y, 2, "indyk", oversampling=2, seed=seed)
        assert relative_error(found.matrix(), exact) < 0.1


def test_more_entries_help():
    x, y = points(n=200, m=200, d=16)
    exact = oracle(x, y, "l1")
    few, many = (
        sum(
            relative_error(approximate_distances(x, y, 6, "indyk", "l1", oversampling=o, seed=s).matrix(), exact)
            for s in range(5)
        )
        for o in (1, 8)
    )
    assert many < few


@pytest.mark.parametrize("metric", METRICS)
def test_projections_agree_with_the_distances(metric):
    """In 4,000 dimensions a distance deviates by a few per cent, and no entry is read."""
    x, y = points()
    exact = oracle(x, y, metric)
    found = approximate_distances(x, y, 30, "jl", metric)
    assert (found.entries_read, *found.x.shape) == (0, N, 30)
    many = random_projection(DistanceMatrix(x, y, metric), 4000, seed=1)
    assert relative_error(many.matrix(), exact) < 0.05


def test_seeds_and_the_global_random_state():
    x, y = points()
    state = torch.random.get_rng_state()
    for method in METHODS:
        first, again, other = (
            approximate_distances(x, y, 3, method, "l2", strategy="random", oversampling=1, seed=seed).matrix()
            for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert torch.equal(first, other) == (method == "svd")
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("method", METHODS)
def test_equal_points(method, metric):
    """No norm to sample by, no spread, a singular matrix of landmarks."""
    x = torch.ones(6, 3)
    found = approximate_distances(x, x, 2, method, metric).matrix()
    # sqrt(1e-12) is what l2 gives points that are equal.
    torch.testing.assert_close(found, torch.zeros(6, 6, dtype=torch.float64), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 31}, r"rank must be an int from 1 to min\(n, m\) = 30, got 31"),
        ({"rank": 0}, "rank must be"),
        ({"method": "pca"}, "method must be one of indyk, nystrom, cur, jl, svd, got 'pca'"),
        ({"metric": "cosine"}, "metric must be one of l2, sqeuclidean, l1, got 'cosine'"),
        ({"method": "cur", "strategy": "grid"}, "landmark strategy"),
        ({"oversampling": 0.5}, "oversampling must be a finite number >= 1, got 0.5"),
        ({"seed": 1.5}, "seed must be an int"),
        ({"y": torch.zeros(30, 4)}, "x and y must agree in width"),
        ({"x": torch.zeros(3)}, "x must be a floating-point tensor"),
    ],
)
def test_bad_input(given, message):
    x, y = points()
    with pytest.raises(ValueError, match=message):
        approximate_distances(**{"x": x, "y": y, "rank": 3, **given})
