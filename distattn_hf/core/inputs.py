"""One attention problem, checked and in canonical form: what every backend receives."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .metrics import Metric


@dataclass
class AttentionInputs:
    """Query (B, H, N, d), key (B, H, M, d), value (B, H, M, d_v) with heads already expanded, and all that shapes them.

    lam is a float or a tensor (H,); keep is bool and bias is float, both broadcastable to (B, H, N, M), or None.
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

    def lambda_column(self) -> float | Tensor:
        """λ as a float, or as (H, 1, 1) so that it multiplies (B, H, N, M)."""
        if isinstance(self.lam, Tensor):
            return self.lam.to(self.query.dtype)[:, None, None]
        return self.lam

    def in_full_precision(self) -> "AttentionInputs":
        """The same problem with half-precision tensors raised to float32; float32 and float64 stay as they are."""
        if self.query.dtype not in (torch.float16, torch.bfloat16):
            return self
        raised = {
            name: None if (tensor := getattr(self, name)) is None else tensor.float()
            for name in ("query", "key", "value", "bias")
        }
        return AttentionInputs(**{**self.__dict__, **raised})
