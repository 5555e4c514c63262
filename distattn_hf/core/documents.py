"""Documents that stand one behind another in a row, each of which is a text of its own to any attention."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .inputs import refuse_where


class Documents:
    """Stands in the place of a mask: the tokens of rows (B, N), cut where positions begin anew (see `beginnings`).

    Each document is cut out, and a batch of them padded on the right: whatever a mechanism does with a text, it does
    with each, and nothing of one is left when the next begins. Those in one batch differ in length by less than a
    factor of two, so that padding less than doubles the work.
    """

    def __init__(self, begins: Tensor, keep: Tensor | None = None):
        """begins (B, N) bool: where documents start; keep (B, N) bool: which tokens are no padding, or None for all."""
        starts = begins.flatten().nonzero()[:, 0]
        ends = torch.cat([starts[1:], starts.new_tensor([begins.numel()])])
        self.shape, self.parts = begins.shape, []
        lengths = (ends - starts).tolist()
        for size in sorted({length.bit_length() for length in lengths}):
            own = [number for number, length in enumerate(lengths) if length.bit_length() == size]
            longest = max(lengths[number] for number in own)
            places = starts[own, None] + torch.arange(longest, device=starts.device)
            exists = places < ends[own, None]
            places = places.clamp(max=begins.numel() - 1)
            self.parts.append((places, exists, exists if keep is None else exists & keep.flatten()[places]))

    @staticmethod
    def beginnings(position_ids: Tensor, keep: Tensor | None = None) -> Tensor | None:
        """Return where documents begin that positions (B, N) tell apart, (B, N) bool; None for one in each row.

        A position that is not the one after the last begins anew, as in transformers. Beside keep (B, N), which tokens
        are no padding, only one that is 0 or less than that of the last such token: padding may stand between them.
        Padding before the first token is apart.
        """
        begins, is_packed = _begun(position_ids, keep)
        return begins if bool(is_packed) else None

    def apart(self, attend: Callable, query: Tensor, key: Tensor, value: Tensor, bias) -> tuple[Tensor, Tensor | None]:
        """Return (output (B, N, H, d_v), weights (B, H, N, N) or None) of every document's attention to itself.

        attend: takes the number of the batch, query (D, H, L, d), key and value (D, H_kv, L, ...), which of them are no
        padding, (D, 1, 1, L) bool, and the position bias, and returns (output (D, L, H, d_v), weights or None). bias:
        (1, H, N, N) that depends on distances alone, or what stands for such a one, or None.
        """
        batch, length = self.shape
        outputs, order, all_weights = [], [], None
        for number, (places, exists, seen) in enumerate(self.parts):
            tensors = (t.transpose(1, 2).flatten(0, 1)[places].transpose(1, 2) for t in (query, key, value))
            longest = places.shape[1]
            own_bias = bias[..., :longest, :longest] if isinstance(bias, Tensor) else bias
            output, weights = attend(number, *tensors, seen[:, None, None], own_bias)
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


def _begun(position_ids: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (where documents begin, (B, N) bool; whether a row has more than one, a bool): `Documents.beginnings`."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    if keep is None:
        anew = position_ids.diff(dim=-1) != 1
        begins[:, 1:] = anew
        return begins, anew.any()
    place = torch.arange(position_ids.shape[1], device=position_ids.device)
    last = torch.where(keep, place, -1).cummax(-1).values[:, :-1]
    positions, before = position_ids[:, 1:], position_ids.gather(1, last.clamp(min=0))
    anew = keep[:, 1:] & (last >= 0) & ((positions < before) | (positions == 0))
    begins[:, 1:] = anew | (keep[:, 1:] & (last < 0))
    return begins, anew.any()


def beginnings_of(
    position_ids: Tensor | None, attention_mask: Tensor | None, cache: Cache | None, is_new: bool, by_mask: bool
) -> Tensor | None:
    """Return where packed documents begin, (B, N) bool, or None; raises `ValueError` for such beside a cache.

    None where a mask that is no padding mask says itself which tokens see each other. by_mask: whether a mask can keep
    documents apart. A compiled graph cannot look: it gets a mask of whatever begins, and where there can be none,
    packed documents stop it with a `RuntimeError`.
    """
    if position_ids is None or position_ids.shape[-1] == 1:
        return None
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2):
        return None
    keep = None if attention_mask is None else attention_mask[:, -position_ids.shape[-1] :].bool()
    if cache is not None and keep is None:
        # Positions beside a cache may leave some out.
        keep = torch.ones_like(position_ids, dtype=torch.bool)
    begins, is_packed = _begun(position_ids, keep)
    # One that the call made itself, as config.use_cache says, is not the caller's to leave out.
    remedy = "pass use_cache=False" if is_new else "leave out past_key_values and pass use_cache=False"
    what = "position_ids start anew within a row (packed documents), which"
    if cache is not None:
        whose = "whose keys every token that follows would see"
        refuse_where(is_packed, f"{what} keeps documents apart only without cache, {whose}: {remedy}")
    elif not torch.compiler.is_compiling():
        return begins if bool(is_packed) else None
    elif by_mask:
        return begins
    else:
        refuse_where(is_packed, f"{what} a compiled graph cannot cut apart")
    return None
