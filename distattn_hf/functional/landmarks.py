"""Landmarks: a few points that represent all keys (or queries) of an item, as Nyström attention needs them.

An item's landmarks do not depend, bit for bit, on its padding, on the other items of the batch or on a kernel's order
of summation: choices are made on a grid so coarse that float64 holds every sum exactly (`_on_grid`), and the random
numbers are a function of the seed and the step alone. Items therefore share their random numbers. All work is in
float64.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..core.registry import Registry

STRATEGIES = Registry("landmark strategy")

KMEANS_ITERATIONS = 10
# Points for each landmark that kmeans_sample looks at.
_SAMPLE = 16
# Sums of up to 2²³ integers of this many bits are exact in float64.
_SUM_BITS = 30
_UNITS = (2.0**-_SUM_BITS, 4.0**-_SUM_BITS)
# Below this share of its kernel diagonal a point counts as covered: the rounding noise of `PivotedCholesky`.
_COVERED = 2.0**-20
_TINY = torch.finfo(torch.float64).tiny
# Entries of the largest temporary that holds distances from every point to every centre.
_BLOCK_ENTRIES = 2**24
# Numbers (float64: 1 MB) that segment means are taken of at a time.
_SEGMENT_ENTRIES = 2**17


def register_landmark_strategy(name: str, *, aliases: tuple[str, ...] = (), overwrite: bool = False):
    """Register a function as `select_landmarks(..., strategy=name)` (decorator).

    The function gets (points, keep, num_landmarks, scaling, seed): points (G, N, d) of G independent items in float64,
    zeros where keep (G, N) bool is False. It returns landmarks (G, num_landmarks, d).
    """

    def register(function: Callable) -> Callable:
        return STRATEGIES.register(name, function, aliases=aliases, overwrite=overwrite)

    return register


def select_landmarks(
    points: Tensor,
    num_landmarks: int,
    strategy: str = "kmeans",
    *,
    keep: Tensor | None = None,
    scaling: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Select landmarks (..., m, d) of points (..., N, d), separately for each item, in the points' dtype.

    Args:
        points: (..., N, d), floating point.
        num_landmarks: m ≥ 1. An item with fewer kept points repeats some; an item with none gets zeros.
        strategy: a name in `STRATEGIES`: segment_means, uniform, random, kmeans, kmeans_sample,
            kmeans++, farthest or rpcholesky.
        keep: (..., N) bool, broadcastable to the leading axes; False marks padding, which has no influence.
        scaling: of the Gaussian kernel exp(-scaling/2·‖x-y‖²); only rpcholesky uses it.
        seed: of random, kmeans, kmeans_sample, kmeans++ and rpcholesky; the global random state is neither read nor
            changed.

    Gradients flow to the points that are averaged (segment_means, kmeans) or selected, as if the choice were constant.
    """
    strategy = STRATEGIES.get(strategy)
    if isinstance(num_landmarks, bool) or not isinstance(num_landmarks, int) or num_landmarks < 1:
        raise ValueError(f"num_landmarks must be an int >= 1, got {num_landmarks!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an int, got {seed!r}")
    if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not 0 < scaling < math.inf:
        raise ValueError(f"scaling must be a finite number > 0, got {scaling!r}")
    if not isinstance(points, Tensor) or points.dim() < 2 or not points.is_floating_point():
        received = f"{points.dtype} {tuple(points.shape)}" if isinstance(points, Tensor) else type(points).__name__
        raise ValueError(f"points must be a floating-point tensor (..., N, d), got {received}")
    lead, (length, width) = points.shape[:-2], points.shape[-2:]
    keep = torch.ones((), dtype=torch.bool, device=points.device) if keep is None else keep
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        raise ValueError(f"keep must be a bool tensor, got {getattr(keep, 'dtype', type(keep).__name__)}")
    try:
        keep = keep.expand(points.shape[:-1])
    except RuntimeError:
        raise ValueError(f"keep must broadcast to {tuple(points.shape[:-1])}, got {tuple(keep.shape)}") from None
    if points.numel() == 0:
        return points.new_zeros(*lead, num_landmarks, width)
    keep = keep.reshape(-1, length)
    flat = points.reshape(-1, length, width)
    if strategy not in (_segment_means, _kmeans_sample):  # They convert what they use.
        flat = flat.double()
    if not bool(keep.all()):
        flat = torch.where(keep[..., None], flat, 0.0)
    landmarks = strategy(flat, keep, num_landmarks, scaling, seed)
    landmarks = torch.where(keep.any(-1)[:, None, None], landmarks, 0.0)
    return landmarks.to(points.dtype).view(*lead, num_landmarks, width)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Gather rows (G, N, d) at index (G, m), as (G, m, d)."""
    return torch.take_along_dim(rows, index[..., None], dim=1)


def _on_grid(points: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grid, middle, unit) with points ≈ middle + unit·grid and grid (G, N, d) whole numbers, 0 for padding.

    grid = round((x - middle)/unit), with 2^b units in half the longest side of the item's bounding box. With
    b = ⌊(51 - log₂d)/2⌋ (22 for d = 64) a squared distance is below 2⁵³: float64 matmuls give it exactly, so that it
    depends on no order of summation. Points closer than about 2⁻²² of the box are the same point to the choice.
    """
    points, kept = points.detach(), keep[..., None]
    low = torch.where(kept, points, math.inf).amin(1, keepdim=True)
    high = torch.where(kept, points, -math.inf).amax(1, keepdim=True)
    bits = (51 - (points.shape[-1] - 1).bit_length()) // 2
    middle = (low + high) / 2
    half = ((high - low) / 2).amax(-1, keepdim=True).clamp_min(_TINY)
    return torch.where(kept, ((points - middle) / half * 2.0**bits).round(), 0.0), middle, half * 2.0**-bits


