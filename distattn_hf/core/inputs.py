"""One attention problem, checked and in canonical form: what every backend receives."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .metrics import Metric

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AttentionInputs:
    """Query (B, H, N, d), key (B, H_kv, M, d), value (B, H_kv, M, d_v), and all that shapes their attention.

    logits = -λ_h·scaling·distance(q, k) + bias, over the entries that `keep` and `is_causal` leave.

    H is a multiple of H_kv: query head h uses key head h // (H / H_kv). lam is a float or a tensor (H,); keep is bool
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

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]

    def needs_grad(self) -> bool:
        """Whether autograd will ask for a gradient of any tensor here."""
        if self.assumed_grad is not None:
            return self.assumed_grad
        tensors = (self.query, self.key, self.value, self.bias, self.lam)
        return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)

    def lambda_column(self) -> float | Tensor:
        """λ as a float, or as (H, 1, 1) so that it multiplies (B, H, N, M)."""
        if isinstance(self.lam, Tensor):
            return self.lam.to(self.query.dtype)[:, None, None]
        return self.lam

    def in_full_precision(self) -> "AttentionInputs":
        """The same problem with half-precision tensors raised to float32; float32 and float64 stay as they are."""
        if not {self.query.dtype, self.key.dtype} & set(HALF):
            return self
        names = ("query", "key", "value", "bias")
        return replace(self, **{n: None if (t := getattr(self, n)) is None else t.float() for n in names})

    def written_out(self) -> "AttentionInputs":
        """The same problem in at least float32, with the key heads repeated for each of their query heads."""
        inputs = self.in_full_precision()
        if self.groups == 1:
            return inputs
        return replace(
            inputs, **{n: getattr(inputs, n).repeat_interleave(self.groups, dim=1) for n in ("key", "value")}
        )
