"""The inputs of one attention call, as a module passes them and in the canonical form of the backends, and masks."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .kernel_cpp_library import in_onnx_export
from .metrics import Metric
from .softening import LEAST, knee

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)
# What `say_backend` has said, the oldest first; the oldest of so many is forgotten for a new one.
_said: dict[str, None] = {}
_MOST_SAID = 1000


@dataclass(frozen=True)
class ModuleCall:
    """What a module passes to its attention beside query, key and value.

    mask: True = keep. Of exact attention broadcastable to (B, H, N, M); of Nyström attention (B or 1, 1, 1, M), which
    keys are no padding. position_bias: added to the logits, broadcastable to (B, H, N, M), or a
    `relative_bias.RelativeBias` that is not yet written out. is_causal: query i sees keys j <= i, counted from the
    start of both in exact attention and from the end in Nyström attention. scaling: the factor beside λ. backend: in
    place of each spec's own. return_weights: the weights (B, H, N, M) are wanted, too. sink_logit, broadcastable to
    (B, H, N, 1), and softcap: the module's own, which compare with dot products (see absolute_logits.py).
    """

    scaling: float
    mask: Tensor | None = None
    position_bias: Any = None
    is_causal: bool = False
    is_cross: bool = False
    dropout_p: float = 0.0
    backend: str | None = None
    return_weights: bool = False
    sink_logit: Tensor | None = None
    softcap: float | None = None
    # Of keys that stand there once for each query head: how many query heads shared one.
    groups: int = 1

    def causal_by_flag(self, num_queries: int) -> bool:
        """Apply transformers' own rule: the flag counts only without a mask and for more than one query."""
        return self.is_causal and self.mask is None and num_queries > 1

    def with_selected_keys(self, indices: Tensor, num_keys: int) -> "ModuleCall":
        """Return the call with a mask of the keys that a model's indexer chose for each query, indices (B, N, k).

        Models mask the others themselves for transformers' own "eager" and "sdpa", and leave it to any other attention.
        """
        chosen = torch.zeros(*indices.shape[:2], num_keys, dtype=torch.bool, device=indices.device)
        chosen = chosen.scatter(-1, indices.long(), True)[:, None]
        if self.causal_by_flag(num_queries := indices.shape[1]):
            chosen = add_triangle(chosen, num_queries, num_keys, indices.device)
        if self.mask is None:
            return replace(self, mask=chosen)
        mask = self.mask[..., :num_keys]
        if mask.dtype == torch.bool:
            return replace(self, mask=mask & chosen)
        return replace(self, mask=mask.masked_fill(~chosen, torch.finfo(mask.dtype).min))

    def merged(self, shape: tuple[int, int, int, int]) -> "ModuleCall":
        """Return the call as exact attention of (B, H, N, M) takes it: causality decided, mask and bias merged."""
        bias, is_causal = self.position_bias, self.causal_by_flag(shape[2])
        if self.mask is None and bias is None:
            # A step of generation, of which each microsecond counts.
            return self if is_causal == self.is_causal else replace(self, is_causal=is_causal)
        if bias is not None and bias.shape[-1] > shape[-1]:
            bias = bias[..., : shape[-1]]
        keep, bias = merge_masks(self.mask, bias, shape)
        return replace(self, mask=keep, position_bias=bias, is_causal=is_causal)

    def additive_mask(self, query: Tensor, num_keys: int) -> Tensor | None:
        """Return the float mask an eager attention expects, from the bool (or absent) one of our mask function."""
        mask = self.mask
        if self.causal_by_flag(query.shape[2]):
            mask = add_triangle(None, query.shape[2], num_keys, query.device)
        if mask is None or mask.dtype != torch.bool:
            return mask
        # Eager attention has its softmax in float32, where float64's least number would be -inf, a masked row NaN.
        least = max(torch.finfo(query.dtype).min, torch.finfo(torch.float32).min)
        return torch.zeros((), dtype=query.dtype, device=query.device).masked_fill(~mask, least)


