"""Approximate distance matrices: low rank from few entries, landmarks, projections, and the best rank as a floor.

A is the (n, m) matrix of distances dist(x_i, y_j), k the rank. All work is in float64, seeded; every approximation says
how many distances it evaluated, where A itself has n·m.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.metrics import get_metric
from .landmarks import STRATEGIES, select_landmarks

METHODS = ("indyk", "nystrom", "cur", "jl", "svd")
METRICS = ("l2", "sqeuclidean", "l1")
# Singular values below this share of the largest are rounding noise, which a pseudo-inverse would blow up.
_NOISE = 1e-10
# Entries of the largest temporary of a median over projections.
_BLOCK_ENTRIES = 2**24


class DistanceMatrix:
    """The matrix A (n, m) of distances between points x (n, d) and y (m, d), evaluated row or column by row or column.

    `entries_read` counts each entry once, however often it is read.
    """

    def __init__(self, x: Tensor, y: Tensor, metric: str = "l2"):
        _check_points(x, y)
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        self.x, self.y, self.metric = x.double(), y.double(), metric
        self.shape = (len(x), len(y))
        self._seen = [torch.zeros(length, dtype=torch.bool, device=x.device) for length in self.shape]

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        """Return distances between any points (n', d) and (m', d), without counting: (n', m')."""
        return get_metric(self.metric).fast_distance(x, y)

    def rows(self, index: Tensor) -> Tensor:
        """Read rows: (len(index), m)."""
        self._seen[0][index] = True
        return self.evaluate(self.x[index], self.y)

    def columns(self, index: Tensor) -> Tensor:
        """Read columns: (n, len(index))."""
        self._seen[1][index] = True
        return self.evaluate(self.x, self.y[index])

    def full(self) -> Tensor:
        """Read everything: (n, m)."""
        return self.rows(torch.arange(self.shape[0], device=self.x.device))

    @property
    def entries_read(self) -> int:
        """How many different entries were read."""
        rows, columns = (int(seen.sum()) for seen in self._seen)
        return rows * self.shape[1] + columns * self.shape[0] - rows * columns


@dataclass(frozen=True)
class LowRank:
    """left (n, k) · right (k, m). entries_read: distances evaluated, also to landmarks that are none of the points."""

    left: Tensor
    right: Tensor
    entries_read: int

    def matrix(self) -> Tensor:
        """Return the approximate distances (n, m)."""
        return self.left @ self.right


@dataclass(frozen=True)
class Projected:
    """Points projected to k dimensions, x (n, k) and y (m, k), whose distances stand for the true ones.

    No entry of A is read. Its matrix still costs n·m·k operations in place of n·m·d, and has no low rank.
    """

    x: Tensor
    y: Tensor
    metric: str
    entries_read: int = 0

    def matrix(self) -> Tensor:
        """Return the approximate distances (n, m)."""
        if self.metric != "l1":
            return get_metric(self.metric).fast_distance(self.x, self.y)
        block = max(1, _BLOCK_ENTRIES // self.y.numel())
        return torch.cat([(part[:, None] - self.y).abs().median(-1).values for part in self.x.split(block)])


def approximate_distances(
    x: Tensor,
    y: Tensor,
    rank: int,
    method: str = "indyk",
    metric: str = "l2",
    *,
    strategy: str = "kmeans",
    oversampling: float = 4.0,
    seed: int = 0,
) -> LowRank | Projected:
    """Approximate the distances between points x and y at rank (or, for projections, dimension) k.

    Args:
        x: (n, d), floating point.
        y: (m, d).
        rank: k, from 1 to min(n, m).
        method: "indyk" (see `sample_optimal`), "nystrom" (`nystrom_distances`), "cur" (`cur_distances`), "jl"
            (`random_projection`) or "svd" (the best of rank k, from all entries: Eckart and Young, 1936).
        metric: "l2", "sqeuclidean" or "l1".
        strategy: of landmarks, a name in `STRATEGIES`; only "nystrom" and "cur" use it.
        oversampling: rows and columns that "indyk" reads for each of k, the paper's O(1/ε).
        seed: of every random choice; the global random state is neither read nor changed.

    Returns:
        a `LowRank` or a `Projected`: `.matrix()` (n, m) in float64, and `.entries_read`.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    distances = DistanceMatrix(x, y, metric)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(distances.shape):
        raise ValueError(f"rank must be an int from 1 to min(n, m) = {min(distances.shape)}, got {rank!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an int, got {seed!r}")
    if method == "svd":
        return truncated_svd(distances, rank)
    if method == "indyk":
        return sample_optimal(distances, rank, oversampling=oversampling, seed=seed)
    if method == "jl":
        return random_projection(distances, rank, seed=seed)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    STRATEGIES.get(strategy)
    return (nystrom_distances if method == "nystrom" else cur_distances)(distances, rank, strategy, seed=seed)


