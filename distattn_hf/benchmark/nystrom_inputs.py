"""Inputs of the Nyström benchmark, exact attention on them, and the formula that ours is checked against."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..functional.landmarks import select_landmarks
from .nystrom_options import NystromCase

KINDS = ("normal", "clustered")
CLUSTERS, _SCALE, _SPREAD, _DRIFT = 48, 0.7, 0.25, 0.3
RECIPE = {
    "normal": "query, key and value from N(0, I)",
    "clustered": f"per head {CLUSTERS} centres from N(0, {_SCALE}²·I); key = a random centre + N(0, {_SPREAD}²·I) + "
    f"drift, a vector from N(0, {_DRIFT}²·I) times sin(2π·position/N); query = a random centre + N(0, {_SPREAD}²·I); "
    "value = a vector of the key's centre from N(0, I) + N(0, 0.5²·I)",
}
GAMMA = 1e-2
# Query rows on which the error against exact attention is taken, and logits that are in memory at a time.
_ERROR_ROWS, _LOGITS = 1024, 2**24


def make_inputs(case: NystromCase, kind: str, *, sample: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw (query, key, value); another `sample` has the same centres and drift but other tokens."""
    batch, heads, length, size = case.batch, case.heads, case.length, case.head_size
    shared_generator = torch.Generator().manual_seed(case.seed)
    sample_generator = torch.Generator().manual_seed(1000 * (case.seed + 1) + sample)

    def normal(*shape, generator=sample_generator):
        return torch.randn(*shape, generator=generator)

    if kind == "normal":
        tensors = [normal(batch, heads, length, size) for _ in range(3)]
    else:
        centres, values = (normal(heads, CLUSTERS, size, generator=shared_generator) for _ in range(2))
        direction = _DRIFT * normal(heads, 1, size, generator=shared_generator)
        head = torch.arange(heads)[:, None]

        def labels():
            return torch.randint(CLUSTERS, (batch, heads, length), generator=sample_generator)

        of_key, of_query = labels(), labels()
        drift = direction * torch.sin(2 * math.pi * torch.arange(length) / length)[:, None]
        tensors = [
            _SCALE * centres[head, of_query] + _SPREAD * normal(batch, heads, length, size),
            _SCALE * centres[head, of_key] + _SPREAD * normal(batch, heads, length, size) + drift,
            values[head, of_key] + 0.5 * normal(batch, heads, length, size),
        ]
    return tuple(tensor.to(case.device) for tensor in tensors)


def error_rows(case: NystromCase) -> Tensor:
    """Return evenly spaced query rows, including the last one."""
    count = min(_ERROR_ROWS, case.length)
    return (torch.arange(1, count + 1) * case.length // count - 1).to(case.device)


def exact_rows(case: NystromCase, query: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> Tensor:
    """Compute softmax attention of some query rows, block by block."""
    outputs = []
    for block in rows.split(max(1, _LOGITS // (case.batch * case.heads * case.length))):
        logits = query[:, :, block] @ key.transpose(-1, -2) * case.head_size**-0.5
        if case.causal:
            logits = logits.masked_fill(torch.arange(case.length, device=rows.device) > block[:, None], -math.inf)
        outputs.append(logits.softmax(-1) @ value)
    return torch.cat(outputs, dim=2)


def fixed_landmarks(case: NystromCase, kind: str, strategy: str) -> Tensor:
    """Return landmarks (H, m, d) for causal attention, chosen from the keys of other tokens with the same centres."""
    length = max(4096, case.num_landmarks)
    other_case = NystromCase(**{**vars(case), "length": length, "batch": 1})
    keys = make_inputs(other_case, kind, sample=1)[1][0]
    return select_landmarks(keys, case.num_landmarks, strategy, scaling=case.head_size**-0.5, seed=case.seed)


def oracle(case: NystromCase, query, key, value, strategy: str, landmarks: Tensor | None, rows: Tensor) -> Tensor:
    """Compute some rows of the expected output in float64 by the formula: every weight of a row is formed.

    Dot products of lifted vectors: κ(x, y) = exp(-‖x - y‖²/(2√d)), keys and landmarks on a sphere of radius R.
    """
    query, key, value = (tensor.double() for tensor in (query, key, value))
    if landmarks is None:
        landmarks = _means(key, case.num_landmarks) if strategy == "segment_means" else None
    if landmarks is None:
        # The test suite checks the strategies themselves against plain loops.
        landmarks = select_landmarks(key, case.num_landmarks, strategy, scaling=case.head_size**-0.5)
    landmarks = landmarks.double()
    radius = landmarks.square().sum(-1).amax(-1)
    if not case.causal:
        radius = torch.maximum(radius, key.square().sum(-1).amax(-1))
    radius = radius[..., None]

    def lift(points):
        rest = radius - points.square().sum(-1)
        return torch.cat([points, torch.where(rest > 0, rest, 1.0).sqrt()[..., None] * (rest > 0)[..., None]], dim=-1)

    def kernel(x, y):
        return torch.exp(-(x[..., :, None, :] - y[..., None, :, :]).square().sum(-1) / (2 * case.head_size**0.5))

    centres = lift(landmarks)
    inverse = torch.linalg.inv(
        kernel(centres, centres) + GAMMA * torch.eye(case.num_landmarks, device=key.device, dtype=torch.float64)
    )
    squared = lift(key).square().sum(-1, keepdim=True) + centres.square().sum(-1)[..., None, :]
    distance = squared - 2 * lift(key) @ centres.transpose(-1, -2)
    far_key = torch.exp(-distance / (2 * case.head_size**0.5)) @ inverse
    row_queries = query[:, :, rows]
    weights = torch.exp(row_queries @ landmarks.transpose(-1, -2) * case.head_size**-0.5)
    if case.causal:
        far_key = far_key.relu()
        weights = weights @ far_key.transpose(-1, -2)
        exact = torch.exp(row_queries @ key.transpose(-1, -2) * case.head_size**-0.5)
        position = torch.arange(case.length, device=key.device)
        seen_exactly = (rows[:, None] - position < case.window_size) | (position < case.num_sinks)
        weights = torch.where(seen_exactly, exact, weights) * (position <= rows[:, None])
    else:
        weights = weights @ far_key.transpose(-1, -2)
    return weights @ value / weights.sum(-1, keepdim=True)


def _means(key: Tensor, number: int) -> Tensor:
    length = key.shape[2]
    ends = [segment * length // number for segment in range(number + 1)]
    if length < number:
        return key[:, :, ends[:-1]]
    return torch.stack([key[:, :, start:stop].mean(2) for start, stop in zip(ends, ends[1:])], dim=2)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ‖actual - expected‖ / ‖expected‖ over all entries."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def sdpa(case: NystromCase):
    """Return `scaled_dot_product_attention` for the case."""
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, is_causal=case.causal)
