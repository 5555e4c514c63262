"""Distances between queries and keys, each with the form it is computed in and the λ it needs by default.

Shapes: query (..., N, d), key (..., M, d), distances (..., N, M). Attention logits are -λ·scaling·distance.
"""

import math
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from .kernel_cpp_library import distance_backward, distance_forward, in_onnx_export, kind_of, readable, unavailable
from .metric_checks import check_distances, refuse_parameters
from .registry import Registry, mechanism_hint
from .softening import LEAST, huber, knee, plummer, soft_maximum, soft_normalize, soft_power_mean

METRICS = Registry("metric")

# ‖q-k‖² from q·k loses digits when q ≈ k; below this share of ‖q‖²+‖k‖² it is rounding noise.
_NORM_EPSILON = 1e-12


class Metric:
    """Base class of distances. A subclass gives `distance`; the rest has defaults that are correct but slower."""

    name: str = ""
    aliases: tuple[str, ...] = ()
    # Under a rotation of q and k (RoPE) the distance stays a function of the relative position.
    rotation_invariant: bool = False
    # False for the dot-product control, which is no distance.
    is_distance: bool = True
    # Scaling q or k by a positive number changes nothing, so α has no effect.
    scale_free: bool = False
    # dist(s·q + c, s·k + c) = s^degree·dist(q, k) for all s > 0 and c; None: not so.
    degree: int | None = None
    # Has a softened form (see softening.py), `softened_distance`.
    softens: bool = False
    # No matmul form: N·M·d elementwise operations, so a fit draws fewer rows.
    elementwise: bool = False
    # What a calibrated conversion fits beside λ where it fits no ε. Axis-aligned distances come near a dot product only
    # with maps, and cosine, which forgets the norms, gains most from them.
    preferred_transform: str = "maps"

    def distance(self, query: Tensor, key: Tensor, p: float | None = None) -> Tensor:
        """Return distances (..., N, M) by the definition: slow, readable, the reference of the fast forms."""
        raise NotImplementedError

    def fast_distance(self, query: Tensor, key: Tensor, p: float | None = None) -> Tensor:
        """Return the same distances without a (..., N, M, d) tensor."""
        return self.distance(query, key, p)

    def checked_distance(self, query: Tensor, key: Tensor, p=None, fast: bool = True, epsilon=None) -> Tensor:
        """Return `fast_distance`, `distance` or `softened_distance`; raises `ValueError` for what is no distance."""
        if epsilon is not None:
            return self.softened_distance(query, key, epsilon, p)
        distances = (self.fast_distance if fast else self.distance)(query, key, p)
        if self is not BUILT_IN.get(self.name):
            check_distances(f"metric {self.name!r}", distances, query, key, signed=not self.is_distance)
        return distances

    def softened_distance(self, query: Tensor, key: Tensor, epsilon: float | Tensor, p: float | None = None) -> Tensor:
        """Return the distances softened by ε > 0, a number or broadcastable to (..., 1, 1): see softening.py."""
        raise NotImplementedError

    def dot_form(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor | None, float]:
        """Return (q', k', key_bias or None, factor) with -distance = factor·q'·k' + key_bias + (a constant of the row).

        A metric that overrides this runs by scaled_dot_product_attention. key_bias is (..., M).
        """
        raise NotImplementedError

    @property
    def has_dot_form(self) -> bool:
        """Whether this metric gives a `dot_form`."""
        return type(self).dot_form is not Metric.dot_form

    def temperature(self, head_dim: int, p: float | None = None) -> float:
        """Return the standard deviation of the distance along a row, for q and k from N(0, I_d)."""
        return _measured_temperature(self, head_dim, p)

    def default_lambda(self, head_dim: int, scaling: float, p: float | None = None) -> float:
        """Return the λ that gives -λ·scaling·distance unit deviation along a row, for q and k from N(0, I_d)."""
        return 1.0 / (scaling * self.temperature(head_dim, p))

    def validate(self, p: float | None) -> float | None:
        """Check and return the order `p` given with this metric; only `lp` takes one."""
        if p is not None:
            raise ValueError(f"p={p!r} was given with metric {self.name!r}; only 'lp' takes an order p")
        return None


