"""Compare a student with its teacher: each head's weights, each module's outputs, and the position in the text.

Both models read the same text, each on its own hidden states, so changes of earlier layers count too.
"""

import math
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.reference import exact_keys
from .samples import padding_of
from .watch import capture
from .weights import AttentionCall, Rows

# Rows whose normaliser is off by more than this factor are weak, as in `GroupReport.rows_off`.
_WEAK = 1.25
_LEAST_SHARE = 1e-30
NUM_BUCKETS = 8


@dataclass
class HeadComparison:
    """One head of both models; means over the queries that are not padding and see two keys or more.

    divergence: KL(teacher's row ‖ student's row) in nats; student weights of 0 count as the smallest float32.
    correlation: Pearson's, of the two rows over the keys that both may see; rows that are constant in one model count
    as 0, in both as 1.
    output_error: of heads with Nyström attention, Σ‖o - o*‖² / Σ‖o*‖² as a root, o* the output of exact attention with
    the kernel that Nyström approximates, on the student's own queries and keys. weak_rows: the share of their rows
    whose normaliser is off by a factor of more than 1.25. None for other heads, and for weak_rows where no query sees a
    key exactly.
    """

    module: str
    layer: int | None
    kind: str
    head: int
    rows: int
    divergence: float
    correlation: float
    output_error: float | None = None
    weak_rows: float | None = None


@dataclass
class Comparison:
    """All heads of two models; `output_cosine` and `by_position` are by module.

    output_cosine: mean cosine of the attention's outputs, heads side by side. by_position: mean divergence (nats, over
    heads) in `NUM_BUCKETS` equal parts of each text, first to last; None where a part has no query.
    """

    teacher: str
    student: str
    heads: list[HeadComparison] = field(default_factory=list)
    output_cosine: dict[str, float] = field(default_factory=dict)
    by_position: dict[str, list[float | None]] = field(default_factory=dict)
    version: int = 1

    @property
    def modules(self) -> list[str]:
        """The modules' names, in the order in which they run."""
        return list(self.output_cosine)

    def grid(self, name: str) -> list[list[float]]:
        """Return one number of each head, one row per module, padded with NaN."""
        rows = [[getattr(h, name) for h in self.heads if h.module == module] for module in self.modules]
        width = max(map(len, rows), default=0)
        rows = [[math.nan if v is None else float(v) for v in row] for row in rows]
        return [row + [math.nan] * (width - len(row)) for row in rows]

    def to_dict(self) -> dict:
        """Return a JSON-serialisable dict; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "Comparison":
        """Restore the comparison from `to_dict`; raises `ValueError` for another version."""
        if data.get("version") != 1:
            raise ValueError(f"comparison version must be 1, got {data.get('version')!r}")
        return cls(**{**data, "heads": [HeadComparison(**head) for head in data["heads"]]})

    def to_frame(self):
        """Return a pandas DataFrame with one row per head."""
        import pandas

        return pandas.DataFrame([asdict(head) for head in self.heads])


class _Totals:
    """Running sums of one module, float64."""

    def __init__(self, call: AttentionCall):
        heads = call.shape[1]
        self.layer, self.kind = call.layer, call.kind
        zeros = torch.zeros(heads, dtype=torch.float64)
        self.rows, self.divergence, self.correlation = zeros.clone(), zeros.clone(), zeros.clone()
        self.buckets = torch.zeros(2, NUM_BUCKETS, dtype=torch.float64)
        self.cosine = torch.zeros(2, dtype=torch.float64)
        # (error, norm, weak rows, rows) of heads with Nyström attention.
        self.nystrom = torch.zeros(4, heads, dtype=torch.float64)


@torch.no_grad()
def compare(student, teacher, batches: list[dict], *, progress: bool = False) -> Comparison:
    """Compare every attention module that both models have.

    Raises `ValueError` if they share none, or if their heads or tokens do not match.
    """
    totals: dict[str, _Totals] = {}
    for batch in tqdm(batches, desc="compare with the teacher", disable=not progress, leave=False):
        reference, calls = capture(teacher, batch), capture(student, batch)
        shared = [name for name in calls if name in reference]
        if not shared:
            raise ValueError(
                f"teacher and student share no attention module: {', '.join(reference)} against {', '.join(calls)}"
            )
        for name in shared:
            if calls[name].shape != reference[name].shape:
                raise ValueError(
                    f"{name!r} has (batch, heads, queries, keys) {calls[name].shape} in the student and "
                    f"{reference[name].shape} in the teacher"
                )
            _add(totals.setdefault(name, _Totals(calls[name])), student, calls.pop(name), reference.pop(name), batch)
    result = Comparison(*(m.config.name_or_path or type(m).__name__ for m in (teacher, student)))
    for name, total in totals.items():
        result.heads += _heads(name, total)
        result.output_cosine[name] = float(total.cosine[0] / total.cosine[1].clamp_min(1))
        sums, counts = total.buckets.tolist()
        result.by_position[name] = [s / c if c else None for s, c in zip(sums, counts)]
    return result


def _heads(name: str, total: _Totals) -> list[HeadComparison]:
    comparisons = []
    for head, rows in enumerate(total.rows.tolist()):
        error, norm, weak, counted = total.nystrom[:, head].tolist()
        comparisons.append(
            HeadComparison(
                name, total.layer, total.kind, head, int(rows),
                float(total.divergence[head]) / max(rows, 1), float(total.correlation[head]) / max(rows, 1),
                math.sqrt(error / norm) if norm else None, weak / counted if counted else None,
            )
        )  # fmt: skip
    return comparisons


def _add(total: _Totals, model, mine: AttentionCall, theirs: AttentionCall, batch: dict) -> None:
    query_keep, key_keep = padding_of(model, mine, batch)
    if mine.output is not None and theirs.output is not None:
        outputs = [call.output.float().transpose(1, 2).flatten(2) for call in (mine, theirs)]
        cosine = torch.cosine_similarity(*outputs, dim=-1)
        total.cosine += torch.stack([cosine[query_keep].sum(), query_keep.sum()]).double().cpu()
    bucket = _buckets(query_keep)
    nystrom = list(mine.nystrom_parts())
    for rows, teacher_rows in zip(mine.blocks(), theirs.blocks(), strict=True):
        stop = rows.start + rows.weights.shape[2]
        keep = rows.keep & teacher_rows.keep & key_keep[:, None, None, :]
        nonzero = (rows.weights.sum(-1) > 0) & (teacher_rows.weights.sum(-1) > 0) & (keep.sum(-1) > 1)
        counted = nonzero & query_keep[:, None, rows.start : stop]
        divergence = row_divergence(*(_with_sink(call, r) for call, r in ((theirs, teacher_rows), (mine, rows))))
        total.rows += counted.double().sum((0, 2)).cpu()
        total.divergence += torch.where(counted, divergence, 0.0).double().sum((0, 2)).cpu()
        correlation = row_correlation(rows.weights, teacher_rows.weights, keep)
        total.correlation += torch.where(counted, correlation, 0.0).double().sum((0, 2)).cpu()
        buckets = bucket[:, None, rows.start : stop].expand_as(counted)[counted].cpu()
        total.buckets[0].index_add_(0, buckets, divergence[counted].double().cpu())
        total.buckets[1].index_add_(0, buckets, torch.ones(len(buckets), dtype=torch.float64))
        for part in nystrom:
            _add_nystrom(total, mine, part, rows, stop, counted)


def _with_sink(call: AttentionCall, rows: Rows) -> Tensor:
    """Return weights whose rows sum to 1: with that of a learned sink as one more."""
    if call.sink_logit is None:
        return rows.weights
    return torch.cat([rows.weights, (1 - rows.weights.sum(-1, keepdim=True)).clamp_min(0)], dim=-1)


def _buckets(query_keep: Tensor) -> Tensor:
    """Return the part of its text that each query is in (B, N): 0 to NUM_BUCKETS - 1."""
    position = query_keep.long().cumsum(-1) - 1
    length = query_keep.sum(-1, keepdim=True).clamp_min(1)
    return (position * NUM_BUCKETS // length).clamp(0, NUM_BUCKETS - 1)


def row_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher's row ‖ student's row) in nats along the last axis; 0 counts as the smallest normal number."""
    smallest = torch.finfo(student.dtype).tiny
    return (teacher * (teacher.clamp_min(smallest).log() - student.clamp_min(smallest).log())).sum(-1).clamp_min(0)


