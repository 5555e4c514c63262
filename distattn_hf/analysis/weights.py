"""Attention weights of one module in blocks of queries, so that a map of all heads never exists at once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.absolute_logits import absolute_shift
from ..core.head_groups import join_heads, key_padding
from ..core.inputs import ModuleCall, add_triangle, masked_softmax, rows_of
from ..core.metrics import get_metric
from ..core.nystrom_cache import NystromLayer
from ..core.nystrom_heads import hybrid_inputs
from ..core.nystrom_hybrid import HybridInputs
from ..core.parameters import NystromParameters
from ..core.reference import hybrid_rows
from ..core.relative_bias import of_heads
from ..core.retrieval_gather import weight_rows
from ..core.retrieval_heads import retrieval_problem, some_heads

# Number of weights (float32: 16 MB) of a block of queries and all heads.
_BLOCK_ENTRIES = 2**22
# Metrics whose logits have a term in ‖k‖², unlike a dot product.
_EUCLIDEAN = ("sqeuclidean", "l2", "lifted_sqeuclidean")


@dataclass(frozen=True)
class Rows:
    """Queries start, start + 1, ... of one module: weights (B, H, n, M) in at least float32, their rows of sum 1 or 0
    (with a learned sink: 1 less its weight).

    keep: which keys each may see, bool, broadcastable to the weights. logits (B, H, n, M), of rows up to a constant,
    before masking, and key_norms (B, H, n, M), the term of them that only depends on the keys' norms: NaN in heads
    without one; both None where no head has such a term.
    """

    start: int
    weights: Tensor
    keep: Tensor
    logits: Tensor | None = None
    key_norms: Tensor | None = None


@dataclass
class AttentionCall:
    """One call of an attention module: the inputs of its weights, in memory linear in the length.

    query (B, H, N, d), key and value (B, H, M, d) with a head for every query head; mask (True = keep) and
    position_bias broadcastable to (B, H, N, M), or None; parts: (heads, `HeadParameters` or None for dot product).
    softcap and sink_logit, broadcastable to (B, H, N, 1): the module's own (see core/absolute_logits.py), or None; what
    a sink takes of a row is missing from its weights. output (B, H, N, d_v) is set once the attention has run.
    """

    name: str
    layer: int | None
    kind: str
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    mask: Tensor | None
    position_bias: Tensor | None
    is_causal: bool
    parts: list[tuple[list[int], object]]
    softcap: float | None = None
    output: Tensor | None = None
    sink_logit: Tensor | None = None
    groups: int = 1

    def __post_init__(self):
        self._heads: list[tuple[list[int], Callable]] | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, M)."""
        return *self.query.shape[:3], self.key.shape[2]

    def keep_rows(self, start: int, stop: int) -> Tensor:
        """Return which keys queries start to stop may see: bool, broadcastable to (B, H, n, M)."""
        keep = torch.ones(1, 1, 1, self.shape[3], dtype=torch.bool, device=self.query.device)
        if self.mask is not None:
            keep = self.mask[..., start:stop, :] if self.mask.shape[-2] > 1 else self.mask
        if self.is_causal:
            keep = add_triangle(keep, stop - start, self.shape[3], keep.device, offset=start)
        return keep

    def rows(self, start: int, stop: int) -> Rows:
        """Return the weights of queries start to stop; raises `ValueError` with a Nyström cache."""
        if self._heads is None:
            if isinstance(getattr(self.key, "distattn_layer", None), NystromLayer):
                raise ValueError(
                    f"{self.name!r}: with a cache its keys are sums by now and weights are not available; pass "
                    "use_cache=False"
                )
            self._heads = [(heads, self._part(heads, group)) for heads, group in self.parts]
        keep = self.keep_rows(start, stop)
        results = [(heads, *weights(start, stop, keep)) for heads, weights in self._heads]
        weights = join_heads([(heads, w, w) for heads, w, *_ in results])[0]
        if all(norms is None for *_, norms in results):
            return Rows(start, weights, keep)
        absent = float("nan")
        pairs = [
            (heads, *(torch.full_like(w, absent) if t is None else t.expand_as(w) for t in (logits, norms)))
            for heads, w, logits, norms in results
        ]
        return Rows(start, weights, keep, *join_heads(pairs))

    def blocks(self) -> Iterator[Rows]:
        """Yield all queries in blocks, of which all heads together have no more entries than the map of one head."""
        batch, heads, num_queries, num_keys = self.shape
        limit = min(_BLOCK_ENTRIES // max(1, batch * heads * num_keys), num_queries // heads)
        for start in range(0, num_queries, max(1, limit)):
            yield self.rows(start, min(start + max(1, limit), num_queries))

    def full(self) -> Tensor:
        """Return all weights (B, H, N, M), for short texts."""
        return torch.cat([rows.weights for rows in self.blocks()], dim=2)

    def check_sums(self) -> None:
        """Raise `ValueError` where the output is no weighted sum of the values, so that one weight says too little."""

    def _part(self, heads: list[int], group) -> Callable:
        index = torch.tensor(heads, device=self.query.device)
        exact = self._exact(index, group)
        if group is not None and group.spec.mechanism == "retrieval":
            return self._retrieval(heads, index, group)
        if not isinstance(group, NystromParameters):
            return exact
        return self._nystrom(index, group, exact)

    def nystrom_parts(self) -> Iterator[tuple[Tensor, HybridInputs, Callable]]:
        """Yield (heads, their inputs, exact rows as (start, stop, keep) -> (weights, ...)) of Nyström heads."""
        for heads, group in self.parts:
            if isinstance(group, NystromParameters):
                index = torch.tensor(heads, device=self.query.device)
                yield index, self._hybrid(index, group), self._exact(index, group)

    def _exact(self, index: Tensor, group) -> Callable:
        """Return (start, stop, keep) -> (weights, logits, key norm term or None) for heads with exact attention."""
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        query, key = self.query[:, index].to(dtype), self.key[:, index].to(dtype)
        metric, lam, p, epsilon = get_metric("dot"), 1.0, None, None
        sink, shift = of_heads(self.sink_logit, index), None
        if group is not None:
            mapped, metric, p = group(query, key, "mapped"), get_metric(group.metric), group.p
            query, key, lam, epsilon, *_ = mapped
            epsilon = epsilon[:, None, None] if isinstance(epsilon, Tensor) else epsilon
            shift = absolute_shift(mapped, metric, p, ModuleCall(self.scaling, sink_logit=sink, softcap=self.softcap))
        weight = self.scaling * (lam[:, None, None] if isinstance(lam, Tensor) else lam)
        bias = of_heads(self.position_bias, index)
        squared = key.square().sum(-1)[:, :, None] if metric.name in _EUCLIDEAN and epsilon is None else None
        # The form leaves out a constant of the row, of the lift what comes between it and the dot product.
        by_dot_form = metric.has_dot_form and (shift is None or metric.name == "lifted_sqeuclidean")
        if by_dot_form:
            left, right, key_bias, factor = metric.dot_form(query, key, *(() if epsilon is None else (epsilon,)))

        def logits_of(start, stop):
            if not by_dot_form:
                return -weight * metric.checked_distance(query[:, :, start:stop], key, p, epsilon=epsilon)
            logits = factor * left[:, :, start:stop] @ right.mT
            return weight * (logits if key_bias is None else logits + key_bias[:, :, None])

        def rows(start, stop, keep):
            keep = keep if keep.shape[1] == len(index) else of_heads(keep, index)
            plain = logits = logits_of(start, stop)
            if shift is not None:
                logits = logits + rows_of(shift, slice(start, stop))
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            if bias is not None:
                logits = logits + rows_of(bias, slice(start, stop)).to(logits.dtype)
            norms = None
            if squared is not None:
                norms = _key_norms(metric.name, weight, squared, plain, keep)
            row_sink = rows_of(sink, slice(start, stop))
            return masked_softmax(logits, keep.expand_as(logits), row_sink), plain if norms is not None else None, norms

        return rows

    def _hybrid(self, index: Tensor, group) -> HybridInputs:
        bias = of_heads(self.position_bias, index)
        call = ModuleCall(
            self.scaling, None, bias, self.is_causal, is_cross=self.kind == "cross",
            sink_logit=of_heads(self.sink_logit, index),
        )  # fmt: skip
        tensors = self.query[:, index], self.key[:, index], self.value[:, index]
        return hybrid_inputs(group, *tensors, key_padding(self.mask, self.query, self.shape[3]), call, self.shape[3])

    def _retrieval(self, heads: list[int], index: Tensor, group) -> Callable:
        """Return the same function for heads with retrieval attention."""
        call = ModuleCall(
            self.scaling, None, of_heads(self.position_bias, index), self.is_causal, is_cross=self.kind == "cross",
            sink_logit=of_heads(self.sink_logit, index), softcap=self.softcap,
        )  # fmt: skip
        tensors = self.query, self.key[:, :: self.groups], self.value[:, :: self.groups]
        if len(heads) < self.shape[1]:
            tensors = some_heads(heads, *tensors)
        keep = None if self.mask is None else key_padding(self.mask, self.query, self.shape[3])
        weights = weight_rows(retrieval_problem(group, *tensors, keep, call))
        return lambda start, stop, keep: (weights(start, stop), None, None)

    def _nystrom(self, index: Tensor, group, exact: Callable) -> Callable:
        """Return the same function for heads with Nyström attention, whose rows of few keys are exact."""
        inputs = self._hybrid(index, group)

        def rows(start, stop, keep):
            weights = hybrid_rows(inputs, start, stop)
            if limit := group.spec.exact_below:
                sees_few = (keep.sum(-1, keepdim=True) <= limit).expand(len(weights), -1, stop - start, 1)
                if bool(sees_few.any()):
                    weights = torch.where(sees_few, exact(start, stop, keep)[0], weights)
            return weights, None, None

        return rows


def _key_norms(metric: str, weight, squared: Tensor, logits: Tensor, keep: Tensor) -> Tensor:
    """Return the term of ‖k‖² in the logits: -w·‖k‖², w = λ·scaling; in l2, to first order at the mean distance r̄.

    -w·√(‖q‖² + ‖k‖² - 2q·k) changes by -w·δ / (2r̄) with a change δ of ‖k‖². Lifted keys all have one norm.
    """
    if metric == "lifted_sqeuclidean":
        return torch.zeros_like(logits)
    if metric == "sqeuclidean":
        return -weight * squared
    distance = (logits / -weight).masked_fill(~keep, 0.0).sum(-1, keepdim=True)
    mean = distance / keep.sum(-1, keepdim=True).clamp_min(1)
    return -weight * squared / (2 * mean.clamp_min(torch.finfo(mean.dtype).eps))


class StoredCall(AttentionCall):
    """A call of which only the weights (B, H, N, M) are known, from a model that returns nothing else."""

    def __init__(self, name: str, layer: int | None, kind: str, weights: Tensor, mask: Tensor | None):
        nothing = weights.new_zeros(*weights.shape[:3], 0)
        keys = weights.new_zeros(*weights.shape[:2], weights.shape[3], 0)
        super().__init__(name, layer, kind, nothing, keys, keys, 1.0, mask, None, False, [])
        self.stored = weights

    def rows(self, start: int, stop: int) -> Rows:
        """Return the weights of queries start to stop."""
        weights = self.stored[:, :, start:stop]
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
        keep = self.keep_rows(start, stop)
        # It is unknown whether the model is causal: a weight of exactly 0 counts as a masked key.
        return Rows(start, weights, keep & (weights > 0))


class MechanismCall(AttentionCall):
    """A call of a native mechanism, which writes out its weights when they are asked for, all at once."""

    def __init__(self, name: str, entry: dict, mechanism, tensors: tuple, options: dict, output: Tensor):
        query, key, value = tensors
        keep, scaling = options.get("keep"), options.get("scaling") or query.shape[-1] ** -0.5
        super().__init__(
            name, entry["layer"], entry["kind"], query, key, value, scaling,
            None if keep is None else keep[:, None, None], options.get("position_bias"),
            options.get("is_causal", False), [], output=output,
        )  # fmt: skip
        self.mechanism, self.options, self._written_out = mechanism, options, None

    def keep_rows(self, start: int, stop: int) -> Tensor:
        """Return which keys queries start to stop look at: (B, H, n, M)."""
        return self._all()[:, :, start:stop] > 0

    def rows(self, start: int, stop: int) -> Rows:
        """Return the weights of queries start to stop."""
        return Rows(start, self._all()[:, :, start:stop], self.keep_rows(start, stop))

    def check_sums(self) -> None:
        """Raise `ValueError` for a mechanism that adds more than values, as 'relative' does embeddings of offsets."""
        sums, output = self._all() @ self.value.to(self._all().dtype), self.output
        if not bool(((sums - output).abs() <= 1e-2 * output.abs().max()).all()):
            raise ValueError(
                f"{self.name!r}: the outputs of mechanism {self.mechanism.name!r} are not the sum of the values by its "
                "weights, so its weights cannot be changed or credited one by one"
            )

    def _all(self) -> Tensor:
        if self._written_out is None:
            options = {**self.options, "return_weights": True, "dropout_p": 0.0}
            # The method, so that hooks see the model's own calls alone.
            weights = self.mechanism.forward(self.query, self.key, self.value, **options)[1]
            if bool((weights < 0).any()):
                raise ValueError(
                    f"no attention weights available from {self.name!r}: mechanism {self.mechanism.name!r} gives "
                    "negative numbers, which are no weights"
                )
            self._written_out = weights.to(torch.promote_types(weights.dtype, torch.float32))
        return self._written_out