@lru_cache(maxsize=256)
def _measured_temperature(metric: Metric, head_dim: int, p: float | None) -> float:
    """Measure the row deviation of distances of 256 queries, 1,024 keys from N(0, I_d) with a fixed seed."""
    # Neither a meta device or a dtype that transformers builds models in, nor fake tensors, may reach this measurement.
    with _disable_current_modes(), torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(256, head_dim, generator=generator, dtype=torch.float32)
        key = torch.randn(1024, head_dim, generator=generator, dtype=torch.float32)
        deviation = float(metric.checked_distance(query, key, p).float().std(dim=-1).mean())
    if not math.isfinite(deviation) or deviation <= 0:
        raise ValueError(f"metric {metric.name!r} gives distances with row deviation {deviation} on N(0, I) vectors")
    return deviation


def _pairwise_difference(query: Tensor, key: Tensor, reduce) -> Tensor:
    """Apply reduce(q_i - k_j) over the last axis, by blocks of queries: but in ONNX (..., N, M, d) never exists."""
    if in_onnx_export():  # how many blocks there are depends on the shapes
        return reduce(query[..., :, None, :] - key[..., None, :, :])
    block = max(1, 2**24 // max(1, key.numel()))
    rows = [reduce(query[..., i : i + block, None, :] - key[..., None, :, :]) for i in range(0, query.shape[-2], block)]
    return torch.cat(rows, dim=-2) if rows else query.new_zeros(*query.shape[:-1], key.shape[-2])


def _squared_distance(query: Tensor, key: Tensor) -> Tensor:
    """Compute ‖q‖² + ‖k‖² - 2q·k; an entry depends on its own query and key only, so masked keys change no other."""
    # Moving both by the mean key first would lose fewer digits where q ≈ k, at the price of that property.
    squared = query.square().sum(-1)[..., :, None] + key.square().sum(-1)[..., None, :]
    return squared - 2 * torch.matmul(query, key.transpose(-1, -2))


def _cdist(query: Tensor, key: Tensor, p: float) -> Tensor:
    """Apply `torch.cdist` over any number of (broadcastable) leading axes."""
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    query, key = query.expand(*lead, *query.shape[-2:]), key.expand(*lead, *key.shape[-2:])
    return torch.cdist(query.contiguous(), key.contiguous(), p=p, compute_mode="donot_use_mm_for_euclid_dist")


class _CompiledDistance(torch.autograd.Function):
    """Distances by the CPU kernels; the gradient of max|q-k| is shared among the coordinates that reach it."""

    @staticmethod
    def forward(ctx, query, key, kind, p):
        distances = distance_forward(query, key, kind, p)
        ctx.save_for_backward(query, key, distances)
        ctx.kind, ctx.p = kind, p
        return distances

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        query, key, distances = ctx.saved_tensors
        return *distance_backward(gradient, query, key, distances, ctx.kind, ctx.p), None, None


class _ShareAmongLargest(torch.autograd.Function):
    """max|q-k|, with its gradient divided by the number of coordinates that reach the maximum.

    `torch.cdist` gives each of them the whole gradient. Half precision has many such ties: without this, 5% of the
    gradient of bfloat16 vectors is wrong.
    """

    @staticmethod
    def forward(ctx, distance, query, key):
        ctx.save_for_backward(query, key)
        return distance.view_as(distance)

    @staticmethod
    def backward(ctx, gradient):
        query, key = ctx.saved_tensors
        largest = _cdist(query, key, math.inf)
        count = torch.full_like(largest, query.shape[-1])
        # One coordinate at a time, so that (..., N, M, d) never exists.
        for q, k in zip(query.mT.contiguous().unbind(-2), key.mT.contiguous().unbind(-2)):
            count += (q[..., :, None] - k[..., None, :]).abs_().sub_(largest).sign_()
        return gradient / count, None, None


class SquaredEuclidean(Metric):
    """‖q-k‖². The row constant ‖q‖² cancels in the softmax, so it is dot-product attention with a key-norm bias."""

    name, aliases, rotation_invariant, degree = "sqeuclidean", ("squared_l2", "l2_squared"), True, 2

    preferred_transform = "scalar"

    def distance(self, query, key, p=None):
        return _pairwise_difference(query, key, lambda diff: diff.square().sum(-1))

    def fast_distance(self, query, key, p=None):
        return _squared_distance(query, key).clamp_min(0)

    def dot_form(self, query, key):
        return query, key, -key.square().sum(-1), 2.0

    def temperature(self, head_dim, p=None):
        return math.sqrt(6 * head_dim)


class LiftedSquaredEuclidean(Metric):
    """‖[q, 0] - [k, √(R²-‖k‖²)]‖² with R = max‖k‖: equals ‖q‖² + R² - 2q·k, that is dot-product attention.

    Used by `init="exact"`. R depends on the keys, but only through a constant of the row.
    """

    name, rotation_invariant = "lifted_sqeuclidean", True

    def distance(self, query, key, p=None):
        norms = key.square().sum(-1, keepdim=True)
        # R² is a constant of the row, so its gradient cancels in the softmax, but for rounding that would reach masked
        # keys: it is not taken. The height enters squared, so its own square root (infinite slope at 0) is not either.
        height = (norms.detach().amax(-2, keepdim=True) - norms).transpose(-1, -2)
        return height + _pairwise_difference(query, key, lambda diff: diff.square().sum(-1))

    def dot_form(self, query, key):
        return query, key, None, 2.0

    def temperature(self, head_dim, p=None):
        return 2 * math.sqrt(head_dim)


class Euclidean(Metric):
    """‖q-k‖."""

    name, aliases, rotation_invariant, degree = "l2", ("euclidean",), True, 1

    preferred_transform, softens = "scalar", True

    def distance(self, query, key, p=None):
        return _pairwise_difference(query, key, lambda diff: torch.linalg.vector_norm(diff, dim=-1))

    def fast_distance(self, query, key, p=None):
        # The clamp keeps the root's slope finite where q = k (its gradient there is 0, a subgradient).
        return _squared_distance(query, key).clamp_min(_NORM_EPSILON).sqrt()

    def softened_distance(self, query, key, epsilon, p=None):
        # The clamp for a head whose ε is 0, as in `fast_distance`; below what any other ε would tell apart.
        return plummer(_squared_distance(query, key).clamp_min(LEAST**2), epsilon)

    def temperature(self, head_dim, p=None):
        return math.sqrt(3) / 2


class Cosine(Metric):
    """1 - cos(q, k)."""

    name, rotation_invariant, scale_free, softens = "cosine", True, True, True

    def distance(self, query, key, p=None):
        return 1 - (F.normalize(query, dim=-1)[..., :, None, :] * F.normalize(key, dim=-1)[..., None, :, :]).sum(-1)

    def fast_distance(self, query, key, p=None):
        return 1 - torch.matmul(F.normalize(query, dim=-1), F.normalize(key, dim=-1).transpose(-1, -2))

    def softened_distance(self, query, key, epsilon, p=None):
        return -torch.matmul(soft_normalize(query, epsilon), soft_normalize(key, epsilon).transpose(-1, -2))

    def dot_form(self, query, key, epsilon=None):
        if epsilon is not None:
            return soft_normalize(query, epsilon), soft_normalize(key, epsilon), None, 1.0
        return F.normalize(query, dim=-1), F.normalize(key, dim=-1), None, 1.0

    def temperature(self, head_dim, p=None):
        return 1 / math.sqrt(head_dim)


class Minkowski(Metric):
    """(Σ|q-k|^p)^(1/p), p ≥ 1; subclasses fix p."""

    name, aliases, elementwise, degree, softens = "lp", ("minkowski",), True, 1, True
    order: float | None = None

    def _order(self, p):
        return self.order if self.order is not None else self.validate(p)

    def validate(self, p):
        if self.order is not None:
            return super().validate(p)
        if p is None:
            raise ValueError("metric 'lp' needs its order: p must be a number >= 1, got None")
        if isinstance(p, bool) or not isinstance(p, int | float) or not 1 <= p < math.inf:
            raise ValueError(f"p must be a finite number >= 1 (use metric='chebyshev' for p=inf), got {p!r}")
        return float(p)

    def distance(self, query, key, p=None):
        order = self._order(p)
        return _pairwise_difference(query, key, lambda diff: torch.linalg.vector_norm(diff, ord=order, dim=-1))

    def fast_distance(self, query, key, p=None):
        if self._compiled(query, key):
            return self._by_kernel(query, key, kind_of(self.name, self._order(p)), self._order(p))
        return self._eager_distance(query, key, p)

    def softened_distance(self, query, key, epsilon, p=None):
        if (order := self._order(p)) == 2:
            return BUILT_IN["l2"].softened_distance(query, key, epsilon)
        if self._compiled(query, key):
            # Homogeneous: at δ = 1 the kernel needs no gradient of ε. That of l1 counts in δ, the others in ε.
            kind, unit = kind_of(self.name, order, softened=True), knee(epsilon, query.shape[-1], order)
            return (unit if order == 1 else epsilon) * self._by_kernel(query / unit, key / unit, kind, order)
        form = {1: huber, math.inf: soft_maximum}.get(order, partial(soft_power_mean, p=order))
        return _pairwise_difference(query, key, lambda difference: form(difference, epsilon))

    def _by_kernel(self, query, key, kind, p) -> Tensor:
        lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        flat = [t.expand(*lead, *t.shape[-2:]).reshape(1, -1, *t.shape[-2:]) for t in (query, key)]
        return _CompiledDistance.apply(*flat, kind, p).view(*lead, query.shape[-2], key.shape[-2])

    def _compiled(self, query, key) -> bool:
        """Return whether the CPU kernels compute these distances; torch.compile has no graph for them, takes cdist."""
        return (
            all(t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() for t in (query, key))
            and self is BUILT_IN[self.name]
            and readable(query, key)
            and unavailable() is None
        )

    def _eager_distance(self, query, key, p):
        return self.distance(query, key, p) if in_onnx_export() else _cdist(query, key, self._order(p))


class Manhattan(Minkowski):
    """Σ|q-k|."""

    name, aliases, order = "l1", ("manhattan", "cityblock"), 1.0

    def temperature(self, head_dim, p=None):
        # Var_k|q-k| averaged over q, for q and k from N(0, 1), is 2 - E_q[(E_k|q-k|)²] = 0.5664 (by quadrature).
        return math.sqrt(0.5664 * head_dim)


class Chebyshev(Minkowski):
    """max|q-k|."""

    name, aliases, order = "chebyshev", ("linf",), math.inf

    def _eager_distance(self, query, key, p):
        return _ShareAmongLargest.apply(super()._eager_distance(query, key, p), query.detach(), key.detach())


class DotProduct(Metric):
    """-q·k with λ = 1: the dot-product attention of the teacher, as a control and for heads left unconverted."""

    name, rotation_invariant, is_distance, aliases = "dot", True, False, ("standard",)

    def distance(self, query, key, p=None):
        return -torch.matmul(query, key.transpose(-1, -2))

    def dot_form(self, query, key):
        return query, key, None, 1.0

    def temperature(self, head_dim, p=None):
        return math.sqrt(head_dim)

    def default_lambda(self, head_dim, scaling, p=None):
        return 1.0


class FunctionMetric(Metric):
    """A user's own metric: any function (query (..., N, d), key (..., M, d)) -> distances (..., N, M)."""

    def __init__(self, name, function, *, aliases=(), rotation_invariant=False):
        self.name, self.function, self.aliases = name, function, tuple(aliases)
        self.rotation_invariant = rotation_invariant

    def distance(self, query, key, p=None):
        return self.function(query, key)


_CLASSES = (SquaredEuclidean, Euclidean, Manhattan, Minkowski, Cosine, Chebyshev, LiftedSquaredEuclidean, DotProduct)
# What the kernels know; a user may register another metric under one of these names.
BUILT_IN = {_class.name: _class() for _class in _CLASSES}
for _metric in BUILT_IN.values():
    METRICS.register(_metric.name, _metric, aliases=_metric.aliases)


def register_metric(name: str, metric, *, aliases: tuple[str, ...] = (), rotation_invariant=False, overwrite=False):
    """Register a distance by name, for `AttentionSpec(metric=name)` and `distance_attention(metric=name)`.

    Args:
        name: the metric's name, used in configs and saved checkpoints.
        metric: a function (query (..., N, d), key (..., M, d)) -> distances (..., N, M), all >= 0, or a `Metric`
            instance (with `is_distance = False` its values may be negative). It has no parameters of its own.
        aliases: further names.
        rotation_invariant: whether rotating query and key alike leaves the distance unchanged (matters under RoPE).
        overwrite: replace an entry of the same name.

    A checkpoint that uses such a metric needs the same call before it is loaded.

    Raises `ValueError` for a name that is taken, and for a metric that refers to parameters: no model would train or
    save them.
    """
    if not isinstance(metric, Metric) and not callable(metric):
        raise ValueError(f"metric must be callable or a Metric, got {type(metric).__name__}")
    refuse_parameters(name, metric)
    if not isinstance(metric, Metric):
        metric = FunctionMetric(name, metric, aliases=aliases, rotation_invariant=rotation_invariant)
    METRICS.register(name, metric, aliases=aliases, overwrite=overwrite)
    # Models look their metric up by `metric.name`: a subclass of a built-in one must not keep its parent's name.
    metric.name = name
    return metric


def get_metric(name: str) -> Metric:
    """Return the metric registered under `name` or an alias; raises `ValueError` listing the known ones."""
    try:
        return METRICS.get(name)
    except ValueError as error:
        raise ValueError(f"{error}{mechanism_hint(name)}. Your own? Call distattn_hf.register_metric first") from None