def truncated_svd(distances: DistanceMatrix, rank: int) -> LowRank:
    """Return the best approximation of rank k in the Frobenius norm, which reads all entries: O(n·m·min(n, m))."""
    left, values, right = torch.linalg.svd(distances.full(), full_matrices=False)
    return LowRank(left[:, :rank] * values[:rank], right[:rank], distances.entries_read)


def sample_optimal(distances: DistanceMatrix, rank: int, *, oversampling: float = 4.0, seed: int = 0) -> LowRank:
    """Approximate A from O((n + m)·k/ε) of its entries: ‖A - UV‖² ≤ ‖A - A_k‖² + ε‖A‖² (in expectation over draws).

    1. Norms of columns, by the triangle inequality, from one row i* and one column j*, drawn uniformly:
       p_j ∝ A[i*, j]² + A[i*, j*]² + mean_i A[i, j*]².
    2. s = ⌈oversampling·k⌉ columns drawn by p, scaled by 1/√(s·p_j): C (n, s). U (n, k): its left singular vectors
       (Frieze, Kannan, Vempala, 2004).
    3. V = argmin ‖S(UV - A)‖ from s rows S, drawn by the leverage scores ‖U_i‖²/k and weighted by 1/√(s·p_i).

    Simplified: U comes from the SVD of all of C, whose entries are read in any case (the paper samples C's rows for
    it, which saves time and no entries); step 3 draws by leverage scores, where the paper uses Chen and Price's (2019)
    dependent draws to save a factor of log k. `sqeuclidean` is no metric: p is then right up to a constant factor of 3.
    Draws without replacement past the size of a side take all of it, unweighted.

    Source: Indyk, Vakilian, Wagner, Woodruff, Sample-Optimal Low-Rank Approximation of Distance Matrices (2019).
    """
    if isinstance(oversampling, bool) or not isinstance(oversampling, int | float) or not 1 <= oversampling < math.inf:
        raise ValueError(f"oversampling must be a finite number >= 1, got {oversampling!r}")
    (n, m), device = distances.shape, distances.x.device
    generator = torch.Generator(device).manual_seed(seed)
    pivot_row, pivot_column = (torch.randint(size, (1,), generator=generator, device=device) for size in (n, m))
    row, column = distances.rows(pivot_row)[0], distances.columns(pivot_column)[:, 0]
    estimates = row.square() + row[pivot_column].square() + column.square().mean()
    count = math.ceil(oversampling * rank)
    index, weight = _draw(estimates, count, generator)
    left = torch.linalg.svd(distances.columns(index) * weight, full_matrices=False).U[:, :rank]
    index, weight = _draw(left.square().sum(-1), count, generator)
    # `gelsd` takes rank-deficient samples, too.
    driver = "gelsd" if device.type == "cpu" else None
    solution = torch.linalg.lstsq(
        left[index] * weight[:, None], distances.rows(index) * weight[:, None], rcond=_NOISE, driver=driver
    )
    return LowRank(left, solution.solution, distances.entries_read)


def nystrom_distances(distances: DistanceMatrix, rank: int, strategy: str = "kmeans", *, seed: int = 0) -> LowRank:
    """Approximate A ≈ D(x, L) D(L, L)⁺ D(L, y) with k landmarks L of x and y together: (n + m + k)·k distances.

    D(L, L) is indefinite (one positive eigenvalue, the others negative), so the pseudo-inverse drops singular values
    of rounding noise only. Source: Williams and Seeger (2001), for kernels.
    """
    same = distances.x is distances.y or torch.equal(distances.x, distances.y)
    points = distances.x if same else torch.cat([distances.x, distances.y])
    landmarks = select_landmarks(points, rank, strategy, seed=seed, scaling=_bandwidth(points))
    return _through(distances, landmarks, landmarks)


