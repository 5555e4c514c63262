"""Softened distances: quadratic between near vectors, the plain distance between far ones; ε says what is near.

With x = q - k and the knee δ = ε / d^(1/p) of one coordinate (p = 1 for l1, ∞ for chebyshev):

    l2         √(‖x‖² + ε²) - ε                     Plummer's softening, the pseudo-Huber (Charbonnier) loss
    l1         Σ_c m_c·(|x_c| - m_c/2) / δ          Huber's loss, m_c = min(|x_c|, δ)
    lp         (Σ_c (x_c² + δ²)^(p/2))^(1/p) - ε
    chebyshev  ε·log(mean_c cosh(x_c / ε))
    cosine     -q·k / (√(‖q‖² + ε²)·√(‖k‖² + ε²))   (1 minus the cosine but for the 1, which would round it away)

ε is in the units of the distance, and of the norms for cosine. ε -> 0 gives the distance (chebyshev: but for a constant
of the row), ε -> ∞ a multiple of ‖q - k‖², as the lift of dot-product attention is; for cosine, of -q·k. All but cosine
satisfy f(s·x, s·ε) = s·f(x, ε), cosine f(s·x, s·ε) = f(x, ε): `AttentionInputs.in_units` turns any ε into 1 by that.
"""

import math
from numbers import Real

import torch
from torch import Tensor

# A head whose ε is 0 among softened ones: far below any difference of two vectors.
LEAST = 1e-12
# Where an expression is not used any more it is kept finite by a clamp, well beyond the place where it ends: at the
# bound itself the slope is 1 up to PyTorch 2.13, and 0 since.
_UNUSED = 2.0


def plummer(squared: Tensor, epsilon: float | Tensor) -> Tensor:
    """Return √(squared + ε²) - ε without the cancellation of the two terms."""
    return squared / ((squared + epsilon**2).sqrt() + epsilon)


def huber(difference: Tensor, epsilon: float | Tensor) -> Tensor:
    """Return Σ_c of Huber's loss over the last axis of q - k; ε is a number or broadcasts to its other axes."""
    delta = _knee(difference, epsilon, 1.0)
    size = difference.abs()
    inner = torch.minimum(size, delta)
    return (inner * (size - 0.5 * inner)).sum(-1) / delta[..., 0]


def soft_power_mean(difference: Tensor, epsilon: float | Tensor, p: float) -> Tensor:
    """Return (Σ_c (x_c² + δ²)^(p/2))^(1/p) - ε over the last axis of q - k."""
    delta = _knee(difference, epsilon, p)
    # ε·(mean_c((1 + x_c²/δ²)^(p/2))^(1/p) - 1): each step keeps the digits of what is small.
    exponent = 0.5 * p * torch.log1p((difference / delta).square())
    near = torch.log1p(torch.expm1(exponent.clamp_max(_UNUSED)).mean(-1))
    far = exponent.logsumexp(-1) - math.log(difference.shape[-1])
    growth = torch.where(exponent.detach().amax(-1) <= 1, near, far)
    return delta[..., 0] * difference.shape[-1] ** (1 / p) * torch.expm1(growth / p)


def soft_maximum(difference: Tensor, epsilon: float | Tensor) -> Tensor:
    """Return ε·log(mean_c cosh(x_c / ε)) over the last axis of q - k."""
    delta = _knee(difference, epsilon, math.inf)
    size = (difference / delta).abs()
    largest = size.detach().amax(-1, keepdim=True)
    # cosh z - 1 = 2·sinh²(z/2) near 0, where the exponentials would round it away; e^z beyond, where sinh overflows.
    near = torch.log1p(2 * torch.sinh(0.5 * size.clamp_max(_UNUSED)).square().mean(-1))
    far = ((size - largest).exp() + (-size - largest).exp()).mean(-1).log() - math.log(2) + largest[..., 0]
    return delta[..., 0] * torch.where(largest[..., 0] <= 1, near, far)


def soft_normalize(vectors: Tensor, epsilon: float | Tensor) -> Tensor:
    """Return x / √(‖x‖² + ε²) along the last axis."""
    return vectors / (vectors.square().sum(-1, keepdim=True) + epsilon**2).sqrt()


def knee(epsilon: float | Tensor, head_dim: int, p: float) -> float | Tensor:
    """Return the knee δ = ε / d^(1/p) of one coordinate."""
    return epsilon / head_dim ** (1 / p)


def _knee(difference: Tensor, epsilon: float | Tensor, p: float) -> Tensor:
    """Return δ as a tensor that broadcasts to q - k (..., N, M, d)."""
    if not isinstance(epsilon, Tensor):
        epsilon = torch.as_tensor(epsilon, dtype=difference.dtype, device=difference.device)
    return knee(epsilon[..., None], difference.shape[-1], p)


def has_softened_form(metric) -> bool:
    """Return whether a metric takes an ε; a subclass with a distance of its own has not its parent's softened form."""
    makers = [next(k for k in type(metric).__mro__ if name in vars(k)) for name in ("softened_distance", "distance")]
    return metric.softens and issubclass(*makers)


def check_softens(metric, softening) -> None:
    """Raise `ValueError` for a metric that has no softened form; softening: the value that was given."""
    if not has_softened_form(metric):
        raise ValueError(
            f"softening must be 0 with metric {metric.name!r}, got {softening!r}; l2, l1, lp, chebyshev and cosine "
            "take one (sqeuclidean is quadratic already)"
        )


def check_softening(metric, epsilon, heads: int | None = None) -> float | Tensor | None:
    """Return ε as given, None for 0; heads: how many entries a tensor of them must have.

    Raises `ValueError` for what is no ε, and for a metric that has no softened form.
    """
    if isinstance(epsilon, Tensor):
        if epsilon.shape not in ((), (heads,)):
            raise ValueError(f"softening must be a number or a tensor ({heads},), got shape {tuple(epsilon.shape)}")
        wrong = not torch.compiler.is_compiling() and not bool(((epsilon >= 0) & epsilon.isfinite()).all())
        epsilon = epsilon.expand(heads) if epsilon.dim() == 0 else epsilon
    else:
        wrong = isinstance(epsilon, bool) or not isinstance(epsilon, Real) or not 0 <= epsilon < math.inf
    if wrong:
        raise ValueError(f"softening (ε) must be a finite number >= 0 or a tensor of them, got {epsilon!r}")
    if not isinstance(epsilon, Tensor) and epsilon == 0:
        return None
    check_softens(metric, epsilon)
    return epsilon if isinstance(epsilon, Tensor) else float(epsilon)
