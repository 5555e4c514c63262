"""Lipschitz constants of self-attention: the bound for L2 attention with tied projections, and what one measures.

X (N, D) are tokens, H heads of size d = D/H. Dot-product attention has no Lipschitz constant on R^(N×D); L2 attention
has: squared Euclidean distances, W_K = W_Q, and values mapped by A_h = W_Q,h W_Q,hᵀ/√d before W_V,h. Norms are those of
flattened X. Source: Kim, Papamakarios and Mnih, The Lipschitz Constant of Self-Attention (2021).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ATTENTIONS = ("dot", "sqeuclidean", "l2")
# Newton's method for `inverse_phi` squares its error: far more than double precision needs.
_NEWTON_STEPS = 50


@dataclass(frozen=True)
class SelfAttention:
    """Bidirectional self-attention X (N, D) -> (N, D) with tied projections, for vjp, jvp and their derivatives.

    attention "sqeuclidean" is the paper's L2 attention, logits -‖q-k‖²/√d and values X·A_h·W_V,h; "l2" is that with
    logits -‖q-k‖/√d, for which there is no theorem; "dot" has logits q·k/√d and values X·W_V,h.
    query, value: (H, D, d); output: (D, D).
    """

    attention: str
    query: Tensor
    value: Tensor
    output: Tensor

    def __post_init__(self):
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {self.attention!r}")

    @classmethod
    def random(cls, attention: str, width: int, heads: int, seed: int = 0) -> "SelfAttention":
        """Return one with weights from N(0, 1/D), in float64; raises `ValueError` where heads do not divide width."""
        if width < 1 or heads < 1 or width % heads:
            raise ValueError(f"heads must divide width={width}, got {heads}")
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * width**-0.5

        return cls(attention, *(draw(heads, width, width // heads) for _ in range(2)), draw(width, width))

    def __call__(self, x: Tensor) -> Tensor:
        """Return F(x) = [P_1 x A_1 W_V,1, …, P_H x A_H W_V,H] W_O, P_h the weights: (N, D)."""
        scale = self.query.shape[-1] ** -0.5
        q = x @ self.query
        if self.attention == "dot":
            logits, value = q @ q.mT, self.value
        else:
            norms = q.square().sum(-1)
            logits = 2 * q @ q.mT - norms[:, :, None] - norms[:, None]
            if self.attention == "l2":
                # Not differentiable at 0, which a token's distance to itself is.
                logits = -((1e-12 - logits).clamp_min(1e-12)).sqrt()
            value = self.query @ self.query.mT * scale @ self.value
        attended = (logits * scale).softmax(-1) @ (x @ value)
        return attended.transpose(0, 1).flatten(1) @ self.output

    def bounds(self, num_tokens: int) -> dict[str, float]:
        """Return upper bounds of the Lipschitz constants in the norms 2 and ∞ over N tokens (the paper's theorem 3.2).

        Lip_2 ≤ √N/√d · (4·φ⁻¹(N-1) + 1) · √(Σ_h ‖W_Q,h‖⁴‖W_V,h‖²) · ‖W_O‖, spectral norms;
        Lip_∞ ≤ (4·φ⁻¹(N-1) + 1/√d) · ‖W_Oᵀ‖_∞ · max_h ‖W_Q,h‖_∞‖W_Q,hᵀ‖_∞ · max_h ‖W_V,hᵀ‖_∞.

        ‖W_Q,h‖² of each head bounds ‖A_h‖·√d: in Y = X·W_Q,h/d^(1/4), a head is P(Y)·Y·W_Q,hᵀ/d^(1/4), of which the
        rows of P(Y)·Y have Jacobians of norm 4·φ⁻¹(N-1) + 1 at most. Raises `ValueError` but for "sqeuclidean", N >= 2.
        """
        if self.attention != "sqeuclidean":
            raise ValueError(f"there is a bound for attention 'sqeuclidean' only, got {self.attention!r}")
        if num_tokens < 2:
            raise ValueError(f"num_tokens must be >= 2, got {num_tokens}")
        inverse, size = inverse_phi(num_tokens - 1), self.query.shape[-1]

        def spectral(matrix):
            return torch.linalg.matrix_norm(matrix, 2)

        def largest_row_sum(matrix):
            return torch.linalg.matrix_norm(matrix, math.inf)

        products = (spectral(self.query).square() * spectral(self.value)).square().sum().sqrt()
        two = math.sqrt(num_tokens / size) * (4 * inverse + 1) * products * spectral(self.output)
        query, value = largest_row_sum(self.query) * largest_row_sum(self.query.mT), largest_row_sum(self.value.mT)
        infinity = (4 * inverse + size**-0.5) * largest_row_sum(self.output.mT) * query.max() * value.max()
        return {"2": float(two), "inf": float(infinity)}


def inverse_phi(value: float) -> float:
    """Return t > 0 with φ(t) = t·exp(t + 1) = value > 0, by Newton's method on ln t + t + 1 = ln value.

    φ⁻¹(N-1) = W((N-1)/e), Lambert's W; it grows as ln N - ln ln N.
    """
    if not value > 0:
        raise ValueError(f"value must be > 0, got {value!r}")
    t, target = min(value / math.e, math.log1p(value)), math.log(value)
    for _ in range(_NEWTON_STEPS):
        # In ln t, in which the function is convex and increasing, so that no step leaves t > 0.
        t *= math.exp(-(math.log(t) + t + 1 - target) / (1 + t))
    return t


def spectral_norm(
    function: Callable[[Tensor], Tensor], x: Tensor, *, iterations: int = 30, start: Tensor | None = None, seed: int = 0
) -> tuple[float, Tensor, Tensor]:
    """Estimate ‖J‖₂ of a function's Jacobian at x by power iteration on JᵀJ, with jvp and vjp: J is never formed.

    Returns (norm, u, v): ‖Jv‖ with ‖v‖ = 1, which is never above ‖J‖₂, and u = Jv/‖Jv‖. start: a v to go on from.
    """
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype) if start is None else start
    _, pull = torch.func.vjp(function, x)
    v = v / v.norm()
    for _ in range(iterations):
        (v,) = pull(torch.func.jvp(function, (x,), (v,))[1])
        v = v / v.norm().clamp_min(torch.finfo(x.dtype).tiny)
    u = torch.func.jvp(function, (x,), (v,))[1]
    norm = u.norm()
    return float(norm), u / norm.clamp_min(torch.finfo(x.dtype).tiny), v


def infinity_norm(function: Callable[[Tensor], Tensor], x: Tensor, *, starts: int = 4, seed: int = 0) -> float:
    """Estimate ‖J‖_∞, the largest row sum of |J|, from below: each estimate is the sum of one row.

    From a sign vector s, the row in which J·s is largest, its signs, and so on while it grows (Hager, 1984, on Jᵀ).
    """
    generator = torch.Generator().manual_seed(seed)
    output, pull = torch.func.vjp(function, x)
    best = 0.0
    for _ in range(starts):
        signs, found = torch.randn(x.shape, generator=generator, dtype=x.dtype).sign(), -1.0
        while True:
            image = torch.func.jvp(function, (x,), (signs,))[1].flatten()
            (row,) = pull(torch.nn.functional.one_hot(image.abs().argmax(), image.numel()).to(x.dtype).view_as(output))
            if float(row.abs().sum()) <= found * (1 + 1e-9):
                break
            signs, found = row.sign(), float(row.abs().sum())
        best = max(best, found)
    return best


def steepest_points(
    function: Callable[[Tensor], Tensor], x: Tensor, *, steps: int = 20, rate: float = 0.05, iterations: int = 3
) -> tuple[Tensor, float]:
    """Return points near which the function is steep, and ‖J‖₂ there: Adam on x, within the ball of x's norm.

    The gradient of ‖J(x)‖₂ is that of uᵀJ(x)v with its singular vectors, from `iterations` of power iteration a step.
    rate is in units of the root mean square of x. The largest norm met counts, not the last.
    """
    radius, v = x.norm(), None
    points = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([points], lr=rate * float(radius) / math.sqrt(x.numel()))
    best, best_points = -1.0, x
    for _ in range(steps + 1):
        norm, u, v = spectral_norm(function, points.detach(), iterations=10 if v is None else iterations, start=v)
        if norm > best:
            best, best_points = norm, points.detach().clone()
        _, image = torch.func.jvp(function, (points,), (v,))
        optimizer.zero_grad()
        (-(u * image).sum()).backward()
        optimizer.step()
        with torch.no_grad():
            points.mul_((radius / points.norm()).clamp_max(1))
    return best_points, best