def cur_distances(distances: DistanceMatrix, rank: int, strategy: str = "kmeans", *, seed: int = 0) -> LowRank:
    """Approximate A ≈ D(x, L_y) D(L_x, L_y)⁺ D(L_x, y), k landmarks L_x of x and L_y of y: (n + m + k)·k distances.

    With a strategy that chooses among the points, these are k columns and k rows of A (a skeleton: Goreinov,
    Tyrtyshnikov, Zamarashkin, 1997).
    """
    rows, columns = (
        select_landmarks(points, rank, strategy, seed=seed, scaling=_bandwidth(points))
        for points in (distances.x, distances.y)
    )
    return _through(distances, rows, columns)


def random_projection(distances: DistanceMatrix, dimensions: int, *, seed: int = 0) -> Projected:
    """Project x and y to k dimensions by a random matrix P (d, k), for l2, sqeuclidean and l1.

    P ~ N(0, 1/k): E‖(x-y)P‖² = ‖x-y‖² (Johnson and Lindenstrauss, 1984). l1: P ~ Cauchy, of whose |(x-y)P| each is
    ‖x-y‖₁ times a half-Cauchy number of median 1; the median over the k estimates it (Indyk, 2006).
    """
    generator = torch.Generator(distances.x.device).manual_seed(seed)
    projection = torch.empty(distances.x.shape[1], dimensions, dtype=torch.float64, device=distances.x.device)
    if distances.metric == "l1":
        projection.cauchy_(generator=generator)
    else:
        projection.normal_(generator=generator).mul_(dimensions**-0.5)
    return Projected(distances.x @ projection, distances.y @ projection, distances.metric)


def relative_error(approximation: Tensor, exact: Tensor) -> float:
    """Return ‖approximation - exact‖ / ‖exact‖ in the Frobenius norm."""
    return float(torch.linalg.norm(approximation - exact) / torch.linalg.norm(exact))


def _through(distances: DistanceMatrix, rows: Tensor, columns: Tensor) -> LowRank:
    """Return D(x, columns) D(rows, columns)⁺ D(rows, y) and the number of distances in the three."""
    left, right = distances.evaluate(distances.x, columns), distances.evaluate(rows, distances.y)
    middle = distances.evaluate(rows, columns)
    evaluated = left.numel() + middle.numel() + right.numel()
    return LowRank(left @ torch.linalg.pinv(middle, rtol=_NOISE), right, evaluated)


def _draw(weights: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw indices with replacement by p ∝ weights; return them, each once, and √(times drawn / (count·p)).

    As many draws as entries, or more: all indices, with weight 1.
    """
    if count >= len(weights):
        return torch.arange(len(weights), device=weights.device), torch.ones_like(weights)
    # All of them 0, for points that are all equal: then uniformly.
    weights = weights.clamp_min(torch.finfo(weights.dtype).tiny)
    probabilities = weights / weights.sum()
    drawn = torch.multinomial(probabilities, count, replacement=True, generator=generator)
    index, times = drawn.unique(return_counts=True)
    return index, (times / (count * probabilities[index])).sqrt()


def _bandwidth(points: Tensor) -> float:
    """Return the scaling of rpcholesky's kernel exp(-s/2·‖x-y‖²) at which the mean squared distance has exponent -1/2.

    The mean of ‖x-y‖² over all pairs is twice the sum of the coordinates' variances.
    """
    spread = 2 * float(points.var(0, correction=0).sum())
    return 1 / spread if spread > 0 else 1.0


def _check_points(x: Tensor, y: Tensor) -> None:
    for name, points in (("x", x), ("y", y)):
        if not isinstance(points, Tensor) or points.dim() != 2 or not points.is_floating_point() or not len(points):
            got = f"{points.dtype} {tuple(points.shape)}" if isinstance(points, Tensor) else type(points).__name__
            raise ValueError(f"{name} must be a floating-point tensor (n, d) of one point or more, got {got}")
    if x.shape[1] != y.shape[1] or x.device != y.device:
        shapes = " and ".join(f"{tuple(points.shape)} on {points.device}" for points in (x, y))
        raise ValueError(f"x and y must agree in width and device, got {shapes}")
