"""Teacher beside student: how far apart each head's weights and each module's outputs are, and where in the text.

Both models read the same text, each on its own hidden states, so what earlier layers changed counts too.
"""

import math
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.reference import exact_keys
from .samples import padding_of
from .watch import capture
from .weights import AttentionCall

# Rows whose normaliser is wrong by more than this factor are weak: as `GroupReport.rows_off` counts them.
_WEAK = 1.25
_LEAST_SHARE = 1e-30
NUM_BUCKETS = 8


@dataclass
class HeadComparison:
    """One head of both models; means over the queries that are no padding and see two keys or more.

    divergence: KL(teacher's row ‖ student's row) in nats; student's weights of 0 count as the smallest float32.
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
        """One number of each head: a row a module, filled up with NaN."""
        rows = [[getattr(h, name) for h in self.heads if h.module == module] for module in self.modules]
        width = max(map(len, rows), default=0)
        rows = [[math.nan if v is None else float(v) for v in row] for row in rows]
        return [row + [math.nan] * (width - len(row)) for row in rows]

    def to_dict(self) -> dict:
        """JSON-ready; `from_dict` turns it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "Comparison":
        """The comparison that `to_dict` described; raises `ValueError` for another version."""
        if data.get("version") != 1:
            raise ValueError(f"comparison version must be 1, got {data.get('version')!r}")
        return cls(**{**data, "heads": [HeadComparison(**head) for head in data["heads"]]})

    def to_frame(self):
        """A pandas frame, a row a head."""
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

    Raises `ValueError` where they share none, or their heads or tokens do not match.
    """
    totals: dict[str, _Totals] = {}
    for batch in tqdm(batches, desc="compare with the teacher", disable=not progress, leave=False):
        theirs, mine = capture(teacher, batch), capture(student, batch)
        shared = [name for name in mine if name in theirs]
        if not shared:
            raise ValueError(
                f"teacher and student share no attention module: {', '.join(theirs)} against {', '.join(mine)}"
            )
        for name in shared:
            if mine[name].shape != theirs[name].shape:
                raise ValueError(
                    f"{name!r} has (batch, heads, queries, keys) {mine[name].shape} in the student and "
                    f"{theirs[name].shape} in the teacher"
                )
            _add(totals.setdefault(name, _Totals(mine[name])), student, mine.pop(name), theirs.pop(name), batch)
    result = Comparison(*(m.config.name_or_path or type(m).__name__ for m in (teacher, student)))
    for name, total in totals.items():
        result.heads += _heads(name, total)
        result.output_cosine[name] = float(total.cosine[0] / total.cosine[1].clamp_min(1))
        sums, counts = total.buckets.tolist()
        result.by_position[name] = [s / c if c else None for s, c in zip(sums, counts)]
    return result


def _heads(name: str, total: _Totals) -> list[HeadComparison]:
    found = []
    for head, rows in enumerate(total.rows.tolist()):
        error, norm, weak, counted = total.nystrom[:, head].tolist()
        found.append(
            HeadComparison(
                name, total.layer, total.kind, head, int(rows),
                float(total.divergence[head]) / max(rows, 1), float(total.correlation[head]) / max(rows, 1),
                math.sqrt(error / norm) if norm else None, weak / counted if counted else None,
            )
        )  # fmt: skip
    return found


def _add(total: _Totals, model, mine: AttentionCall, theirs: AttentionCall, batch: dict) -> None:
    query_keep, key_keep = padding_of(model, mine, batch)
    if mine.output is not None and theirs.output is not None:
        flat = [call.output.float().transpose(1, 2).flatten(2) for call in (mine, theirs)]
        cosine = torch.cosine_similarity(*flat, dim=-1)
        total.cosine += torch.stack([cosine[query_keep].sum(), query_keep.sum()]).double().cpu()
    bucket = _buckets(query_keep)
    nystrom = list(mine.nystrom_parts())
    for left, right in zip(mine.blocks(), theirs.blocks(), strict=True):
        stop = left.start + left.weights.shape[2]
        keep = left.keep & right.keep & key_keep[:, None, None, :]
        alive = (left.weights.sum(-1) > 0) & (right.weights.sum(-1) > 0) & (keep.sum(-1) > 1)
        counted = alive & query_keep[:, None, left.start : stop]
        divergence = row_divergence(right.weights, left.weights)
        total.rows += counted.double().sum((0, 2)).cpu()
        total.divergence += torch.where(counted, divergence, 0.0).double().sum((0, 2)).cpu()
        correlation = row_correlation(left.weights, right.weights, keep)
        total.correlation += torch.where(counted, correlation, 0.0).double().sum((0, 2)).cpu()
        places = bucket[:, None, left.start : stop].expand_as(counted)[counted].cpu()
        total.buckets[0].index_add_(0, places, divergence[counted].double().cpu())
        total.buckets[1].index_add_(0, places, torch.ones(len(places), dtype=torch.float64))
        for part in nystrom:
            _add_nystrom(total, mine, part, left, stop, counted)


def _buckets(query_keep: Tensor) -> Tensor:
    """Which part of its text each query is in (B, N): 0 to NUM_BUCKETS - 1."""
    number = query_keep.long().cumsum(-1) - 1
    length = query_keep.sum(-1, keepdim=True).clamp_min(1)
    return (number * NUM_BUCKETS // length).clamp(0, NUM_BUCKETS - 1)


def row_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher's row ‖ student's row) in nats along the last axis; weights of 0 as the smallest normal number."""
    least = torch.finfo(student.dtype).tiny
    return (teacher * (teacher.clamp_min(least).log() - student.clamp_min(least).log())).sum(-1).clamp_min(0)


