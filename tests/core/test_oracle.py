"""The reference against Python loops, and dot products against PyTorch's own attention: judges that know no package.

test_backends.py holds every other backend against the reference.
"""

import pytest
import torch
from torch.nn import functional as F

from distattn_hf import distance_attention
from distattn_hf.core.metrics import get_metric
from tests.tolerances import assert_close

from .cases import METRIC_CASES, SOFTENING, Case, make_tensors
from .oracles import loop_attention

LAMBDAS = [0.3, 0.8, 1.3, 2.1]
REFERENCES = [
    Case(metric, p, "reference", softening=softening)
    for metric, p in METRIC_CASES
    for softening in ((0.0, SOFTENING) if get_metric(metric).softens else (0.0,))
]
every_reference = pytest.mark.parametrize("case", REFERENCES, ids=str)


@every_reference
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_attention_equals_python_loops(case, is_causal):
    """All at once: grouped keys, per-head λ, scaling, a mask, a bias, and more queries than one block holds."""
    tensors = make_tensors(18, 5, 3, 2, heads=4, key_heads=2, dtype=torch.float64)
    keep = torch.rand(2, 4, 18, 5) > 0.3
    keep[0, 1, 4] = False
    bias = torch.randn(2, 4, 18, 5, dtype=torch.float64)
    expected = loop_attention(
        case.metric,
        case.p,
        **tensors,
        lam=LAMBDAS,
        scaling=0.7,
        keep=keep,
        bias=bias,
        is_causal=is_causal,
        softening=case.softening,
    )
    actual = case(
        **tensors,
        lam=torch.tensor(LAMBDAS, dtype=torch.float64),
        scaling=0.7,
        mask=keep,
        position_bias=bias,
        is_causal=is_causal,
    )
    assert_close(actual, expected, "float64")


INF = float("inf")
# name -> (mask, bias) as the caller gives them; 18 queries, 5 keys.
PADDING = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
FORMS = {
    "bool (B,M)": (PADDING.bool(), None),
    "int (B,M)": (PADDING, None),
    "bool (B,N,M)": (torch.arange(180).view(2, 18, 5) % 7 != 3, None),
    "bool (1,H,1,M)": (torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 0, 1]]).bool()[None, :, None], None),
    "float (B,1,1,M)": (
        torch.tensor([[-INF, 0.5, 0.0, -1.5, 2.0], [0.0, -2.0, 0.0, -3e38, -INF]])[:, None, None],
        None,
    ),
    "float (B,M)": (torch.tensor([[-INF, 0.5, 0.0, -1.5, 2.0], [0.0, -2.0, 0.0, 1.0, -3e38]]), None),
    "bias (1,H,N,M)": (None, torch.arange(180, dtype=torch.float64).view(1, 2, 18, 5).cos()),
    "float + bias": (
        torch.tensor([[-INF, 0.5, 0.0, -1.5, 2.0], [0.0, -2.0, 0.0, 1.0, -3e38]])[:, None, None],
        torch.arange(180, dtype=torch.float64).view(1, 2, 18, 5).cos(),
    ),
    "int (B,M) + bias that masks": (
        PADDING,
        torch.where(torch.arange(180) % 4 == 1, -INF, torch.arange(180, dtype=torch.float64).cos()).view(1, 2, 18, 5),
    ),
    "int (B,M) + bias": (PADDING, torch.arange(180, dtype=torch.float64).view(1, 2, 18, 5).cos()),
}


