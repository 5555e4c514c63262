"""Landmarks against plain loops and NumPy, and what no strategy may do: look at padding or at another item."""

import math

import numpy as np
import pytest
import torch

from distattn_hf.functional import landmarks
from distattn_hf.functional.landmarks import STRATEGIES, register_landmark_strategy, select_landmarks
from tests.tolerances import STANDARD_ERRORS, assert_close

every_strategy = pytest.mark.parametrize("strategy", list(STRATEGIES))
# Their landmarks are points of the item.
SELECTING = ["uniform", "random", "kmeans++", "farthest", "rpcholesky"]
SEEDED = ["random", "kmeans", "kmeans_sample", "kmeans++", "rpcholesky"]


def clusters(sizes, spread, dim=8, distance=10.0, items=1):
    """Points (items, sum(sizes), dim) in shuffled order, and the cluster of each: cluster i around distance·e_i."""
    label = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])[torch.randperm(sum(sizes))]
    centre = distance * torch.eye(len(sizes), dim, dtype=torch.float64)
    return centre[label] + spread * torch.randn(items, len(label), dim, dtype=torch.float64), label


def objective(points, chosen):
    """Mean squared distance of the points (..., N, d) to the nearest landmark."""
    return (points[..., :, None, :] - chosen[..., None, :, :]).square().sum(-1).amin(-1).mean()


def positions(points, chosen):
    """Where in points (N, d), which are distinct, each landmark (m, d) stands; each must stand there exactly."""
    same = (points[None] == chosen[:, None]).all(-1)
    assert bool((same.sum(1) == 1).all()), "a landmark is not one of the points"
    return same.int().argmax(1)


def among_padding(points, layout):
    """points (..., N, d) with padding, and keep; what stands in the padding would show in any sum or maximum."""
    before, after = {"appended": (0, 45), "prepended": (70, 0), "around": (3, 130), "between": (0, 0)}[layout]
    length = points.shape[-2] + before + after
    place = torch.arange(before, before + points.shape[-2])
    if layout == "between":
        length = 2 * points.shape[-2] + 9
        place = torch.randperm(length)[: points.shape[-2]].sort().values
    garbage = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -7.0], dtype=points.dtype)
    padded = garbage[torch.randint(5, (*points.shape[:-2], length, points.shape[-1]))]
    padded[..., place, :] = points
    keep = torch.zeros(length, dtype=torch.bool)
    keep[place] = True
    return padded, keep


