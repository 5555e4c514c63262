"""Nyström attention with the Gaussian kernel: linear time, bidirectional or causal, exact nearby where asked."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..core.attention import check_shapes, without_autocast
from ..core.inputs import HALF, split_mask
from ..core.kernel_cpp_library import can_run
from ..core.nystrom_hybrid import HybridInputs, WindowBias, hybrid_attention
from .landmarks import select_landmarks
from .nystrom_cpp import SOURCE as FAR_SOURCE
from .nystrom_cpp import far_outputs, far_sums

REGULARISATION = 1e-2
# Numbers (float32: 2 MB) of queries or keys that are worked on at a time.
_PART_ENTRIES = 2**19
_LEAST_ROWS = 64


def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    landmarks: Tensor | None = None,
    num_landmarks: int = 64,
    strategy: str = "segment_means",
    window_size: int = 0,
    num_sinks: int = 0,
    lam: float | Tensor = 0.5,
    scaling: float | None = None,
    mask: Tensor | None = None,
    position_bias: WindowBias | None = None,
    is_causal: bool = False,
    lift: bool = False,
    regularisation: float = REGULARISATION,
    nonnegative: bool | None = None,
    seed: int = 0,
) -> Tensor:
    """Compute attention with weights κ(q_i, L)·(κ(L, L) + γI)⁻¹·κ(L, k_j), not κ(q_i, k_j), in O((N + M)·m·d).

    κ(x, y) = exp(-λ·scaling·‖x - y‖²); rows are divided by their sum. Keys within the window and sinks have their exact
    weight κ(q_i, k_j). With as many distinct landmarks as keys and γ = 0 this is exact "sqeuclidean" attention.

    Args:
        query: (B, H, N, d).
        key: (B, H_kv, M, d); H a multiple of H_kv.
        value: (B, H_kv, M, d_v).
        landmarks: (H, m, d) or (B, H, m, d); None: chosen from the keys that are kept, which causal attention cannot
            do without seeing the future.
        num_landmarks: m, where they are chosen here.
        strategy: how they are chosen: see `select_landmarks`.
        window_size: query i sees keys i - window_size + 1 ... i exactly when causal, and those at a distance below
            window_size in both directions otherwise (N = M then). 0: none.
        num_sinks: the first keys that are not padding, seen exactly by all queries that may see them.
        lam: λ > 0, a number or (H,). At 0.5 and with `lift`, κ is the softmax of dot-product attention.
        scaling: None: 1/√d.
        mask: padding: (B, M) or (B, 1, 1, M), bool or 0/1 integers, True = keep.
        position_bias: a bias of the relative position that is constant from window_size on.
        is_causal: query i sees keys j <= i; N = M.
        lift: keys become [k, √(R² - ‖k‖²)], queries [q, 0], so that κ(q, k) = exp(2λ·scaling·q·k) up to a constant of
            the row. R is the largest norm among landmarks (and keys, unless causal).
        regularisation: γ >= 0.
        nonnegative: replace negative entries of (κ(L, L) + γI)⁻¹·κ(L, k_j) by 0. Sums of negative weights can cancel
            exact ones: None does it where there are any (a window, sinks) and where attention is causal.
        seed: of random strategies.

    Returns:
        (B, H, N, d_v) in value's dtype; computed in at least float32. A query that sees nothing gets zeros.

    Raises:
        ValueError: naming the field, its value and what is allowed.

    Source: Nyströmformer (Xiong et al., 2021) for attention by landmarks; here with the Gaussian kernel itself, no
    row softmax of the factors, and a causal form.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    keep = check_arguments(
        query, key, value, landmarks, window_size, num_sinks, lam, scaling, mask, is_causal, regularisation
    )
    check_bias(position_bias, query.shape[1], window_size)
    nonnegative = bool(window_size or num_sinks or is_causal) if nonnegative is None else nonnegative
    dtype = value.dtype
    if 0 in query.shape or 0 in key.shape:
        # No queries, or none of them sees anything; sums of nothing carry the gradient.
        zero = 0.0 * (query.sum() + key.sum() + value.sum())
        return value.new_zeros(*query.shape[:3], value.shape[-1]) + zero.to(dtype)
    with without_autocast(query.device.type):
        query, key, value = (t.float() if t.dtype in HALF else t for t in (query, key, value))
        if not bool(keep.all()):
            # Values at padding may be anything, NaN included.
            key, value = (t.masked_fill(~keep[:, None, :, None], 0.0) for t in (key, value))
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        if landmarks is None:
            landmarks = select_landmarks(
                key, num_landmarks, strategy, keep=keep[:, None], scaling=2 * _average(lam) * scaling, seed=seed
            )
        seen = None if is_causal else (key, keep)
        features = features_of(landmarks, key.dtype, lam, scaling, seen, lift, regularisation, nonnegative)
        if not (is_causal or window_size or num_sinks):
            return _all_far(features, query, key, value, keep).to(dtype)
        inputs = features.hybrid_inputs(query, key, value, keep, num_sinks, window_size, is_causal, position_bias)
        return hybrid_attention(inputs)[0].to(dtype)


