"""The three competitors of `distattn benchmark` (ours, PyTorch's attention, cdist), and the check before timing."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.attention import distance_attention
from ..core.backends import choose_backend
from ..core.inputs import AttentionInputs
from ..core.metrics import get_metric
from .exact_options import DTYPES, Case
from .measure import timed_call
from .run import summary

# Largest error of a tensor, in units of its largest entry, against the float64 reference on the same inputs.
TOLERANCE = {"float32": 1e-4, "float64": 1e-10}
# Half precision: our error in units of PyTorch's own attention's on the same inputs, each against float64 (the rule of
# HALF_ERROR_RATIO in the tests; the yardstick of the largest error is never below the rounding of one number).
HALF_ERROR_RATIO = 2.0
# N = M of the small check: one even, one odd.
CHECKED_LENGTHS = (32, 77)
# Query rows that are checked at the timed shape; fewer where the gradient of the reference would hold more than so many
# entries of (rows, M, d), in float64 and several times over.
_MOST_ROWS, _ROW_ENTRIES = 16, 2**25

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
NAMES = ("query", "key", "value")


def make_tensors(case: Case) -> tuple[Tensor, ...]:
    """Draw (query, key, value, upstream gradient) from N(0, 1), requiring gradients in a pass that needs them.

    Numbers are rounded to multiples of 2⁻¹⁶, so that q - k is exact in float32: the slopes of l1 and chebyshev then
    jump in every precision at the same places.
    """
    generator = torch.Generator().manual_seed(case.seed)
    query_sizes, key_sizes = (case.heads, case.queries), (case.kv_heads, case.length)
    tensors = []
    for heads, length in (query_sizes, key_sizes, key_sizes, query_sizes):
        tensor = torch.randn(case.batch, heads, length, case.head_size, generator=generator)
        tensors.append(tensor.mul_(2**16).round_().div_(2**16).to(case.device, DTYPES[case.dtype]))
    for tensor in tensors[:3]:
        tensor.requires_grad_(case.pass_name == "forward_backward")
    return tuple(tensors)


def our_attention(case: Case) -> Attention:
    """Return `distance_attention` with the case's metric, its default λ, causality and backend."""

    def ours(query, key, value):
        return distance_attention(query, key, value, **case.problem, is_causal=case.causal, backend=case.backend)

    return ours


def pytorch_attention(case: Case) -> Attention:
    """Return `scaled_dot_product_attention`, with `enable_gqa` where key heads are grouped."""

    def sdpa(query, key, value):
        grouped = case.heads != case.kv_heads
        return F.scaled_dot_product_attention(query, key, value, is_causal=case.causal, enable_gqa=grouped)

    return sdpa