@pytest.mark.parametrize(("number", "m"), [(12, 4), (13, 4), (15, 4), (7, 7), (9, 1), (40, 13)])
def test_segment_means_equal_a_plain_loop(number, m):
    points = torch.randn(2, 3, number, 5, dtype=torch.float64)
    actual = select_landmarks(points, m, "segment_means")
    for index in np.ndindex(2, 3):
        parts = np.array_split(np.arange(number), m)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        for j in range(m):
            rows = [points[index][r] for r in range(number) if j * number // m <= r < (j + 1) * number // m]
            assert len(rows) in {len(part) for part in parts}
            assert_close(actual[index][j], sum(rows) / len(rows), "float64")


def test_segment_means_of_points_of_very_different_size():
    """The exact sums count in parts of the largest coordinate; what is 10¹² times smaller must not drown in it."""
    points = (
        torch.randn(12, 3, dtype=torch.float64) * torch.tensor([1e8] * 6 + [1e-4] * 6, dtype=torch.float64)[:, None]
    )
    actual = select_landmarks(points, 4, "segment_means")
    for j in range(4):
        torch.testing.assert_close(actual[j], points[3 * j : 3 * j + 3].mean(0), rtol=1e-5, atol=0)


def test_segment_means_of_fewer_points_than_segments_keep_their_order():
    points = torch.randn(3, 2)
    assert torch.equal(select_landmarks(points, 7, "segment_means"), points[[0, 0, 0, 1, 1, 2, 2]])


def test_means_depend_on_no_order_of_summation():
    points = torch.rand(1, 5000, 3, dtype=torch.float64) + torch.rand(1, 1, 3)
    cluster, count = torch.zeros(1, 5000, dtype=torch.int64), torch.full((1, 1, 1), 5000.0, dtype=torch.float64)
    expected = landmarks._ClusterMeans.apply(points, cluster, count)
    for _ in range(5):
        assert torch.equal(landmarks._ClusterMeans.apply(points[:, torch.randperm(5000)], cluster, count), expected)


@pytest.mark.parametrize("dim", [1, 3, 64, 100])
def test_distances_on_the_grid_are_exact(dim):
    """Against Python's integers, opposite corners of the box included; so no order of summation can matter."""
    points = torch.cat([torch.randn(6, dim), torch.full((1, dim), 5.0), torch.full((1, dim), -5.0)])[None].double() + 3
    grid, middle, unit = landmarks._on_grid(points, torch.ones(1, 8, dtype=torch.bool))
    assert bool(((middle + unit * grid - points).abs() <= 0.51 * unit).all())
    assert float(unit) <= 5 * 2.0**-21
    rows = [[int(x) for x in row] for row in grid[0].tolist()]
    assert torch.equal(torch.tensor(rows), grid[0])
    distance = landmarks._distance_to(grid)
    for j in range(8):
        expected = [sum((a - b) ** 2 for a, b in zip(row, rows[j], strict=True)) for row in rows]
        assert [int(x) for x in distance(grid[:, j : j + 1])[0].tolist()] == expected
        assert max(expected) <= 2**53


@pytest.mark.parametrize(("number", "m"), [(12, 4), (13, 4), (5, 5), (3, 7), (100, 9)])
def test_uniform_takes_evenly_spaced_points(number, m):
    points = torch.randn(number, 2)
    expected = [math.floor((i + 0.5) * number / m) for i in range(m)]
    assert torch.equal(select_landmarks(points, m, "uniform"), points[expected])


def test_random_is_without_replacement_and_uniform():
    points = torch.arange(10.0)[:, None]
    drawn = torch.stack([select_landmarks(points, 4, "random", seed=seed)[:, 0] for seed in range(500)])
    assert all(len(set(row.tolist())) == 4 for row in drawn)
    share = torch.stack([(drawn == i).any(1).double().mean() for i in range(10)])
    assert bool(((share - 0.4).abs() < STANDARD_ERRORS * math.sqrt(0.4 * 0.6 / 500)).all())


def test_draw_follows_the_weights():
    """With u at the middles of 1,000 equal parts of [0, 1), index i comes 1,000·w_i/Σw times, give or take one."""
    weights = torch.tensor([0.0, 3.0, 1e-12, 1.0, 0.0, 6.0], dtype=torch.float64).expand(1000, -1)
    uniform = (torch.arange(1000, dtype=torch.float64)[:, None] + 0.5) / 1000
    index = landmarks._draw(weights, torch.ones_like(weights, dtype=torch.bool), uniform)
    count = torch.bincount(index, minlength=6)
    assert bool(((count - torch.tensor([0, 300, 0, 100, 0, 600])).abs() <= 1).all())
    spare = torch.tensor([False, True, True, False, True, True]).expand(1000, -1)
    count = torch.bincount(landmarks._draw(torch.zeros_like(weights), spare, uniform), minlength=6)
    assert count.tolist() == [0, 250, 250, 0, 250, 250]


@pytest.mark.parametrize("strategy", ["kmeans++", "rpcholesky"])
def test_second_draw_has_the_stated_probabilities(strategy):
    points = torch.tensor([0.0, 0.5, 1.5, 4.0], dtype=torch.float64)[:, None]
    squared = (points - points.T).square()
    # One step of Cholesky leaves K(x, x) - K(x, s)²/K(s, s) of the diagonal.
    weights = squared if strategy == "kmeans++" else 1 - torch.exp(-0.3 * squared).square()
    expected = weights / weights.sum(1, keepdim=True) / 4
    count = torch.zeros(4, 4, dtype=torch.float64)
    for seed in range(1500):
        first, second = positions(points, select_landmarks(points, 2, strategy, scaling=0.6, seed=seed))
        count[first, second] += 1
    error = STANDARD_ERRORS * (expected * (1 - expected) / 1500).sqrt()
    assert bool(((count / 1500 - expected).abs() <= error).all())


@pytest.mark.parametrize("starts", ["kmeans++", "random"])
def test_kmeans_equals_a_plain_loop(starts, monkeypatch):
    """Heavy-tailed points and random starts, so that clusters run empty in some of so many items."""
    points = torch.randn(300, 30, 2, dtype=torch.float64) ** 3
    start = select_landmarks(points, 12, starts, seed=3).numpy().copy()
    if starts == "random":
        index = torch.stack([positions(*pair) for pair in zip(points, torch.from_numpy(start), strict=True)])
        monkeypatch.setattr(landmarks, "_kmeans_starts", lambda *_: index)
    actual = select_landmarks(points, 12, "kmeans", seed=3)
    empty = 0
    for rows, centres, landmark in zip(points.numpy(), start, actual, strict=True):
        for _ in range(10):
            nearest = ((rows[:, None] - centres[None]) ** 2).sum(-1).argmin(1)
            for j in set(nearest):
                centres[j] = rows[nearest == j].mean(0)
        kept_old = [j for j in range(12) if j not in nearest]
        empty += bool(kept_old)
        # An empty cluster has its old centre from the grid, 2⁻²⁵ of half the box, which is below 64 here.
        atol = torch.full((12, 1), 1e-12, dtype=torch.float64)
        atol[kept_old] = 2.0**-19
        assert bool(((landmark - torch.from_numpy(centres)).abs() <= atol).all())
    assert empty > 0 or starts == "kmeans++", "no cluster ran empty, which this test is also about"


def test_kmeans_is_better_than_its_starts_and_these_than_random_points():
    points, _ = clusters([300, 60, 20, 10, 5, 5], spread=0.5)
    mean = {}
    for strategy in ("kmeans", "kmeans++", "random"):
        values = [objective(points, select_landmarks(points, 8, strategy, seed=seed)) for seed in range(20)]
        mean[strategy] = torch.stack(values)
    assert bool((mean["kmeans"] <= mean["kmeans++"]).all())
    assert mean["kmeans"].mean() < 0.8 * mean["kmeans++"].mean()
    assert mean["kmeans++"].mean() < 0.5 * mean["random"].mean()


@pytest.mark.parametrize("strategy", ["kmeans", "kmeans++", "farthest", "rpcholesky"])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_well_separated_clusters_are_recovered(strategy, offset):
    points, label = clusters([200, 40, 10, 3, 1], spread=1e-4, items=4)
    points = points + offset
    for seed in range(5):
        chosen = select_landmarks(points, 5, strategy, seed=seed)
        for item, landmark in zip(points, chosen, strict=True):
            if strategy == "kmeans":
                means = torch.stack([item[label == i].mean(0) for i in range(5)])
                order = torch.cdist(means, landmark).argmin(1)
                torch.testing.assert_close(landmark[order], means, rtol=0, atol=1e-11)
            else:
                assert set(label[positions(item, landmark)].tolist()) == set(range(5))


def test_farthest_equals_a_greedy_loop():
    points = torch.randn(4, 60, 3, dtype=torch.float64)
    actual = select_landmarks(points, 9, "farthest")
    for item, landmark in zip(points.tolist(), actual, strict=True):
        mean = [sum(column) / 60 for column in zip(*item, strict=True)]
        chosen = [min(range(60), key=lambda i: math.dist(item[i], mean))]
        while len(chosen) < 9:
            chosen.append(max(range(60), key=lambda i: min(math.dist(item[i], item[j]) for j in chosen)))
        assert positions(torch.tensor(item, dtype=torch.float64), landmark).tolist() == chosen


def residual_trace(points, chosen, scaling):
    """trace(K - K_S K_SS⁻¹ K_Sᵀ) of the Gaussian kernel, in NumPy."""
    kernel = np.exp(-scaling / 2 * ((points[:, None] - points[None]) ** 2).sum(-1))
    columns = kernel[:, chosen]
    return np.trace(kernel - columns @ np.linalg.pinv(kernel[np.ix_(chosen, chosen)], hermitian=True) @ columns.T)


def test_pivoted_cholesky_leaves_the_residual_that_numpy_finds():
    points, scaling = torch.randn(3, 50, 4, dtype=torch.float64), 0.7
    grid, _, unit = landmarks._on_grid(points, torch.ones(3, 50, dtype=torch.bool))
    cholesky = landmarks.PivotedCholesky(grid, unit, scaling, 10)
    pivots = torch.stack([torch.randperm(50)[:10] for _ in range(3)])
    for step in range(10):
        weights = cholesky.add(pivots[:, step])
        for i in range(3):
            expected = residual_trace(points[i].numpy(), pivots[i, : step + 1].tolist(), scaling)
            # F has 24 bits: 50 entries, each with errors of 2·√r·2⁻²⁵ a step.
            assert float(weights[i].sum() / cholesky.one) == pytest.approx(expected, abs=2e-5)


def test_pivoted_cholesky_gives_covered_points_no_weight():
    """Three groups as narrow as 10⁻⁴: a pivot in each leaves rounding noise, of which nothing may be drawn."""
    points, label = clusters([30, 20, 10], spread=1e-4, distance=1.0)
    grid, _, unit = landmarks._on_grid(points, torch.ones(1, 60, dtype=torch.bool))
    cholesky = landmarks.PivotedCholesky(grid, unit, 1.0, 3)
    for i in range(3):
        weights = cholesky.add((label == i).int().argmax()[None])
        assert bool((weights > 0).eq(label > i).all())


def test_rpcholesky_takes_the_pivots_that_leave_little():
    points, _ = clusters([300, 60, 20, 10, 5, 5], spread=0.3)
    scaling, trace = 0.2, {}
    for strategy in ("rpcholesky", "random"):
        chosen = [
            positions(points[0], select_landmarks(points[0], 10, strategy, scaling=scaling, seed=s)) for s in range(12)
        ]
        trace[strategy] = np.mean([residual_trace(points[0].numpy(), index.tolist(), scaling) for index in chosen])
    assert trace["rpcholesky"] < 0.8 * trace["random"]


def test_rpcholesky_uses_the_scaling():
    """A wide kernel sees one cluster of 1,000 points and a far point; a narrow one sees 1,001 points alike."""
    points = torch.cat([0.02 * torch.randn(1000, 4), torch.full((1, 4), 40.0)])

    def takes_the_far_point(scaling, seed):
        return bool((select_landmarks(points, 3, "rpcholesky", scaling=scaling, seed=seed) == 40).any())

    assert sum(takes_the_far_point(1e-3, seed) for seed in range(20)) == 20
    assert sum(takes_the_far_point(1e6, seed) for seed in range(20)) <= 3


@every_strategy
@pytest.mark.parametrize("layout", ["appended", "prepended", "around", "between"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "ties"])
def test_padding_changes_no_bit(strategy, layout, kind):
    points = torch.randn(2, 3, 203, 16) + 3
    points = points.mul(2).round() if kind == "ties" else points.to(getattr(torch, kind.replace("ties", "float32")))
    padded, keep = among_padding(points, layout)
    expected = select_landmarks(points, 21, strategy, seed=5)
    assert torch.equal(select_landmarks(padded, 21, strategy, keep=keep, seed=5), expected)
    assert bool(expected.isfinite().all())


@every_strategy
def test_neighbours_change_no_bit(strategy):
    points = torch.randn(3, 4, 150, 16)
    points[0, 1] *= 1e6
    points[1, 2] = 0.0
    points[2, 3, 7] = math.nan
    keep = torch.rand(3, 4, 150) < 0.8
    keep[2, 0] = False
    together = select_landmarks(points, 12, strategy, keep=keep)
    for index in np.ndindex(3, 4):
        alone = select_landmarks(points[index], 12, strategy, keep=keep[index])
        assert torch.equal(together[index].nan_to_num(99.0), alone.nan_to_num(99.0)), index
        if index != (2, 3):
            assert bool(alone.isfinite().all()), index


@every_strategy
def test_one_keep_serves_all_heads(strategy):
    points, keep = torch.randn(2, 3, 40, 4), torch.rand(2, 1, 40) < 0.5
    expected = select_landmarks(points, 6, strategy, keep=keep.expand(2, 3, 40))
    assert torch.equal(select_landmarks(points, 6, strategy, keep=keep), expected)
    assert not torch.equal(select_landmarks(points, 6, strategy), expected)


@every_strategy
def test_fewer_points_than_landmarks(strategy):
    """Every point appears, some more than once, and nothing else does."""
    points = torch.randn(2, 9, 4)
    keep = torch.zeros(9, dtype=torch.bool)
    keep[[2, 3, 7]] = True
    actual = select_landmarks(points, 8, strategy, keep=keep)
    for item, landmark in zip(points, actual, strict=True):
        assert set(positions(item, landmark).tolist()) == {2, 3, 7}


@every_strategy
def test_equal_points(strategy):
    actual = select_landmarks(torch.full((2, 6, 3), 1.7), 4, strategy)
    assert torch.equal(actual, torch.full((2, 4, 3), 1.7))


@every_strategy
def test_no_kept_point_gives_zeros(strategy):
    points = torch.randn(2, 5, 3, requires_grad=True)
    keep = torch.tensor([[True] * 5, [False] * 5])
    actual = select_landmarks(points, 4, strategy, keep=keep)
    assert torch.equal(actual[1], torch.zeros(4, 3))
    assert bool(actual[0].ne(0).all())
    actual.sum().backward()
    assert torch.equal(points.grad[1], torch.zeros(5, 3))
    for shape in ((2, 0, 3), (0, 5, 3)):
        assert torch.equal(select_landmarks(torch.randn(shape), 4, strategy), torch.zeros(shape[0], 4, 3))


@pytest.mark.parametrize("strategy", SELECTING)
@pytest.mark.parametrize("scaling", [1e-6, 1.0])
def test_as_many_landmarks_as_points_are_all_points(strategy, scaling):
    """With the small scaling the kernel has no rank left after a few pivots."""
    points = torch.randn(2, 17, 3)
    actual = select_landmarks(points, 17, strategy, scaling=scaling)
    for item, landmark in zip(points, actual, strict=True):
        assert sorted(positions(item, landmark).tolist()) == list(range(17))


@every_strategy
def test_gradient(strategy):
    points = torch.randn(2, 11, 3, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(2, 11) < 0.7

    def chosen(points):
        return select_landmarks(points, 4, strategy, keep=keep)

    assert torch.autograd.gradcheck(chosen, points)
    assert torch.autograd.gradgradcheck(chosen, points) if strategy == "segment_means" else True
    weight = torch.randn(2, 4, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((chosen(points) * weight).sum(), points)
    assert bool((gradient[~keep] == 0).all())
    # Each landmark is a weighted mean of points, so its gradient is shared out among them.
    assert_close(gradient.sum(1), weight.sum(1), "float64")


def test_gradient_of_padding_that_is_not_a_number():
    points, keep = among_padding(torch.randn(10, 3), "around")
    points.requires_grad_()
    select_landmarks(points, 3, "segment_means", keep=keep).square().sum().backward()
    assert bool((points.grad[~keep] == 0).all())
    assert bool((points.grad[keep] != 0).all())


@every_strategy
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded_at_the_end(strategy, dtype):
    """Coordinates of 30,000: squares and sums of a few overflow float16."""
    points = (10_000 * torch.randn(2, 40, 8)).clamp(-30_000, 30_000).to(dtype)
    actual = select_landmarks(points, 5, strategy, scaling=1e-8)
    assert actual.dtype == dtype
    assert torch.equal(actual, select_landmarks(points.float(), 5, strategy, scaling=1e-8).to(dtype))
    assert bool(actual.isfinite().all())


@every_strategy
def test_seed_is_the_only_source_of_chance(strategy):
    points = torch.randn(2, 30, 4)
    before = torch.get_rng_state()
    first = select_landmarks(points, 5, strategy, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(select_landmarks(points, 5, strategy, seed=1), first)
    assert torch.equal(select_landmarks(points, 5, strategy, seed=2), first) == (strategy not in SEEDED)


@every_strategy
def test_the_context_of_the_call_changes_no_bit(strategy):
    """Blocks of points, autocast, another default dtype and inference mode."""
    points = torch.randn(3, 50, 4)
    expected = select_landmarks(points, 6, strategy)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        patch.setattr(landmarks, "_BLOCK_ENTRIES", 100)
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(select_landmarks(points, 6, strategy), expected)
        finally:
            torch.set_default_dtype(torch.float32)


def test_a_strategy_of_the_user():
    @register_landmark_strategy("first_points", aliases=("head",))
    def first_points(points, keep, num_landmarks, scaling, seed):
        assert points.shape == (6, 7, 4)
        assert keep.shape == (6, 7)
        return points[:, :num_landmarks] * scaling + seed

    try:
        points = torch.randn(2, 3, 7, 4)
        expected = (points[..., :5, :].double() * 2 + 1).float()
        assert torch.equal(select_landmarks(points, 5, "Head", scaling=2, seed=1), expected)
        with pytest.raises(ValueError, match="landmark strategy 'head' is already registered"):
            register_landmark_strategy("head")(first_points)
    finally:
        del STRATEGIES._entries["first_points"], STRATEGIES._aliases["head"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "lloyd"}, "unknown landmark strategy 'lloyd'.*segment_means.*kmeans.*rpcholesky"),
        ({"strategy": None}, "landmark strategy must be a name"),
        ({"num_landmarks": 0}, "num_landmarks must be an int >= 1, got 0"),
        ({"num_landmarks": -3}, "num_landmarks must be an int >= 1, got -3"),
        ({"num_landmarks": 2.0}, "num_landmarks must be an int >= 1, got 2.0"),
        ({"num_landmarks": True}, "num_landmarks must be an int >= 1, got True"),
        ({"scaling": 0.0}, "scaling must be a finite number > 0, got 0.0"),
        ({"scaling": math.inf}, "scaling must be a finite number > 0, got inf"),
        ({"scaling": math.nan}, "scaling must be a finite number > 0, got nan"),
        ({"scaling": "1"}, "scaling must be a finite number > 0, got '1'"),
        ({"seed": 1.5}, "seed must be an int, got 1.5"),
        ({"points": torch.ones(3)}, r"points must be a floating-point tensor \(..., N, d\), got torch.float32 \(3,\)"),
        ({"points": torch.ones(3, 2).long()}, "points must be a floating-point tensor .* got torch.int64"),
        ({"points": [[1.0]]}, "points must be a floating-point tensor .* got list"),
        ({"keep": torch.ones(2, 5)}, "keep must be a bool tensor, got torch.float32"),
        ({"keep": [True]}, "keep must be a bool tensor, got list"),
        ({"keep": torch.ones(2, 6).bool()}, r"keep must broadcast to \(2, 5\), got \(2, 6\)"),
        ({"keep": torch.ones(4, 2, 5).bool()}, r"keep must broadcast to \(2, 5\), got \(4, 2, 5\)"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"points": torch.randn(2, 5, 3), "num_landmarks": 2, "strategy": "uniform", **change}
    with pytest.raises(ValueError, match=message):
        select_landmarks(**arguments)
