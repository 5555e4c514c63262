"""The rows of the calibration batch that a fit draws from, and those that it is judged on."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.absolute_logits import MappedHeads, absolute_shift
from ..core.inputs import ModuleCall, add_triangle
from ..core.metrics import get_metric
from ..core.parameters import HeadParameters

# Logits between which the start of a head's shift is looked for.
_LARGEST_SHIFT = 64.0


def split_sequences(valid: Tensor) -> tuple[list[int], list[int]]:
    """Return (sequences to fit on, sequences to report on) of rows worth a fit (B, N): an eighth is held out, whole.

    A single usable sequence is both.
    """
    usable = [i for i in range(len(valid)) if bool(valid[i].any())]
    held_out = max(1, len(usable) // 8) if len(usable) > 1 else 0
    return usable[: len(usable) - held_out], usable[len(usable) - held_out :] or usable


def draw_rows(valid: Tensor, sequences: list[int], count: int, generator: torch.Generator) -> Tensor:
    """Draw positions of valid rows, (len(sequences), count), with replacement."""
    rows = [torch.multinomial(valid[i].float().cpu(), count, replacement=True, generator=generator) for i in sequences]
    return torch.stack(rows).to(valid.device)


@dataclass
class Rows:
    """Some query rows of one layer: query (B, H, n, d), key (B, H, M, d), keep and bias (B, H or 1, n, M), scaling, and
    the module's own sink_logit (B, H, n, 1) and softcap. With a sink, log-weights (B, H, n, M + 1) end with its own.
    """

    query: Tensor
    key: Tensor
    keep: Tensor
    bias: Tensor | None
    scaling: float
    sink_logit: Tensor | None = None
    softcap: float | None = None

    def alone(self) -> "Rows":
        """Return the same rows with nothing beside products or distances in their logits."""
        return Rows(self.query, self.key, self.keep, None, self.scaling)

    def products(self) -> Tensor:
        """Return scaling·q·k (B, H, n, M)."""
        return self.scaling * torch.matmul(self.query, self.key.transpose(-1, -2))

    def teacher_log_weights(self) -> Tensor:
        return self._log_softmax(self._capped(self.products(), None), self.sink_logit)

    def distance_logits(self, heads: MappedHeads, group: HeadParameters) -> Tensor:
        """Return -λ·scaling·distance (B, H, n, M) of mapped heads; of the lift, where that counts, 2λ·scaling·q·k."""
        lam, epsilon = (x[:, None, None] if isinstance(x, Tensor) else x for x in (heads.lam, heads.softening))
        if group.is_absolute and group.has_origin:
            return 2 * lam * self.scaling * heads.query @ heads.key.mT
        distances = get_metric(group.metric).checked_distance(heads.query, heads.key, group.p, epsilon=epsilon)
        return -lam * self.scaling * distances

    def student_log_weights(self, group: HeadParameters) -> Tensor:
        heads = group(self.query, self.key, "mapped")
        call = ModuleCall(self.scaling, sink_logit=self.sink_logit, softcap=self.softcap)
        shift = absolute_shift(heads, get_metric(group.metric), group.p, call)
        return self._log_softmax(self._capped(self.distance_logits(heads, group), shift), self.sink_logit)

    def _capped(self, logits: Tensor, shift: Tensor | None) -> Tensor:
        logits = logits if shift is None else logits + shift
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def start_absolute(self, group: HeadParameters) -> None:
        """Set the start value of logit_shift, in place, for the λ, α and shift of keys that the group has now.

        With a sink, what gives it the weight that it has in the teacher, on average; else, under a cap, what gives
        logits the teacher's mean. The origin is a key of zeros.
        """
        if not group.has_origin or group.is_absolute or (self.sink_logit is None and self.softcap is None):
            return
        if group.transform != "none":
            group.origin.zero_()
        group.logit_shift.zero_()
        if self.sink_logit is None:
            heads = group(self.query, self.key, "mapped")
            call = ModuleCall(self.scaling, softcap=self.softcap)
            shift = absolute_shift(heads, get_metric(group.metric), group.p, call)
            kept = self.keep.expand(len(self.query), group.num_heads, -1, -1)
            gaps = (self.products() - self.distance_logits(heads, group) - shift) * kept
            group.logit_shift.copy_(gaps.sum((0, 2, 3)) / kept.sum((0, 2, 3)))
            return
        wanted = self.sink_weight(self.teacher_log_weights())
        low, high = torch.full_like(wanted, -_LARGEST_SHIFT), torch.full_like(wanted, _LARGEST_SHIFT)
        for _ in range(20):
            group.logit_shift.copy_((low + high) / 2)
            too_heavy = self.sink_weight(self.student_log_weights(group)) > wanted
            low = torch.where(too_heavy, group.logit_shift, low)
            high = torch.where(too_heavy, high, group.logit_shift)

    def sink_weight(self, log_weights: Tensor) -> Tensor:
        """Return the mean weight of the sink, (H,)."""
        return log_weights[..., -1].exp().mean((0, 2))

    def median_distance(self, group: HeadParameters) -> Tensor:
        """Return the median of what ε is compared with, over kept pairs, (H,): the plain distance of the head, of
        cosine the norms of query and key."""
        query, key, *_ = group(self.query, self.key, "mapped")
        metric = get_metric(group.metric)
        if metric.scale_free:
            return torch.cat([query, key], dim=2).norm(dim=-1).transpose(0, 1).flatten(1).median(-1).values
        distances = metric.checked_distance(query, key, group.p)
        kept = self.keep.expand_as(distances)
        return torch.stack([d[k].median() for d, k in zip(distances.unbind(1), kept.unbind(1), strict=True)])

    def _log_softmax(self, logits: Tensor, sink_logit: Tensor | None) -> Tensor:
        if self.bias is not None:
            logits = logits + self.bias
        logits = logits.masked_fill(~self.keep, torch.finfo(logits.dtype).min)
        if sink_logit is not None:
            logits = torch.cat([logits, sink_logit.expand(*logits.shape[:-1], 1).to(logits.dtype)], dim=-1)
        return logits.log_softmax(dim=-1)

    def divergence(self, group: HeadParameters) -> Tensor:
        """Return KL(teacher's weights ‖ student's), nats, mean over rows: (H,)."""
        teacher = self.teacher_log_weights()
        terms = teacher.exp() * (teacher - self.student_log_weights(group))
        keep = self.keep if self.sink_logit is None else F.pad(self.keep, (0, 1), value=True)
        return terms.masked_fill(~keep, 0).sum(-1).mean((0, 2))


class LayerData:
    """The attention problem of one layer over the whole calibration batch; draws rows from it."""

    def __init__(self, query: Tensor, key: Tensor, call: ModuleCall, heads: list[int] | None):
        select = slice(None) if heads is None else torch.tensor(heads, device=query.device)
        self.query, self.key = query[:, select].float(), key[:, select].float()
        batch, _, num_queries, _ = self.query.shape
        num_keys = self.key.shape[-2]
        keep = call.mask
        keep = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device) if keep is None else keep
        keep = keep if keep.shape[1] == 1 else keep[:, select]
        if call.is_causal:
            keep = add_triangle(keep, num_queries, num_keys, query.device)
        self.keep = keep.expand(batch, keep.shape[1], num_queries, num_keys)
        bias = call.position_bias
        bias = bias if bias is None or bias.shape[1] == 1 else bias[:, select]
        self.bias = None if bias is None else bias.float().expand(batch, bias.shape[1], num_queries, num_keys)
        self.scaling, self.softcap, self.sink_logit = call.scaling, call.softcap, call.sink_logit
        if self.sink_logit is not None:
            sink = self.sink_logit if self.sink_logit.shape[1] == 1 else self.sink_logit[:, select]
            self.sink_logit = sink.detach().float().expand(*self.query.shape[:3], 1)
        # Rows worth fitting: something to choose from, and, in self-attention, no padding query.
        valid = self.keep.any(1).sum(-1) > 1
        if num_queries == num_keys:
            valid = valid & self.keep.any(1).diagonal(dim1=-2, dim2=-1)
        self.valid = valid
        # Whole sequences are held out of the fit; the divergences reported are theirs.
        self.fit_sequences, self.report_sequences = split_sequences(valid)

    def draw(self, sequences: list[int], count: int, generator: torch.Generator) -> Rows:
        """Draw `count` valid rows from each of `sequences` (with replacement where a sequence has fewer)."""
        rows = draw_rows(self.valid, sequences, count, generator)
        chosen = torch.tensor(sequences, device=self.query.device)[:, None]

        def pick(tensor):
            return tensor.transpose(1, 2)[chosen, rows].transpose(1, 2)

        bias = None if self.bias is None else pick(self.bias)
        sink = None if self.sink_logit is None else pick(self.sink_logit)
        return Rows(pick(self.query), self.key[chosen[:, 0]], pick(self.keep), bias, self.scaling, sink, self.softcap)


def row_deviation(log_weights: Tensor, keep: Tensor) -> Tensor:
    """Return the standard deviation of log-weights along a row over kept entries, mean over rows: (H,)."""
    count = keep.sum(-1, keepdim=True)
    mean = log_weights.masked_fill(~keep, 0).sum(-1, keepdim=True) / count
    return ((log_weights - mean).masked_fill(~keep, 0).square().sum(-1) / count[..., 0]).sqrt().mean((0, 2))