# What a mask means is decided before a metric or a backend is asked: one that adds to distances, one to dot products.
@pytest.mark.parametrize("case", [Case("l1", None, "reference"), Case("sqeuclidean", None, "sdpa")], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_mask_equals_python_loops(case, form):
    """The other tests compare backends, which all get their mask from one function: this one judges that function."""
    tensors = make_tensors(18, 5, 3, 2, dtype=torch.float64)
    mask, bias = FORMS[form]
    keep, total = torch.ones(2, 2, 18, 5, dtype=torch.bool), torch.zeros(2, 2, 18, 5, dtype=torch.float64)
    if mask is not None:
        axes = {2: (slice(None), None, None), 3: (slice(None), None), 4: ()}[mask.dim()]
        mask_in_full = mask[axes].expand(2, 2, 18, 5)
        if mask.is_floating_point():
            keep = mask_in_full > -1e38
            total = total + mask_in_full.double().where(keep, 0.0)
        else:
            keep = mask_in_full == 1
    if bias is not None:
        total = total + bias
    expected = loop_attention(
        case.metric, case.p, **tensors, lam=[0.9, 0.9], scaling=0.5, keep=keep, bias=total, softening=case.softening
    )
    actual = case(**tensors, lam=0.9, scaling=0.5, mask=mask, position_bias=bias)
    assert_close(actual, expected, "float64")


@every_reference
def test_bare_attention_equals_python_loops(case):
    """Nothing but query, key, value and a plain number λ, which takes other branches than the test above."""
    tensors = make_tensors(18, 5, 3, 2, dtype=torch.float64)
    expected = loop_attention(case.metric, case.p, **tensors, lam=[0.9, 0.9], scaling=3**-0.5, softening=case.softening)
    assert_close(case(**tensors, lam=0.9), expected, "float64")


@every_reference
def test_default_lambda_is_the_metrics_own(case):
    tensors = make_tensors(18, 5, 12, dtype=torch.float64)
    lam = get_metric(case.metric).default_lambda(12, 0.4, case.p)
    assert_close(case(**tensors, scaling=0.4), case(**tensors, scaling=0.4, lam=lam), "equal")
    assert not torch.equal(case(**tensors, scaling=0.4), case(**tensors, scaling=0.4, lam=1.5 * lam))


@pytest.mark.parametrize("backend", ["sdpa", "chunked", "reference"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("metric", "factor"), [("dot", 1.0), ("lifted_sqeuclidean", 2.0)])
@pytest.mark.parametrize("lam", [0.5, 1.7])
def test_dot_product_control_is_pytorchs_attention(backend, is_causal, metric, factor, lam):
    """λ=½ of the lifted distance, and λ=1 of the dot control, are the teacher's attention."""
    tensors = make_tensors(33, 33, 24, dtype=torch.float64)
    scale = factor * lam * 24**-0.5
    expected = F.scaled_dot_product_attention(**tensors, is_causal=is_causal, scale=scale)
    actual = distance_attention(**tensors, metric=metric, lam=lam, is_causal=is_causal, backend=backend)
    assert_close(actual, expected, "float64")


@pytest.mark.parametrize("backend", ["sdpa", "chunked", "reference"])
def test_squared_euclidean_is_pytorchs_attention_with_a_key_norm_bias(backend):
    """-λ·s·‖q-k‖² = 2λ·s·q·k - λ·s·‖k‖² up to a constant of the row; per head, as an attn_mask that PyTorch adds."""
    tensors = make_tensors(33, 21, 17, 9, dtype=torch.float64)
    lam, scaling = torch.tensor([0.4, 1.1], dtype=torch.float64), 0.3
    norms = tensors["key"].square().sum(-1)[:, :, None, :]
    expected = F.scaled_dot_product_attention(
        tensors["query"] * lam[:, None, None],
        tensors["key"],
        tensors["value"],
        attn_mask=-lam[:, None, None] * scaling * norms.expand(-1, -1, 33, -1),
        scale=2 * scaling,
    )
    actual = distance_attention(**tensors, metric="sqeuclidean", lam=lam, scaling=scaling, backend=backend)
    assert_close(actual, expected, "float64")


@pytest.mark.parametrize("backend", ["sdpa", "chunked", "reference"])
def test_cosine_is_pytorchs_attention_on_the_sphere(backend):
    tensors = make_tensors(33, 21, 17, 9, dtype=torch.float64)
    sphere = {name: tensors[name] / tensors[name].norm(dim=-1, keepdim=True) for name in ("query", "key")}
    expected = F.scaled_dot_product_attention(**sphere, value=tensors["value"], scale=1.9 * 0.3)
    actual = distance_attention(**tensors, metric="cosine", lam=1.9, scaling=0.3, backend=backend)
    assert_close(actual, expected, "float64")
