"""λ, α, shift, maps and ε of converted heads against the formulas of `HeadParameters`, by both ways to compute them."""

import pytest
import torch

from distattn_hf import AttentionSpec
from distattn_hf.core.metrics import get_metric
from distattn_hf.core.parameters import HeadParameters
from tests.tolerances import assert_close

HEADS, KEY_HEADS, SIZE = 4, 2, 6


def random_group(**options) -> HeadParameters:
    group = HeadParameters(AttentionSpec(**options), HEADS, SIZE).double()
    for parameter in group.parameters():
        parameter.data += 0.4 * torch.randn_like(parameter)
    return group


@pytest.mark.parametrize("way", ["fold", "mapped"])
@pytest.mark.parametrize("transform", ["none", "scalar", "maps"])
@pytest.mark.parametrize(
    ("metric", "softening"),
    [("sqeuclidean", 0), *((m, s) for m in ("l2", "l1", "lp", "chebyshev", "cosine") for s in (0, 1.7, "fit"))],
)
def test_logits_are_those_of_the_formula(metric, transform, softening, way):
    """-λ·dist_ε(q·Q/α, α·(k - c)·K), head by head: the fit sees "mapped", attention runs "fold"."""
    p = 3.0 if metric == "lp" else None
    group, measure = random_group(metric=metric, transform=transform, softening=softening, p=p), get_metric(metric)
    query, key = torch.randn(2, HEADS, 5, SIZE).double(), torch.randn(2, KEY_HEADS, 7, SIZE).double()
    whole = key.repeat_interleave(HEADS // KEY_HEADS, dim=1)
    heads = group(query, key if way == "fold" else whole, way)
    keys = heads.key.repeat_interleave(HEADS // heads.key.shape[1], dim=1)
    expected = []
    for head in range(HEADS):
        q, k = query[:, head], whole[:, head]
        if transform != "none":
            alpha = group.log_alpha[head].exp()
            q, k = q / alpha, alpha * (k - group.shift[head])
        if transform == "maps":
            q, k = q @ group.query_map[head], k @ group.key_map[head]
        epsilon = group.log_softening[head].exp() if softening == "fit" else softening
        distance = measure.softened_distance(q, k, epsilon, p) if softening else measure.distance(q, k, p)
        expected.append(-group.log_lambda[head].exp() * distance)

    def of(value, head):
        return value[head] if isinstance(value, torch.Tensor) else value

    for head, wanted in enumerate(expected):
        q, k, epsilon = heads.query[:, head], keys[:, head], of(heads.softening, head)
        distance = measure.distance(q, k, p) if epsilon is None else measure.softened_distance(q, k, epsilon, p)
        logits = -of(heads.lam, head) * distance
        # What all keys of a query share changes no weight, and the two ways may differ in it.
        assert_close(logits - logits.mean(-1, True), wanted - wanted.mean(-1, True), "float64", f"head {head}")
