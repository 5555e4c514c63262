"""One attention problem, checked and in canonical form: what every backend receives."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .metrics import Metric


@dataclass(frozen=True)
class AttentionInputs:
    """Query (B, H, N, d), key (B, H_kv, M, d), value (B, H_kv, M, d_v), and all that shapes their attention.

    logits = -λ_h·scaling·distance(q/α_h, α_h·(k - c_h)) + bias, over the entries that `keep` and `is_causal` leave.

    H is a multiple of H_kv: query head h uses key head h // (H / H_kv). lam is a float or a tensor (H,); alpha (H,) and
    shift (H, d) are the per-head map of a conversion, or None for α = 1, c = 0; keep is bool and bias is float, both
    broadcastable to (B, H, N, M), or None.
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
    alpha: Tensor | None = None
    shift: Tensor | None = None

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]

    def needs_grad(self) -> bool:
        """Whether autograd will ask for a gradient of any tensor here."""
        tensors = (self.query, self.key, self.value, self.bias, self.lam, self.alpha, self.shift)
        return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)

    def lambda_column(self) -> float | Tensor:
        """λ as a float, or as (H, 1, 1) so that it multiplies (B, H, N, M)."""
        if isinstance(self.lam, Tensor):
            return self.lam.to(self.query.dtype)[:, None, None]
        return self.lam

    def in_full_precision(self) -> "AttentionInputs":
        """The same problem with half-precision tensors raised to float32; float32 and float64 stay as they are."""
        if self.query.dtype not in (torch.float16, torch.bfloat16):
            return self
        names = ("query", "key", "value", "bias")
        return replace(self, **{n: None if (t := getattr(self, n)) is None else t.float() for n in names})

    def written_out(self) -> "AttentionInputs":
        """The same problem in at least float32, with α and c applied and the key heads repeated for each query head."""
        inputs = self.in_full_precision()
        query, key, value = inputs.query, inputs.key, inputs.value
        if self.groups > 1:
            key, value = key.repeat_interleave(self.groups, dim=1), value.repeat_interleave(self.groups, dim=1)
        if self.shift is not None:
            key = key - self.shift.to(key.dtype)[:, None, :]
        if self.alpha is not None:
            alpha = self.alpha.to(key.dtype)[:, None, None]
            query, key = query / alpha, key * alpha
        return replace(inputs, query=query, key=key, value=value, alpha=None, shift=None)