def naive_attention(case: Case) -> Attention | None:
    """Return a direct implementation of softmax(-λ·scaling·dist)·v, all in memory; None for what is not `cdist` alone.

    l1, l2, lp and chebyshev are `torch.cdist` in its default mode, sqeuclidean its square, cosine a product of
    normalised vectors. `cdist` has no half precision: q and k are cast to float32 for it, the weights cast back.
    """
    orders = {"sqeuclidean": 2.0, "l2": 2.0, "l1": 1.0, "lp": case.p, "chebyshev": math.inf}
    if case.metric not in (*orders, "cosine") or case.softening or case.softcap:
        return None
    scaling = case.head_size**-0.5
    lam = get_metric(case.metric).default_lambda(case.head_size, scaling, case.p)

    def naive(query, key, value):
        if case.heads != case.kv_heads:
            key, value = (t.repeat_interleave(case.heads // case.kv_heads, dim=1) for t in (key, value))
        if case.dtype in ("float16", "bfloat16"):
            query, key = query.float(), key.float()
        if case.metric == "cosine":
            distance = 1 - F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-1, -2)
        else:
            distance = torch.cdist(query, key, p=orders[case.metric])
            if case.metric == "sqeuclidean":
                distance = distance**2
        logits = -lam * scaling * distance
        if case.causal:
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
            logits = logits.masked_fill(hidden, -math.inf)
        return torch.softmax(logits, dim=-1).to(value.dtype) @ value

    return naive


def one_call(case: Case, attention: Attention, tensors: tuple[Tensor, ...]) -> Callable[[], object]:
    """Return the timed call: a forward pass without gradient, or a forward and backward pass to query, key, value."""
    *leaves, upstream = tensors
    return timed_call(attention, tuple(leaves), upstream if case.pass_name == "forward_backward" else None)


def backend_of(case: Case, tensors: tuple[Tensor, ...]) -> str:
    """Return the backend that runs these tensors; raises `ValueError` with the reason if an explicit one cannot."""
    metric, scaling = get_metric(case.metric), case.head_size**-0.5
    lam = metric.default_lambda(case.head_size, scaling, case.p)
    inputs = AttentionInputs(
        *tensors[:3], metric, lam, scaling, case.p, is_causal=case.causal, softening=case.softening or None,
        softcap=case.softcap or None,
    )  # fmt: skip
    with torch.set_grad_enabled(case.pass_name == "forward_backward"):
        return choose_backend(case.backend, inputs).name


class Checker:
    """Compares with the float64 reference; results of the small shapes are cached, since many cases share them."""

    def __init__(self):
        self._small = {}

    def check(self, case: Case, ran: str, tensors: tuple[Tensor, ...]) -> dict:
        """Return {"passed", "worst", "error", "bound", "checks"}: the check nearest to (or farthest above) its bound.

        Backend `ran` is checked at two small shapes, forward and (but for decode) gradients, and then, with the case's
        own backend, at the timed shape on a random subset of the query rows.
        """
        key = replace(case, backend=ran, length=0)
        if key not in self._small:
            self._small[key] = [c for length in CHECKED_LENGTHS for c in _check_small(case, ran, length)]
        return summary(self._small[key] + check_rows(case, our_attention(case), tensors))


def _check_small(case: Case, ran: str, length: int) -> list[dict]:
    """Check every row and gradient at N = M = length; decode: one query, no gradient, as it is timed."""
    decode = case.pass_name == "decode"
    checks = []
    for name in ("decode",) if decode else ("forward", "forward_backward"):
        small = replace(case, backend=ran, pass_name=name, length=length)
        tensors = make_tensors(small)
        try:
            backend_of(small, tensors)
        except ValueError:
            # A backend without gradients is only timed without them; it must run the timed pass.
            if name == case.pass_name:
                raise
            continue
        rows = torch.arange(small.queries, device=case.device)
        checks += _compare(small, our_attention(small), tensors, rows, f"{name} at {length}")
    return checks


def check_rows(case: Case, attention: Attention, tensors: tuple[Tensor, ...], *, gradients: bool = True) -> list[dict]:
    """Compare a random subset of the query rows at the shape of `tensors`, always with the last row.

    For gradients, the upstream gradient of all other rows is zero: those of key and value are then the subset's own.
    """
    if not gradients and case.pass_name == "forward_backward":
        case = replace(case, pass_name="forward")
    count = min(_MOST_ROWS, case.queries)
    if case.pass_name == "forward_backward":
        row_entries = case.batch * case.heads * case.length * case.head_size
        count = max(1, min(count, _ROW_ENTRIES // row_entries))
    order = torch.randperm(case.queries - 1, generator=torch.Generator().manual_seed(case.seed + 1))
    rows = torch.cat([order[: count - 1], torch.tensor([case.queries - 1])]).sort().values.to(case.device)
    return _compare(case, attention, tensors, rows, f"{case.pass_name} at {case.length}, {count} rows")


def _compare(case: Case, attention: Attention, tensors: tuple[Tensor, ...], rows: Tensor, where: str) -> list[dict]:
    """Compare output rows, and in a pass with gradients those of query rows, key and value, with float64."""
    reference = replace(case, backend="reference")
    truth = _evaluate_rows(reference, _reference_rows(reference, rows), tensors, rows)
    actual = relative_errors(_evaluate_full(case, attention, tensors, rows), truth)
    if case.dtype in TOLERANCE:
        bounds = dict.fromkeys(truth, (None, TOLERANCE[case.dtype]))
    else:
        peer = _evaluate_full(case, pytorch_attention(case), tensors, rows)
        peer_truth = _evaluate_rows(case, _pytorch_rows(case, rows), tensors, rows)
        # The largest of few entries varies by chance; even the rounded true value can be off by half a unit.
        rounding = torch.finfo(DTYPES[case.dtype]).eps / 2
        bounds = {
            name: (HALF_ERROR_RATIO * mean, HALF_ERROR_RATIO * max(largest, rounding))
            for name, (mean, largest) in relative_errors(peer, peer_truth).items()
        }
    checks = []
    for name in truth:
        for kind, error, bound in zip(("root mean square", "largest"), actual[name], bounds[name]):
            if bound is not None:
                checks.append({"what": f"{where}: {name}, {kind} error", "error": error, "bound": bound})
    return checks


def relative_errors(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Return {name: (root mean square, largest)} of the error, each relative to that of the true tensor."""
    result = {}
    for name, expected in truth.items():
        error, tiny = actual[name].double() - expected, 1e-30
        result[name] = (
            float(error.square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(tiny)),
            float(error.abs().amax() / expected.abs().amax().clamp_min(tiny)),
        )
    return result


def _evaluate_full(case: Case, attention: Attention, tensors, rows: Tensor) -> dict[str, Tensor]:
    """Run all rows as timed and select the given ones."""
    *leaves, upstream = tensors
    if case.pass_name != "forward_backward":
        with torch.no_grad():
            return {"output": attention(*leaves)[:, :, rows]}
    row_upstream = torch.zeros_like(upstream)
    row_upstream[:, :, rows] = upstream[:, :, rows]
    output = attention(*leaves)
    gradients = dict(zip(NAMES, torch.autograd.grad(output, leaves, row_upstream)))
    gradients["query"] = gradients["query"][:, :, rows]
    return {"output": output.detach()[:, :, rows], **{f"{n} gradient": g for n, g in gradients.items()}}


def _evaluate_rows(case: Case, attention: Attention, tensors, rows: Tensor) -> dict[str, Tensor]:
    """Run the given rows alone, in float64."""
    query, key, value, upstream = (tensor.detach().double() for tensor in tensors)
    leaves = [query[:, :, rows], key, value]
    if case.pass_name != "forward_backward":
        return {"output": attention(*leaves)}
    leaves = [leaf.requires_grad_() for leaf in leaves]
    output = attention(*leaves)
    gradients = dict(zip(NAMES, torch.autograd.grad(output, leaves, upstream[:, :, rows])))
    return {"output": output.detach(), **{f"{n} gradient": g for n, g in gradients.items()}}


def _visible(case: Case, rows: Tensor) -> Tensor | None:
    """Return the mask (1, 1, rows, M) of the keys j <= i of causal rows; None: all."""
    if not case.causal:
        return None
    return (torch.arange(case.length, device=rows.device) <= rows[:, None])[None, None]


def _reference_rows(case: Case, rows: Tensor) -> Attention:
    mask = _visible(case, rows)
    return lambda q, k, v: distance_attention(q, k, v, **case.problem, mask=mask, backend="reference")


def _pytorch_rows(case: Case, rows: Tensor) -> Attention:
    mask, grouped = _visible(case, rows), case.heads != case.kv_heads
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