def _distance_to(grid: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function c (G, 1, d) -> ‖x - c‖² (G, N) of grid points (G, N, d): exact, in grid units squared."""
    norms = grid.square().sum(-1)
    return lambda centre: norms + centre.square().sum(-1) - 2 * (grid @ centre.mT)[..., 0]


def _nearest(grid: Tensor, centres: Tensor) -> Tensor:
    """Return the index (G, N) of the centre (G, m, d) nearest to each grid point, the first of equally near ones."""
    norms = centres.square().sum(-1)[:, None]
    rows = max(1, _BLOCK_ENTRIES // norms.numel())
    return torch.cat([(norms - 2 * part @ centres.mT).argmin(-1) for part in grid.split(rows, 1)], 1)


def _sums(values: Tensor, cluster: Tensor, num_clusters: int) -> Tensor:
    """Sum values (G, N, d) over each cluster (G, N), as (G, num_clusters, d); exact for whole numbers."""
    sums = values.new_zeros(values.shape[0], num_clusters, values.shape[-1])
    return sums.scatter_add_(1, cluster[..., None].expand_as(values), values)


def _counts(keep: Tensor, cluster: Tensor, num_clusters: int) -> Tensor:
    """Count kept points of each cluster, as (G, num_clusters, 1)."""
    return _sums(keep[..., None].double(), cluster, num_clusters)


class _ClusterMeans(torch.autograd.Function):
    """Mean of points (G, N, d) over each cluster, the same in any order of summation; zeros for an empty cluster.

    Each point is split into whole numbers of 30 bits, relative to the item's largest coordinate: their sums are exact.
    """

    @staticmethod
    def forward(ctx, points, cluster, count):
        count = count.clamp_min(1)
        ctx.save_for_backward(cluster, count)
        scale = points.abs().amax((1, 2), keepdim=True).clamp_min(_TINY)
        rest, total = points / scale, 0.0
        for unit in _UNITS:
            whole = (rest / unit).round()
            rest = rest - whole * unit
            total = total + _sums(whole, cluster, count.shape[1]) * unit
        return total / count * scale

    @staticmethod
    def backward(ctx, gradient):
        cluster, count = ctx.saved_tensors
        return _take(gradient / count, cluster), None, None


def _draw(weights: Tensor, spare: Tensor, uniform: Tensor) -> Tensor:
    """Draw an index (G,) with probability ∝ weights (G, N) ≥ 0, or uniformly from `spare` where all weights are 0.

    The first i with w_1 + … + w_i > u·Σw, for weights rounded to 30 bits below the largest, so that sums are exact.
    """
    largest = weights.amax(-1, keepdim=True)
    shares = torch.where(largest > 0, (weights / largest * 2.0**_SUM_BITS).floor(), spare.double()).long()
    cumulative = shares.cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum((total * uniform.double()).floor().long(), total - 1)
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _sample(keep: Tensor, num_landmarks: int, seed: int, weights: Tensor, update: Callable) -> Tensor:
    """Draw indices (G, m) one by one: with the weights (G, N), then with those that `update(index)` returns.

    Where the weights leave nothing to choose, points not yet drawn come next, and when there are none, repeats.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    uniforms = torch.rand(num_landmarks, generator=generator, dtype=torch.float64, device="cpu").to(keep.device)
    free, drawn = keep.clone(), []
    for uniform in uniforms:
        drawn.append(_draw(torch.where(free, weights, 0.0), torch.where(free.any(-1, True), free, keep), uniform))
        free = free.scatter(1, drawn[-1][:, None], False)
        if len(drawn) < num_landmarks:
            weights = update(drawn[-1])
    return torch.stack(drawn, 1)


class _SegmentMeans(torch.autograd.Function):
    """`_ClusterMeans` of segments of points (G, N, d) without padding, N >= m, bit for bit: the same exact sums."""

    @staticmethod
    def forward(ctx, points, num_segments):
        (items, length, width), least = points.shape, points.shape[1] // num_segments
        ends = torch.arange(num_segments + 1, device=points.device) * length // num_segments
        starts, size = ends[:-1], ends.diff()
        ctx.save_for_backward(size)
        ctx.length, ctx.dtype = length, points.dtype
        scale = torch.linalg.vector_norm(points, math.inf, (1, 2), keepdim=True).double().clamp_min(_TINY)
        # Every segment has `least` points and some have one more, which stands last.
        extra = (size > least)[:, None]
        step = max(1, _SEGMENT_ENTRIES // (items * least * width))
        totals = []
        for start, one_more in zip(starts.split(step), extra.split(step)):
            index = start[:, None] + torch.arange(least, device=points.device)
            part = points[:, index[0, 0] : index[-1, -1] + 1] if least * num_segments == length else points[:, index]
            total = _exact_sum(part.reshape(items, -1, least, width), scale[..., None])
            if bool(one_more.any()):
                last = points[:, (start + least).clamp_max(length - 1)] * one_more
                parts = (_exact_parts(last, scale), total)
                total = [a + b for a, b in zip(*parts)]
            totals.append(total[0] * _UNITS[0] + total[1] * _UNITS[1])
        return torch.cat(totals, 1) / size[:, None] * scale

    @staticmethod
    def backward(ctx, gradient):
        (size,) = ctx.saved_tensors
        spread = (gradient / size[:, None]).repeat_interleave(size, dim=1, output_size=ctx.length)
        return spread.to(ctx.dtype), None


def _exact_parts(points: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers a, b with points/scale = a·2⁻³⁰ + b·2⁻⁶⁰, of 30 bits each, so their sums are exact."""
    rest = points.double().div(scale).mul_(1 / _UNITS[0])
    whole = rest.round()
    return whole, rest.sub_(whole).mul_(1 / _UNITS[0]).round_()


def _exact_sum(points: Tensor, scale: Tensor) -> list[Tensor]:
    """Sum both of the `_exact_parts` over the second last axis."""
    return [part.sum(-2) for part in _exact_parts(points, scale)]


@register_landmark_strategy("segment_means")
def _segment_means(points, keep, num_landmarks, scaling, seed):
    """Average m contiguous segments of n kept points, segment j from ⌊jn/m⌋ to ⌊(j+1)n/m⌋ (Xiong et al., 2021).

    With n < m the segments are single points, and landmark j is point ⌊jn/m⌋.
    """
    if bool(keep.all()) and keep.shape[-1] >= num_landmarks:
        return _SegmentMeans.apply(points, num_landmarks)
    points, number = points.double(), keep.sum(-1, keepdim=True)
    segments = number.clamp(1, num_landmarks)
    segment = (keep.cumsum(-1) * segments - 1).clamp_min(0) // number.clamp_min(1)
    means = _ClusterMeans.apply(points, segment, _counts(keep, segment, num_landmarks))
    return _take(means, torch.arange(num_landmarks, device=keep.device) * segments // num_landmarks)


@register_landmark_strategy("uniform")
def _uniform(points, keep, num_landmarks, scaling, seed):
    """Select evenly spaced kept points: landmark i is kept point ⌊(i + 1/2)·n/m⌋ of n."""
    step = torch.arange(num_landmarks, device=keep.device)
    rank = (2 * step + 1) * keep.sum(-1, keepdim=True) // (2 * num_landmarks)
    index = torch.searchsorted(keep.cumsum(-1), rank, right=True)
    return _take(points, index.clamp_max(keep.shape[-1] - 1))


@register_landmark_strategy("random")
def _random(points, keep, num_landmarks, scaling, seed):
    """Draw kept points uniformly without replacement (Williams and Seeger, 2001)."""
    no_weights = torch.zeros_like(keep, dtype=torch.float64)
    return _take(points, _sample(keep, num_landmarks, seed, no_weights, lambda index: no_weights))


def _kmeans_starts(grid: Tensor, keep: Tensor, num_landmarks: int, seed: int) -> Tensor:
    """Draw indices (G, m): the first uniformly, each further one with probability ∝ min_j ‖x - c_j‖²."""
    closest, distance = torch.full_like(grid[..., 0], math.inf), _distance_to(grid)

    def update(index):
        return torch.minimum(closest, distance(_take(grid, index[:, None])), out=closest)

    return _sample(keep, num_landmarks, seed, torch.ones_like(closest), update)


@register_landmark_strategy("kmeans++", aliases=("kmeans_plus_plus",))
def _kmeans_plus_plus(points, keep, num_landmarks, scaling, seed):
    """Draw points with probability ∝ the squared distance to the nearest drawn (Arthur, Vassilvitskii, 2007)."""
    return _take(points, _kmeans_starts(_on_grid(points, keep)[0], keep, num_landmarks, seed))


@register_landmark_strategy("kmeans")
def _kmeans(points, keep, num_landmarks, scaling, seed):
    """Run 10 of Lloyd's iterations (Lloyd, 1982) from kmeans++ starts; an empty cluster keeps its old centre.

    Until the last iteration centres are rounded to the grid; then they are means of the points themselves.
    """
    grid, middle, unit = _on_grid(points, keep)
    centres = _take(grid, _kmeans_starts(grid, keep, num_landmarks, seed))
    for _ in range(KMEANS_ITERATIONS):
        cluster = _nearest(grid, centres)
        count = _counts(keep, cluster, num_landmarks)
        means = (_sums(grid, cluster, num_landmarks) / count.clamp_min(1)).round()
        centres = torch.where(count > 0, means, centres)
    landmarks = torch.where(count > 0, _ClusterMeans.apply(points, cluster, count), middle + unit * centres)
    # Of equal centres the first has all the points, and the others its mean.
    return _take(landmarks, _nearest(centres, centres))


@register_landmark_strategy("kmeans_sample")
def _kmeans_sample(points, keep, num_landmarks, scaling, seed):
    """Run `kmeans` on 16·m evenly spaced kept points, in time that does not depend on N beyond that."""
    number, most = keep.sum(-1, keepdim=True), _SAMPLE * num_landmarks
    step = torch.arange(min(most, keep.shape[-1]), device=keep.device)
    rank = torch.where(number > most, (2 * step + 1) * number // (2 * most), step)
    index = torch.searchsorted(keep.cumsum(-1), rank, right=True).clamp_max(keep.shape[-1] - 1)
    sample_keep = step < number
    sample = torch.where(sample_keep[..., None], _take(points, index).double(), 0.0)
    return _kmeans(sample, sample_keep, num_landmarks, scaling, seed)


@register_landmark_strategy("farthest", aliases=("k_center",))
def _farthest(points, keep, num_landmarks, scaling, seed):
    """Select the point nearest to the mean, then each time argmax_x min_j ‖x - c_j‖² (Gonzalez, 1985)."""
    grid = _on_grid(points, keep)[0]
    distance = _distance_to(grid)
    mean = (grid.sum(1, keepdim=True) / keep.sum(-1)[:, None, None].clamp_min(1)).round()
    index = [torch.where(keep, distance(mean), math.inf).argmin(-1)]
    closest = torch.where(keep, math.inf, -1.0).double()
    while len(index) < num_landmarks:
        closest = torch.minimum(closest, distance(_take(grid, index[-1][:, None])))
        index.append(closest.argmax(-1))
    return _take(points, torch.stack(index, 1))


class PivotedCholesky:
    """Partial Cholesky factor F (G, m, N) of the Gaussian kernel K of grid points, a column of K for each pivot.

    Pivot p adds the row f = (K_p - Fᵀ F_p)/√r_p to F, and r = diag(K) - Σf² is what F leaves of the diagonal. F is
    rounded to b = ⌊(53 - log₂m)/2⌋ bits (23 for m = 64), with which Fᵀ F_p and r are exact.
    """

    def __init__(self, grid: Tensor, unit: Tensor, scaling: float, num_pivots: int):
        self.grid, self.distance, self.rate = grid, _distance_to(grid), scaling / 2 * unit[..., 0].square()
        self.one = 4.0 ** ((53 - (num_pivots - 1).bit_length()) // 2)
        self.factor = grid.new_zeros(grid.shape[0], num_pivots, grid.shape[1])
        # In units of 1/one.
        self.residual = torch.full_like(grid[..., 0], self.one)
        self.pivots = 0

    def add(self, index: Tensor) -> Tensor:
        """Eliminate pivots (G,); returns the residual diagonal r (G, N) as sampling weights, 0 for covered points."""
        distance = self.distance(_take(self.grid, index[:, None]))
        column = (torch.exp(-self.rate * distance) * self.one).round()
        rows = self.factor[:, : self.pivots]
        at_pivot = torch.take_along_dim(rows, index[:, None, None], dim=2)
        column = column - (at_pivot.mT @ rows)[:, 0]
        pivot = self.residual.gather(1, index[:, None])
        floor = _COVERED * self.one
        row = torch.where(pivot > floor, (column / pivot.clamp_min(floor).sqrt()).round(), 0.0)
        self.factor[:, self.pivots] = row
        self.pivots += 1
        self.residual = self.residual - row.square()
        return torch.where(self.residual > floor, self.residual, 0.0)


@register_landmark_strategy("rpcholesky")
def _rpcholesky(points, keep, num_landmarks, scaling, seed):
    """Draw pivots of a randomly pivoted Cholesky of exp(-scaling/2·‖x-y‖²) (Chen, Epperly, Tropp, Webber, 2022).

    Each is drawn with probability ∝ K(x, x) - K(x, S) K(S, S)⁻¹ K(S, x), S the points drawn: O(N·m·d + N·m²).
    """
    grid, _, unit = _on_grid(points, keep)
    cholesky = PivotedCholesky(grid, unit, scaling, num_landmarks)
    return _take(points, _sample(keep, num_landmarks, seed, torch.ones_like(grid[..., 0]), cholesky.add))
