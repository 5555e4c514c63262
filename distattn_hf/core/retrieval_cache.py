"""What a cache keeps beside its keys for retrieval attention: codes and summaries of their blocks."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .derived_cache import SPARE, same_values, writable
from .retrieval import PANEL, Codes, Retrieval, aligned
from .retrieval_cpp import encode_keys
from .retrieval_far import Summaries, summaries_of


class _OfKeys:
    """What is made of blocks of keys that come in one after another, a dataclass of tensors, with room for more.

    Only blocks that new keys fall into are made anew, by the same operations as all at once, so that nothing depends on
    how a text was cut.
    """

    def __init__(self):
        self.made = None
        self.size = self.counted = 0
        self.first: Tensor | None = None
        self.keep: Tensor | None = None

    def _goes_on(self, key: Tensor, keep: Tensor | None, first: Tensor, block_size: int) -> bool:
        """Return whether what there is can stay: of the same keys and padding, and of a kind to write into."""
        if self.made is None or self.size != block_size or self.counted > key.shape[2]:
            return False
        like = next(iter(vars(self.made).values()))
        if like.dtype != torch.promote_types(key.dtype, torch.float32) or not writable(like):
            return False
        if self.first.shape != first.shape or bool((self.first != first).any()):
            return False
        if keep is None or self.keep is None:
            earlier = [k[:, : self.counted] for k in (keep, self.keep) if k is not None]
            return all(bool(k.all()) for k in earlier)
        return not bool((keep[:, : self.counted] != self.keep[:, : self.counted]).any())

    def _start(self, key: Tensor, keep: Tensor | None, first: Tensor | None, block_size: int) -> Tensor:
        """Note what comes, forget what is of other keys, and return the first keys' numbers (B,)."""
        first = torch.zeros(len(key), dtype=torch.long, device=key.device) if first is None else first
        if not self._goes_on(key, keep, first, block_size):
            self.made, self.counted = None, 0
        self.size, self.first, self.keep = block_size, first, keep
        return first

    def _grow(self, like, panels: int) -> None:
        """Make room for so many panels and some more; `like`: what has one axis of panels in each tensor, the third
        or, of a tensor without heads, the second.
        """
        panels += panels // SPARE + 1
        grown = {}
        for name, tensor in vars(like).items():
            axis = 1 if name == "real" else 2
            old = tensor.narrow(axis, 0, 0) if self.made is None else getattr(self.made, name)
            fill = [0, 0] * (tensor.dim() - axis - 1) + [0, panels - old.shape[axis]]
            grown[name] = F.pad(old, fill)
        self.made = type(like)(**grown)

    def _places(self, new, start: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return where `count` blocks stand in the panels of `new`, (panel, lane), and where from block `start` on, for
        which there is room then.
        """
        first = next(iter(vars(new)))
        if self.made is None or getattr(self.made, first).shape[2] * PANEL < start + count:
            self._grow(new, -(-(start + count) // PANEL))
        given = torch.arange(count, device=getattr(new, first).device)
        return given // PANEL, given % PANEL, (start + given) // PANEL, (start + given) % PANEL

    def change_rows(self, change) -> None:
        """Apply `change` to every tensor, whose first axis is the batch."""
        if self.made is not None:
            self.made = type(self.made)(**{name: change(tensor) for name, tensor in vars(self.made).items()})
            self.first = change(self.first)
            self.keep = None if self.keep is None else change(self.keep)


class KeyCodes(_OfKeys):
    """The `Codes` of keys; what has no keys yet is not real."""

    def update(self, key: Tensor, keep: Tensor | None, first: Tensor | None, block_size: int) -> Codes:
        """Return the codes of keys (B, H_kv, M, d), of which those counted before have not changed."""
        batch, num_keys = len(key), key.shape[2]
        first = self._start(key, keep, first, block_size)
        if self.made is not None and self.counted == num_keys:
            return self.made
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
        self._write(encode_keys(aligned(tail, moved, 2), aligned(real, moved, 1), block_size), start, count)
        self.counted = num_keys
        return self.made

    def _write(self, new: Codes, start: int, count: int) -> None:
        """Put the first `count` blocks of new codes in from block `start` on."""
        at, lane, panel, own = self._places(new, start, count)
        codes = self.made
        codes.mean[:, :, panel, :, own] = new.mean[:, :, at, :, lane]
        codes.scale[:, :, panel, own] = new.scale[:, :, at, lane]
        codes.code[:, :, panel, own] = new.code[:, :, at, lane]
        codes.real[:, panel, own] = new.real[:, at, lane]


class KeySummaries(_OfKeys):
    """The `Summaries` of the blocks whose keys are all there; others no query asks for yet."""

    def __init__(self):
        super().__init__()
        self._parameters: list[Tensor] = []

    def update(self, problem: Retrieval, parameters: list[Tensor]) -> Summaries:
        """Return the summaries for a causal problem whose beginning is known, by the keys as the metric takes them.

        parameters: what the problem depends on beside the model's queries, keys and values.
        """
        inputs, size = problem.inputs, problem.search.block_size
        if not same_values(self._parameters, parameters):
            self.made, self._parameters = None, [tensor.detach().clone() for tensor in parameters]
        keep = None if inputs.keep is None else inputs.keep[:, 0, 0]
        first = self._start(inputs.key, keep, problem.first, size)
        num_keys = inputs.key.shape[2]
        # A row whose text has not begun has nothing counted.
        start = max(0, int((self.counted - first).min())) // size
        stop = max(1, int((num_keys - first).max()) // size)
        if self.made is None or stop > start:
            self._write(summaries_of(problem, start, stop), start, stop - start)
        self.counted = num_keys
        return self.made

    def _write(self, new: Summaries, start: int, count: int) -> None:
        """Put the first `count` blocks of new summaries in from block `start` on."""
        at, lane, panel, own = self._places(new, start, count)
        summaries = self.made
        summaries.key[:, :, panel, :, own] = new.key[:, :, at, :, lane]
        summaries.bias[:, :, panel, own] = new.bias[:, :, at, lane]
        summaries.value[:, :, panel, own] = new.value[:, :, at, lane]