@dataclass(frozen=True)
class AttentionInputs:
    """Query (B, H, N, d), key (B, H_kv, M, d), value (B, H_v, M, d_v), and all that determines their attention.

    logits = -λ_h·scaling·distance(q, k) + bias, over the entries that `keep` and `is_causal` leave.

    H is a multiple of H_kv: query head h uses key head h // (H / H_kv). H_v is H_kv or, where keys were mapped for each
    query head, a divisor of it (see `with_value_heads`). lam is a float or a tensor (H,); keep is bool
    and bias is float, both broadcastable to (B, H, N, M), or None. The query may be float32 beside half-precision keys.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    metric: Metric
    lam: float | Tensor
    scaling: float
    p: float | None = None
    keep: Tensor | None = None
    bias: Tensor | None = None
    is_causal: bool = False
    dropout_p: float = 0.0
    # What `needs_grad` answers where the tensors cannot say: they stand for a device that is not here.
    assumed_grad: bool | None = None
    # ε of the softened form of the metric (see softening.py): > 0, a float or (H,); None: the plain distance.
    softening: float | Tensor | None = None
    # See absolute_logits.py: sink_logit and shift are broadcastable to (B, H, N, 1).
    sink_logit: Tensor | None = None
    softcap: float | None = None
    shift: Tensor | None = None

    @property
    def is_absolute(self) -> bool:
        """Whether something compares logits with fixed numbers, so that a constant of the row counts."""
        return self.sink_logit is not None or self.softcap is not None

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]

    def needs_grad(self) -> bool:
        """Return whether autograd will ask for a gradient of any tensor here."""
        if self.assumed_grad is not None:
            return self.assumed_grad
        if not torch.is_grad_enabled():
            return False
        tensors = (self.query, self.key, self.value, self.bias, self.lam, self.softening)
        tensors += (self.sink_logit, self.shift)
        return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)

    def lambda_column(self) -> float | Tensor:
        """Return λ as a float, or as (H, 1, 1) in at least float32 so that it multiplies (B, H, N, M)."""
        if isinstance(self.lam, Tensor):
            return self.lam.to(torch.promote_types(self.query.dtype, torch.float32))[:, None, None]
        return self.lam

    def distances(self, query: Tensor, key: Tensor, fast: bool = True) -> Tensor:
        """Return the distances (B, H, N, M) of rows of the query and columns of the key."""
        return self.metric.checked_distance(query, key, self.p, fast, self.softening_column(query.dtype))

    def softening_column(self, dtype: torch.dtype) -> float | Tensor | None:
        """Return ε as a float, as (H, 1, 1), or None."""
        if isinstance(self.softening, Tensor):
            return self.softening.to(dtype).clamp_min(LEAST)[:, None, None]
        return self.softening

    def in_units(self, p: float | None = None) -> "AttentionInputs":
        """Return the same softened problem with ε = 1, or of order p with the knee δ = 1: autograd has ε's gradient.

        f(q - k, ε) = ε·f(q/ε - k/ε, 1): λ takes the factor. Cosine, which has none, leaves λ.
        """
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        epsilon, inputs = self.softening_column(dtype), self
        size, p = (1, 1.0) if p is None else (self.query.shape[-1], p)
        unit, factor = knee(epsilon, size, p), epsilon
        if isinstance(epsilon, Tensor):
            factor, inputs = epsilon.flatten(), self.written_out()
        query, key = (tensor.to(dtype) / unit for tensor in (inputs.query, inputs.key))
        lam = self.lam if self.metric.scale_free else self.lam * factor
        return replace(inputs, query=query, key=key, lam=lam, softening=size ** (1 / p))

    def in_full_precision(self) -> "AttentionInputs":
        """Return these inputs with half-precision tensors raised to float32; float32 and float64 stay."""
        if not {self.query.dtype, self.key.dtype} & set(HALF):
            return self
        names = ("query", "key", "value", "bias", "sink_logit", "shift")
        return replace(self, **{n: None if (t := getattr(self, n)) is None else t.float() for n in names})

    def with_value_heads(self) -> "AttentionInputs":
        """Return these inputs with a value head for each key head."""
        shared = self.key.shape[1] // self.value.shape[1]
        return self if shared == 1 else replace(self, value=self.value.repeat_interleave(shared, dim=1))

    def written_out(self) -> "AttentionInputs":
        """Return these inputs in at least float32, with key heads repeated for each of their query heads."""
        inputs = self.in_full_precision().with_value_heads()
        if self.groups == 1:
            return inputs
        return replace(
            inputs, **{n: getattr(inputs, n).repeat_interleave(self.groups, dim=1) for n in ("key", "value")}
        )


# -------------------------------------------------------------------------------------------------- masks


def split_mask(mask: Tensor | None, shape: tuple[int, int, int, int]) -> tuple[Tensor | None, Tensor | None]:
    """Split a mask into (keep, bias), both broadcastable to (B, H, N, M), or None where they hold nothing.

    Accepted: bool (True = keep); integer 0/1; float (added to the logits; values at or below half the dtype's minimum,
    -inf included, mean "masked"). Rank 2 is a padding mask (B, M), rank 3 is (B, N, M), rank 4 is (B, H, N, M).
    A last axis longer than M is cut to its first M columns, as transformers' own attention functions do.

    Raises `ValueError` when the shape cannot be broadcast.
    """
    if mask is None:
        return None, None
    if mask.dim() == 2:
        mask = mask[:, None, None, :]
    elif mask.dim() == 3:
        mask = mask[:, None, :, :]
    elif mask.dim() != 4:
        raise ValueError(f"mask must have rank 2 (B, M), 3 (B, N, M) or 4 (B, H, N, M), got shape {tuple(mask.shape)}")
    if mask.shape[-1] > shape[-1]:
        mask = mask[..., : shape[-1]]
    for axis, name in enumerate("BHNM"):
        if mask.shape[axis] not in (1, shape[axis]):
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} does not broadcast to (B, H, N, M)={tuple(shape)}: axis {name}"
            )
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        return mask != 0, None
    keep = mask > torch.finfo(mask.dtype).min / 2
    return keep, torch.where(keep, mask, torch.zeros_like(mask))


def surely(condition: Tensor) -> bool:
    """Return whether a bool tensor of one entry is True; False under torch.compile, where reading it breaks the graph.

    For shortcuts: what follows must be right either way.
    """
    return not torch.compiler.is_compiling() and bool(condition)


def refuse_where(wrong: Tensor, message: str) -> None:
    """Raise `ValueError` where a bool tensor of one entry is True; a compiled graph, which cannot look, stops instead.

    Its error is a `RuntimeError` with the same message.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(~wrong, message)
    elif bool(wrong):
        raise ValueError(message)


