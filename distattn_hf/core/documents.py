"""Documents that stand one behind another in a row, each of which is a text of its own to any attention."""

from collections.abc import Callable

import torch
from torch import Tensor


class Documents:
    """Stands in the place of a mask: tokens of a row (B, N) whose position is not the one after the last begin anew.

    Each document is cut out, and a batch of them padded on the right: whatever a mechanism does with a text, it does
    with each, and nothing of one is left when the next begins. Those in one batch differ in length by less than a
    factor of two, so that padding less than doubles the work.
    """

    def __init__(self, begins: Tensor):
        starts = begins.flatten().nonzero()[:, 0]
        ends = torch.cat([starts[1:], starts.new_tensor([begins.numel()])])
        self.shape, self.parts = begins.shape, []
        lengths = (ends - starts).tolist()
        for size in sorted({length.bit_length() for length in lengths}):
            own = [number for number, length in enumerate(lengths) if length.bit_length() == size]
            longest = max(lengths[number] for number in own)
            places = starts[own, None] + torch.arange(longest, device=starts.device)
            exists = places < ends[own, None]
            self.parts.append((places.clamp(max=begins.numel() - 1), exists))

    @classmethod
    def of(cls, position_ids: Tensor) -> "Documents | None":
        """Return the documents that positions (B, N) tell apart, as transformers does; None for one in each row."""
        begins = torch.ones_like(position_ids, dtype=torch.bool)
        begins[:, 1:] = position_ids.diff(dim=-1) != 1
        return cls(begins) if bool(begins[:, 1:].any()) else None

    def apart(self, attend: Callable, query: Tensor, key: Tensor, value: Tensor, bias) -> tuple[Tensor, Tensor | None]:
        """Return (output (B, N, H, d_v), weights (B, H, N, N) or None) of every document's attention to itself.

        attend: takes the number of the batch, query (D, H, L, d), key and value (D, H_kv, L, ...), which of them are no
        padding, (D, 1, 1, L) bool, and the position bias, and returns (output (D, L, H, d_v), weights or None). bias:
        (1, H, N, N) that depends on distances alone, or what stands for such a one, or None.
        """
        batch, length = self.shape
        outputs, order, all_weights = [], [], None
        for number, (places, exists) in enumerate(self.parts):
            tensors = (t.transpose(1, 2).flatten(0, 1)[places].transpose(1, 2) for t in (query, key, value))
            longest = places.shape[1]
            own_bias = bias[..., :longest, :longest] if isinstance(bias, Tensor) else bias
            output, weights = attend(number, *tensors, exists[:, None, None], own_bias)
            outputs.append(output[exists])
            order.append(places[exists])
            if weights is not None:
                if all_weights is None:
                    all_weights = weights.new_zeros(batch, weights.shape[1], length, length)
                for first, own, own_weights in zip(places[:, 0].tolist(), exists.sum(-1).tolist(), weights):
                    row, start = divmod(first, length)
                    here = slice(start, start + own)
                    all_weights[row, :, here, here] = own_weights[:, :own, :own]
        return torch.cat(outputs)[torch.cat(order).argsort()].unflatten(0, self.shape), all_weights