def features_of(landmarks, dtype, lam, scaling, seen, lift, regularisation, nonnegative) -> "_Features":
    """Return the features of queries and keys in `dtype`, from the arguments of `nystrom_attention`."""
    landmarks = landmarks.to(dtype)
    landmarks = landmarks if landmarks.dim() == 4 else landmarks[None]
    weight = lam.to(dtype)[:, None, None] * scaling if isinstance(lam, Tensor) else lam * scaling
    return _Features(landmarks, weight, seen, lift, regularisation, nonnegative)


class _Features:
    """κ(q, L) and κ(k, L)·(κ(L, L) + γI)⁻¹ for parts of the rows; all logits lack the row's -weight·(‖q‖² [+ R²]).

    `seen` is (key, keep) where all keys may raise the R of the lift, None where only the landmarks do.
    """

    def __init__(self, landmarks, weight, seen, lift, regularisation, nonnegative):
        self.weight, self.lift, self.nonnegative = weight, lift, nonnegative
        self.landmarks, self.norms = landmarks, landmarks.square().sum(-1)[..., None, :]
        lifted = landmarks
        if lift:
            radius = self.norms.amax(-1, keepdim=True)
            if seen is not None:
                (norms,) = _in_parts(lambda key: (key.square().sum(-1, keepdim=True),), seen[0])
                radius = torch.maximum(radius, (norms * seen[1][:, None, :, None]).amax(2, keepdim=True))
            self.radius, self.heights = radius, _root(radius - self.norms)
            lifted = torch.cat([landmarks.expand(len(radius), -1, -1, -1), self.heights.transpose(-1, -2)], dim=-1)
        self.inverse = _inverse(gaussian_kernel(lifted, lifted, weight), regularisation)

    def hybrid_inputs(
        self, query, key, value, keep, num_sinks: int, window_size: int, is_causal: bool, bias: WindowBias | None
    ) -> HybridInputs:
        """Return `HybridInputs` of query (B, H, N, d), key (B, H, M, d) and value (B, H, M, d_v) in full precision."""
        query, far_query = _in_parts(self.of_queries, query)
        key, far_key = _in_parts(self.of_keys, key)
        return HybridInputs(query, key, value, keep, far_query, far_key, num_sinks, window_size, is_causal, bias)

    def weights(self) -> Tensor:
        """Return w = λ·scaling of each head, (H,)."""
        heads = self.landmarks.shape[1]
        return torch.as_tensor(self.weight, dtype=self.landmarks.dtype).reshape(-1).expand(heads)

    def of_queries(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return (query, far_query) of `HybridInputs`."""
        query = 2 * self.weight * query
        far_query = self.far_queries(query)
        # The key's norm as one more column, so that the logit is a plain product.
        return query if self.lift else torch.cat([query, torch.ones_like(query[..., :1])], dim=-1), far_query

    def far_queries(self, scaled_query: Tensor) -> Tensor:
        """Return far_query of queries times 2·weight."""
        far_query = scaled_query @ self.landmarks.transpose(-1, -2)
        return far_query if self.lift else far_query - self.weight * self.norms

    def of_keys(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return (key, far_key) of `HybridInputs`."""
        far_key = self.kernel(key) @ self.inverse
        if not self.lift:
            key = torch.cat([key, -self.weight * key.square().sum(-1, keepdim=True)], dim=-1)
        return key, far_key.relu() if self.nonnegative else far_key

    def kernel(self, key: Tensor) -> Tensor:
        """Return κ(k, L), both lifted where asked for."""
        norms, landmark_norms = key.square().sum(-1, keepdim=True), self.norms
        product = key @ self.landmarks.transpose(-1, -2)
        if self.lift:
            height = _root(self.radius - norms)
            product = product + height * self.heights
            norms, landmark_norms = norms + height.square(), landmark_norms + self.heights.square()
        return (-self.weight * (norms + landmark_norms - 2 * product).clamp_min(0)).exp()


def _all_far(features: _Features, query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    """Run attention in which every query sees every key through landmarks alone: one sum over the keys for all."""
    if not features.nonnegative and can_run(FAR_SOURCE, query, key, value, features.landmarks, features.weights()):
        return _all_far_by_kernel(features, query, key, value, keep)
    sums = 0.0
    tensors = key, value, keep[:, None, :, None]
    for key, value, keep in zip(*(t.split(_rows(key), dim=2) for t in tensors)):
        far_key = features.of_keys(key)[1] if features.nonnegative else features.kernel(key)
        sums = sums + (far_key * keep).transpose(-1, -2) @ torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
    if not features.nonnegative:
        sums = features.inverse @ sums

    def attend(query):
        far_query = features.far_queries(2 * features.weight * query)
        total = (far_query - far_query.amax(-1, keepdim=True).detach()).exp() @ sums
        weight = total[..., -1:]
        return (total[..., :-1] / torch.where(weight != 0, weight, 1.0),)

    return _in_parts(attend, query)[0]


def _all_far_by_kernel(features: _Features, query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    landmarks, norms, weight = features.landmarks, features.norms[..., 0, :], features.weights()
    heights, radius = torch.zeros_like(norms), None
    if features.lift:
        heights, radius = features.heights[..., 0, :], features.radius[..., 0, 0]
    offset = -weight[:, None] * (norms + heights.square())
    total, mass = far_sums(key, value, keep, landmarks, heights, offset, radius, weight)
    total, mass = features.inverse @ total, (features.inverse @ mass[..., None])[..., 0]
    # Lifted, all landmarks have the same norm.
    return far_outputs(query, total, mass, landmarks, torch.zeros_like(offset) if features.lift else offset, weight)


def _in_parts(function: Callable, tensor: Tensor) -> list[Tensor]:
    """Apply the function to (B, H, N, d), some rows at a time."""
    parts = zip(*map(function, tensor.split(_rows(tensor), dim=2)))
    return [torch.cat(part, dim=2) for part in parts]


def _rows(tensor: Tensor) -> int:
    """Return how many rows of (B, H, N, d) to work on at once so that they fit the CPU's cache."""
    batch, heads, _, size = tensor.shape
    return max(_LEAST_ROWS, _PART_ENTRIES // max(1, batch * heads * size))


def gaussian_kernel(left: Tensor, right: Tensor, weight: float | Tensor) -> Tensor:
    """Return exp(-weight·‖x - y‖²): (..., N, d) and (..., m, d) -> (..., N, m)."""
    squared = left.square().sum(-1, keepdim=True) + right.square().sum(-1)[..., None, :]
    return (-weight * (squared - 2 * left @ right.transpose(-1, -2)).clamp_min(0)).exp()


def _root(squared: Tensor) -> Tensor:
    """Return √x where x > 0, else 0, with a finite slope."""
    positive = squared > 0
    return torch.where(positive, squared, 1.0).sqrt() * positive


def _inverse(matrix: Tensor, regularisation: float) -> Tensor:
    """Return (matrix + γI)⁻¹ of a kernel matrix, by Cholesky; by LU where rounding left it indefinite."""
    matrix = matrix + regularisation * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not bool(failed.any()):
        return torch.cholesky_inverse(factor)
    return torch.linalg.inv(matrix)


def _average(lam: float | Tensor) -> float:
    return float(lam.detach().mean()) if isinstance(lam, Tensor) else lam


def check_bias(bias: WindowBias | None, heads: int, window_size: int) -> None:
    """Raise `ValueError` for a position bias without a window, or of other shapes."""
    if bias is None:
        return
    if not window_size:
        raise ValueError("position_bias needs window_size >= 1: from there on it is constant")
    for name, shape in (("near", (heads, 2 * window_size - 1)), ("behind", (heads,)), ("ahead", (heads,))):
        if (actual_shape := tuple(getattr(bias, name).shape)) != shape:
            raise ValueError(f"position_bias.{name} must have shape {shape}, got {actual_shape}")


def check_mask_length(mask: Tensor | None, num_keys: int) -> None:
    """Raise `ValueError` for a mask of more keys than there are; models, whose static cache has room, cut it."""
    if mask is not None and mask.dim() and mask.shape[-1] > num_keys:
        raise ValueError(
            f"mask must speak of the M={num_keys} keys, got {mask.shape[-1]} in shape "
            f"{tuple(mask.shape)}; cut it to the keys that are given"
        )


def check_arguments(
    query, key, value, landmarks, window_size, num_sinks, lam, scaling, mask, is_causal, regularisation
) -> Tensor:
    """Raise `ValueError` for arguments that are not possible; returns keep (B, M)."""
    check_shapes(query, key, value)
    (batch, heads, num_queries, size), num_keys = query.shape, key.shape[2]
    for name, number in (("window_size", window_size), ("num_sinks", num_sinks)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"{name} must be an integer >= 0, got {number!r}")
    if (is_causal or window_size) and num_queries != num_keys:
        raise ValueError(
            f"{'is_causal' if is_causal else 'window_size'} needs as many queries as keys, got {num_queries} and "
            f"{num_keys}"
        )
    if is_causal and landmarks is None:
        raise ValueError(
            "causal Nyström attention needs fixed landmarks=(H, m, d): landmarks chosen from the keys would let "
            "earlier queries see later keys"
        )
    if landmarks is not None:
        expected = (heads, landmarks.shape[-2] if landmarks.dim() > 1 else 0, size)
        fits = expected[1] and tuple(landmarks.shape[-3:]) == expected
        if not fits or landmarks.shape[:-3] not in ((), (batch,), (1,)):
            raise ValueError(
                f"landmarks must be (H, m >= 1, d) or (B, H, m, d) with B={batch}, H={heads}, d={size}, got shape "
                f"{tuple(landmarks.shape)}"
            )
    values = lam.detach() if isinstance(lam, Tensor) else torch.tensor(float(lam))
    if isinstance(lam, Tensor) and lam.shape != (heads,):
        raise ValueError(f"lam must be a number or a tensor of shape ({heads},), got shape {tuple(lam.shape)}")
    if not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError(f"lam (λ) must be positive and finite, got {lam!r}")
    for name, number, least in (("scaling", scaling, "> 0"), ("regularisation", regularisation, ">= 0")):
        if not math.isfinite(number) or number < 0 or (number == 0 and least == "> 0"):
            raise ValueError(f"{name} must be a finite number {least}, got {number!r}")
    check_mask_length(mask, num_keys)
    keep, bias = split_mask(mask, (batch, heads, num_queries, num_keys))
    if bias is not None or (keep is not None and (keep.shape[1] != 1 or keep.shape[2] != 1)):
        raise ValueError(
            f"mask must say which keys are padding: (B, M) or (B, 1, 1, M), bool or 0/1 integers; got {mask.dtype} of "
            f"shape {tuple(mask.shape)}. Linear attention never forms the (N, M) entries that another mask speaks of"
        )
    if keep is None:
        return torch.ones(batch, num_keys, dtype=torch.bool, device=key.device)
    return keep[:, 0, 0].expand(batch, num_keys)