def row_correlation(left: Tensor, right: Tensor, keep: Tensor) -> Tensor:
    """Pearson's correlation of rows over the kept entries; 0 where one row is constant there, 1 where both are."""
    count = keep.sum(-1, keepdim=True).clamp_min(1)
    centred, sizes = [], []
    for weights in (left, right):
        weights = weights.masked_fill(~keep, 0.0)
        centred.append((weights - weights.sum(-1, keepdim=True) / count).masked_fill(~keep, 0.0))
        # Below this, what is left of a constant row is rounding.
        size = torch.linalg.vector_norm(centred[-1], dim=-1)
        sizes.append(torch.where(size > 1e-6 * torch.linalg.vector_norm(weights, dim=-1), size, 0.0))
    product = sizes[0] * sizes[1]
    correlation = (centred[0] * centred[1]).sum(-1) / torch.where(product > 0, product, 1.0)
    return torch.where((sizes[0] == 0) & (sizes[1] == 0), torch.ones_like(product), correlation * (product > 0))


def _add_nystrom(total: _Totals, mine: AttentionCall, part: tuple, rows, stop: int, counted: Tensor) -> None:
    """Errors of the output and of the normaliser Z, head by head.

    Keys within sight exactly have the same weight before it is normalised: their share of a row is off as 1/Z is.
    """
    index, inputs, exact = part
    keep = mine.keep_rows(rows.start, stop)
    true = exact(rows.start, stop, keep)[0]
    found, mask = rows.weights[:, index], counted[:, index]
    value = mine.value[:, index].to(true.dtype)
    reference = true @ value
    error = (found @ value - reference).square().sum(-1)
    near = exact_keys(inputs, rows.start, stop)[2]
    shares = [(weights * near).sum(-1) for weights in (true, found)]
    # Rows that see no key exactly, or give those no weight that float32 could hold, do not tell.
    known = mask & (shares[0] > _LEAST_SHARE) & (shares[1] > _LEAST_SHARE)
    off = torch.where(known, shares[0] / shares[1].clamp_min(_LEAST_SHARE), 1.0).log().abs() > math.log(_WEAK)
    columns = ((error, mask), (reference.square().sum(-1), mask), (off.to(error.dtype), known))
    columns += ((torch.ones_like(error), known),)
    sums = [torch.where(where, values, 0.0).double().sum((0, 2)).cpu() for values, where in columns]
    total.nystrom[:, index.cpu()] += torch.stack(sums)