def row_correlation(left: Tensor, right: Tensor, keep: Tensor) -> Tensor:
    """Return Pearson's correlation of rows over the kept entries; 0 if one row is constant there, 1 if both are."""
    count = keep.sum(-1, keepdim=True).clamp_min(1)
    centred, sizes = [], []
    for weights in (left, right):
        weights = weights.masked_fill(~keep, 0.0)
        centred.append((weights - weights.sum(-1, keepdim=True) / count).masked_fill(~keep, 0.0))
        # A smaller norm is that of a constant row after rounding.
        size = torch.linalg.vector_norm(centred[-1], dim=-1)
        sizes.append(torch.where(size > 1e-6 * torch.linalg.vector_norm(weights, dim=-1), size, 0.0))
    product = sizes[0] * sizes[1]
    correlation = (centred[0] * centred[1]).sum(-1) / torch.where(product > 0, product, 1.0)
    return torch.where((sizes[0] == 0) & (sizes[1] == 0), torch.ones_like(product), correlation * (product > 0))


def _add_nystrom(total: _Totals, mine: AttentionCall, part: tuple, rows, stop: int, counted: Tensor) -> None:
    """Add the errors of the output and of the normaliser Z, per head.

    Keys that are attended to exactly have the same weight before normalisation, so their share of a row is off by the
    same factor as 1/Z.
    """
    index, inputs, exact = part
    keep = mine.keep_rows(rows.start, stop)
    exact_weights = exact(rows.start, stop, keep)[0]
    approximate, mask = rows.weights[:, index], counted[:, index]
    value = mine.value[:, index].to(exact_weights.dtype)
    reference = exact_weights @ value
    error = (approximate @ value - reference).square().sum(-1)
    exact_mask = exact_keys(inputs, rows.start, stop)[2]
    shares = [(weights * exact_mask).sum(-1) for weights in (exact_weights, approximate)]
    # Rows that see no key exactly, or give those keys a share too small for float32, are skipped.
    has_share = mask & (shares[0] > _LEAST_SHARE) & (shares[1] > _LEAST_SHARE)
    weak = torch.where(has_share, shares[0] / shares[1].clamp_min(_LEAST_SHARE), 1.0).log().abs() > math.log(_WEAK)
    columns = ((error, mask), (reference.square().sum(-1), mask), (weak.to(error.dtype), has_share))
    columns += ((torch.ones_like(error), has_share),)
    sums = [torch.where(valid, values, 0.0).double().sum((0, 2)).cpu() for values, valid in columns]
    total.nystrom[:, index.cpu()] += torch.stack(sums)
