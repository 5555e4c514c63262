"""Codes of the keys in a cache, by which retrieval attention finds blocks of them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .derived_cache import SPARE, writable
from .retrieval import PANEL, Codes, aligned, encode


class KeyCodes:
    """The `Codes` of keys that come in one after another, with room for more; what has no keys yet is not real.

    Only blocks that new keys fall into are made anew, by the same operations as all at once, so that the choice of
    blocks does not depend on how a text was cut.
    """

    def __init__(self):
        self.codes: Codes | None = None
        self.size = self.counted = 0
        self.first: Tensor | None = None
        self.keep: Tensor | None = None

    def update(self, key: Tensor, keep: Tensor | None, first: Tensor | None, block_size: int) -> Codes:
        """Return the codes of keys (B, H_kv, M, d), of which those counted before have not changed."""
        batch, num_keys = len(key), key.shape[2]
        first = torch.zeros(batch, dtype=torch.long, device=key.device) if first is None else first
        if not self._goes_on(key, keep, first, block_size):
            self.codes, self.counted = None, 0
        self.size, self.first, self.keep = block_size, first, keep
        if self.codes is not None and self.counted == num_keys:
            return self.codes
        # A row whose text has not begun has nothing counted.
        start = max(0, int((self.counted - first).min())) // block_size
        count = -(-max(1, num_keys - int(first.min()) - start * block_size) // block_size)
        own = first + start * block_size
        begin = min(int(own.min()), num_keys - 1)
        moved = own - begin if bool((own != begin).any()) else None
        tail = key[:, :, begin:].to(torch.promote_types(key.dtype, torch.float32))
        real = torch.ones(batch, num_keys - begin, dtype=torch.bool, device=key.device)
        if keep is not None:
            real = keep[:, begin:]
            tail = tail.masked_fill(~real[:, None, :, None], 0.0)
        self._write(encode(aligned(tail, moved, 2), aligned(real, moved, 1), block_size), start, count)
        self.counted = num_keys
        return self.codes

    def _goes_on(self, key: Tensor, keep: Tensor | None, first: Tensor, block_size: int) -> bool:
        """Return whether the codes there are can stay: of the same keys and padding, and of a kind to write into."""
        if self.codes is None or self.size != block_size or self.counted > key.shape[2]:
            return False
        mean = self.codes.mean
        if mean.dtype != torch.promote_types(key.dtype, torch.float32) or not writable(mean):
            return False
        if self.first.shape != first.shape or bool((self.first != first).any()):
            return False
        if keep is None or self.keep is None:
            earlier = [k[:, : self.counted] for k in (keep, self.keep) if k is not None]
            return all(bool(k.all()) for k in earlier)
        return not bool((keep[:, : self.counted] != self.keep[:, : self.counted]).any())

    def _write(self, new: Codes, start: int, count: int) -> None:
        """Put the first `count` blocks of new codes in from block `start` on."""
        if self.codes is None or self.codes.mean.shape[2] * PANEL < start + count:
            self._grow(new, -(-(start + count) // PANEL))
        given = torch.arange(count, device=new.mean.device)
        at, lane, panel, own = given // PANEL, given % PANEL, (start + given) // PANEL, (start + given) % PANEL
        codes = self.codes
        codes.mean[:, :, panel, :, own] = new.mean[:, :, at, :, lane]
        codes.scale[:, :, panel, :, own] = new.scale[:, :, at, :, lane]
        codes.code[:, :, panel, :, own // 8, :, own % 8] = new.code[:, :, at, :, lane // 8, :, lane % 8]
        codes.real[:, panel, own] = new.real[:, at, lane]

    def _grow(self, like: Codes, panels: int) -> None:
        """Make room for so many panels and some more."""
        panels += panels // SPARE + 1
        grown = {}
        for name, tensor in vars(like).items():
            axis = 1 if name == "real" else 2
            old = tensor.narrow(axis, 0, 0) if self.codes is None else getattr(self.codes, name)
            fill = [0, 0] * (tensor.dim() - axis - 1) + [0, panels - old.shape[axis]]
            grown[name] = F.pad(old, fill)
        self.codes = Codes(**grown)

    def change_rows(self, change) -> None:
        """Apply `change` to every tensor, whose first axis is the batch."""
        if self.codes is not None:
            self.codes = Codes(**{name: change(tensor) for name, tensor in vars(self.codes).items()})
            self.first = change(self.first)
            self.keep = None if self.keep is None else change(self.keep)