def causal_keep(num_queries: int, num_keys: int, device, offset: int = 0) -> Tensor:
    """Return (N, M) bool, True where key j <= query i + offset: the top-left triangle, as in PyTorch's `is_causal`."""
    rows = torch.arange(num_queries, device=device)[:, None] + offset
    return rows >= torch.arange(num_keys, device=device)[None, :]


def add_triangle(keep: Tensor | None, num_queries: int, num_keys: int, device, offset: int = 0) -> Tensor:
    """Combine `keep` with the causal triangle, broadcastable to (B, H, N, M)."""
    triangle = causal_keep(num_queries, num_keys, device, offset)[None, None]
    return triangle if keep is None else keep & triangle


def rows_of(tensor: Tensor | None, part: slice) -> Tensor | None:
    """Return the rows of some queries of a tensor broadcastable to (B, H, N, x), or None."""
    return tensor if tensor is None or tensor.shape[-2] == 1 else tensor[..., part, :]


def merge_masks(
    mask: Tensor | None, position_bias: Tensor | None, shape: tuple[int, int, int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """Return (keep, bias) of a mask (see `split_mask`) and a position bias: broadcastable to (B, H, N, M) or None.

    A bias may mask, too (T5 adds its mask to it): -inf and the dtype's minimum mean there what they do in a mask.
    """
    keep, bias = split_mask(mask, shape)
    if position_bias is not None:
        open_entries, position_bias = split_mask(position_bias, shape)
        keep = open_entries if keep is None else keep & open_entries
        bias = add_bias(position_bias, bias)
    return keep, bias


def add_bias(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Return the sum of two optional additive biases."""
    if left is None or right is None:
        return left if right is None else right
    return left + right


def masked_softmax(logits: Tensor, keep: Tensor | None, sink_logit: Tensor | None = None) -> Tensor:
    """Compute the row softmax over kept entries; a row with none is all zeros, with zero gradients, never NaN.

    With a sink_logit, broadcastable to (..., N, 1), rows sum to 1 less the sink's weight.
    """
    if sink_logit is not None:
        logits = logits if keep is None else logits.masked_fill(~keep, float("-inf"))
        # Finite, so that a row without keys is 0 beside a sink of -inf, too.
        sink = sink_logit.to(logits.dtype).clamp_min(torch.finfo(logits.dtype).min).expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
    if keep is None:
        return logits.softmax(dim=-1)
    has_keys = keep.any(dim=-1, keepdim=True)
    logits = logits.masked_fill(~keep, float("-inf"))
    weights = torch.where(has_keys, logits, torch.zeros_like(logits)).softmax(dim=-1)
    return torch.where(keep, weights, torch.zeros_like(weights))


# Asked as a graph is traced, where Dynamo takes False without asking: the mark that `torch.compiler`'s
# `assume_constant_result` sets, whose import takes a second.
in_onnx_export._dynamo_marked_constant = True


def refuse_onnx(attention: str) -> None:
    """Raise `NotImplementedError` where an attention that depends on the text's length in Python is written as ONNX."""
    if in_onnx_export():
        raise NotImplementedError(
            f"{attention} attention has no ONNX form, as its work depends on the text; models of exact metrics have one"
        )


def say_backend(attention: str, backend: str, query: Tensor, key: Tensor) -> None:
    """Log at DEBUG, once for shapes (steps of generation: once for all lengths), what runs an attention."""
    if torch.compiler.is_compiling() or not logger.isEnabledFor(logging.DEBUG):
        return
    batch, heads, num_queries, size = query.shape
    num_keys = "M" if num_queries == 1 else key.shape[2]
    said = (
        f"{attention} by {backend}: {heads} heads ({key.shape[1]} of keys) of {size}, {batch} x {num_queries} queries, "
        f"{num_keys} keys, {key.dtype}, {query.device}"
    )
    if said not in _said:
        if len(_said) >= _MOST_SAID:
            del _said[next(iter(_said))]
        _said[said] = None
        logger.debug(said)
