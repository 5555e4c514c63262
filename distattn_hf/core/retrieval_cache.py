"""What a cache keeps beside its keys for retrieval attention: order, codes and summaries of their blocks."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from .derived_cache import SPARE, same_values, writable
from .retrieval import PANEL, Codes, Retrieval, Search, aligned, has_codes
from .retrieval_blocks import cut_blocks, dot_form_of, in_full, order_of_blocks
from .retrieval_cpp import encode_keys
from .retrieval_far import Summaries, has_far_field, summaries_of
from .retrieval_order import segments_before, units_before


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
        held, dtype = vars(self.made).values(), torch.promote_types(key.dtype, torch.float32)
        if any(t.is_floating_point() and t.dtype != dtype for t in held) or not all(writable(t) for t in held):
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
        codes.variance[:, :, panel, :, own] = new.variance[:, :, at, :, lane]
        codes.spread[:, :, panel, own] = new.spread[:, :, at, lane]
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


class KeyClusters(_OfKeys):
    """Order, codes and summaries of keys in blocks by their likeness, for queries whose windows begin in one unit.

    A new unit moves the keys of the segments that grow with it; the others stay. What has no keys yet is zeros.
    """

    def __init__(self):
        super().__init__()
        self._parameters: list[Tensor] = []
        self._segments: list[list[tuple[int, int]]] = []
        self._kept: tuple[Search, bool] | None = None

    def update(self, problem: Retrieval, parameters: list[Tensor], keeps_summaries: bool) -> Retrieval:
        """Return the problem, which is `of_one_unit`, with its order, codes and, if asked for, summaries.

        parameters: what the problem depends on beside the model's queries, keys and values.
        """
        if not same_values(self._parameters, parameters):
            self.made, self._parameters = None, [tensor.detach().clone() for tensor in parameters]
        inputs, size = problem.inputs, problem.search.block_size
        keep = None if inputs.keep is None else inputs.keep[:, 0, 0]
        self._start(inputs.key, keep, problem.first, size)
        self.counted = inputs.key.shape[2]
        wanted = [segments_before(units) for units in units_before(problem, self.counted - 1)]
        wanted *= len(inputs.key) // len(wanted)
        keeps_summaries = keeps_summaries and has_far_field(problem)
        kept, self._kept = self._kept, (problem.search, keeps_summaries)
        if self.made is None or kept != self._kept:
            # Sinks are pinned in the order, and a budget of none makes no codes: options may have changed.
            self.made, self._segments = None, [[] for _ in wanted]
        for segment in sorted({segment for row in wanted for segment in row}):
            new = [segment in row and segment not in old for row, old in zip(wanted, self._segments, strict=True)]
            if any(new):
                self._take(problem, *segment, new, keeps_summaries)
        self._segments = wanted
        if self.made is None:
            return problem
        known = vars(self.made)
        changes = {"order": self.made.order.flatten(2)[:, :, None]}
        if "code" in known:
            changes["codes"] = Codes(*(known[name] for name in ("mean", "variance", "spread", "scale", "code", "real")))
        if keeps_summaries:
            changes["summaries"] = Summaries(known["key" if "key" in known else "mean"], known["bias"], known["value"])
        return replace(problem, **changes)

    def change_rows(self, change) -> None:
        """Apply `change` to every tensor, whose first axis is the batch, and to what is noted of each row."""
        super().change_rows(change)
        if self.made is not None:
            rows = change(torch.arange(len(self._segments), device=self.made.order.device))
            self._segments = [self._segments[row] for row in rows.tolist()]

    def _take(self, problem: Retrieval, start: int, count: int, rows: list[bool], keeps_summaries: bool) -> None:
        """Put in what is made of `count` units from unit `start` on, in these rows of the batch."""
        size = problem.search.block_size
        problem = replace(problem, inputs=in_full(problem.inputs))
        blocks = start * PANEL, (start + count) * PANEL
        order = order_of_blocks(problem, *blocks, count * PANEL)
        new = {"order": (order + blocks[0] * size).flatten(2).unflatten(2, (count, -1))}
        if has_codes(problem.inputs) and problem.search.most_blocks:
            key, _, keep = cut_blocks(problem, *blocks)
            new |= vars(encode_keys(dot_form_of(problem.inputs, key)[1], keep, size, order.flatten(2)))
        if keeps_summaries:
            summaries = vars(summaries_of(problem, *blocks, order))
            # Where codes are, the means of their blocks are the summaries' keys.
            new |= {name: tensor for name, tensor in summaries.items() if name != "key" or "mean" not in new}
        if self.made is None or self.made.order.shape[2] < start + count:
            self._grow(SimpleNamespace(**new), start + count)
        chosen = slice(None) if all(rows) or len(rows) < len(order) else torch.tensor(rows, device=order.device)
        for name, tensor in new.items():
            place = getattr(self.made, name).narrow(1 if name == "real" else 2, start, count)
            place[chosen] = tensor[chosen]
