"""Attention of a sequence that is split over the ranks of a process group: each holds a contiguous stretch of it.

Of Nyström attention a rank gets the window before its stretch, the sinks, and the sum of the far field of all that came
before: its communication does not grow with the length. Of retrieval attention it gets all keys and values before its
stretch.

    output = sequence_parallel.nystrom_attention(query, key, value, landmarks=points, window_size=64, group=group)

Queries, keys and values are the rank's own, the output is that of its own queries. Lengths may differ between ranks,
and padding may stand anywhere. A backward pass is of each rank's own loss; gradients of queries, keys and values are
those of the sum of all ranks' losses. Those of what all ranks hold (landmarks, λ, position bias, ε) are the rank's own
share: sum them over the ranks, as one does with a model's parameters.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.attention import without_autocast
from ..core.inputs import HALF
from ..core.nystrom_hybrid import HybridInputs, WindowBias, advance, empty_state, hybrid_attention
from ..core.retrieval import Search
from ..core.retrieval_far import BEGINNING
from ..core.retrieval_gather import run_retrieval
from .nystrom import REGULARISATION, check_arguments, check_bias, features_of
from .retrieval_attention import problem_of
from .sequence_exchange import DTYPES, Stretch, cut, earlier_rows, rows_at, sum_of_earlier, tied


def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    landmarks: Tensor,
    window_size: int = 0,
    num_sinks: int = 0,
    lam: float | Tensor = 0.5,
    scaling: float | None = None,
    mask: Tensor | None = None,
    position_bias: WindowBias | None = None,
    lift: bool = False,
    regularisation: float = REGULARISATION,
    nonnegative: bool = True,
    group: dist.ProcessGroup | None = None,
    stretch: Stretch | None = None,
) -> Tensor:
    """Compute causal `distattn_hf.nystrom_attention` of a sequence of which this rank holds one stretch.

    A rank sends the last window_size - 1 keys and values of its stretch (on to further ranks, where stretches are
    shorter), its share of the sinks, and the far field's sums, m·(d_v + 1) numbers a head, in 1 + ⌈log₂(P - 1)⌉ rounds.

    Args:
        query: (B, H, N, d), of the rank's own N tokens.
        key: (B, H_kv, N, d).
        value: (B, H_kv, N, d_v).
        landmarks: (H, m, d) or (B, H, m, d), the same on all ranks.
        window_size, num_sinks, lam, scaling, position_bias, lift, regularisation, nonnegative: as there.
        mask: (B, N) or (B, 1, 1, N), the padding of the rank's own tokens.
        group: the ranks, in the order of their stretches; None: all processes.
        stretch: what `sequence_exchange.cut` found for the same tokens and as many sinks, to save asking again.

    Returns:
        (B, H, N, d_v) in value's dtype, of the rank's own queries.

    Raises:
        ValueError: on all ranks, where one has impossible arguments or ranks differ in shapes, dtypes or whether they
            want gradients. Options must be the same on all ranks, too; they are not compared.
    """
    error, keep = None, torch.ones(1, 1, dtype=torch.bool, device=query.device)
    try:
        scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        keep = check_arguments(
            query, key, value, landmarks, window_size, num_sinks, lam, scaling, mask, True, regularisation
        )
        check_bias(position_bias, query.shape[1], window_size)
    except ValueError as found:
        error = found
    if stretch is None:
        count = num_sinks if error is None else 0
        agreed = _agreed(query, key, value, error, window_size=window_size, num_landmarks=_rank_of(landmarks))
        stretch = cut(keep, count, group, agreed, error)
    elif error is not None:
        raise error
    with without_autocast(query.device.type):
        dtype = value.dtype
        key, value = (t.masked_fill(~keep[:, None, :, None], 0.0) for t in (key, value))
        context = NystromContext(key, value, keep, stretch, window_size, num_sinks)
        query, key, value = (t.float() if t.dtype in HALF else t for t in (query, context.key, context.value))
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        features = features_of(landmarks, key.dtype, lam, scaling, None, lift, regularisation, nonnegative)
        inputs = features.hybrid_inputs(query, key, value, context.keep, num_sinks, window_size, True, position_bias)
        return context.attend(inputs).to(dtype)


class NystromContext:
    """A rank's keys and values (B, H_kv, n, .) with what it needs of other ranks': sinks first, then the window.

    keep (B, n) says which of these are neither padding nor sinks.
    """

    def __init__(self, key: Tensor, value: Tensor, keep: Tensor, stretch: Stretch, window_size: int, num_sinks: int):
        self.stretch, size = stretch, key.shape[-1]
        self.position = stretch.first_kept[:, :num_sinks]
        place = torch.arange(stretch.start, stretch.start + stretch.length, device=key.device)
        keep = keep & (place[:, None] != self.position[:, None]).all(-1)
        # One exchange for all: what is kept travels as one more coordinate.
        rows = torch.cat([key, value], dim=-1)
        sinks = rows_at(rows, self.position, stretch)
        flag = keep[:, None, :, None].to(rows.dtype).expand(-1, key.shape[1], -1, 1)
        before = earlier_rows(torch.cat([rows, flag], dim=-1), stretch, max(0, window_size - 1))
        self.earlier = before.shape[2]
        self.keep = torch.cat([before[:, 0, :, -1].detach() > 0, keep], dim=1)
        rows = torch.cat([sinks, before[..., :-1], rows], dim=2)
        self.key, self.value = rows[..., :size], rows[..., size:]

    def attend(self, inputs: HybridInputs) -> Tensor:
        """Return the output (B, H, N, d_v) of `HybridInputs` of these keys and values, the sinks among them."""
        number = self.position.shape[1]
        sinks, keys = ([t[:, :, part] for t in (inputs.key, inputs.value)] for part in _at(number))
        inputs = replace(inputs, key=keys[0], value=keys[1], far_key=inputs.far_key[:, :, number:])
        state = empty_state(inputs)
        state = replace(
            state, sink_key=sinks[0], sink_value=sinks[1], sink_position=self.position,
            length=self.stretch.start - self.earlier,
        )  # fmt: skip
        # What leaves the window within this stretch: all that the next rank's window does not hold.
        left, _ = advance(replace(inputs, state=state))
        sums = sum_of_earlier(torch.cat([left.total, left.weight[..., None]], dim=-1), self.stretch)
        state = replace(state, total=sums[..., :-1], weight=sums[..., -1])
        return tied(hybrid_attention(replace(inputs, state=state))[0], self.key, self.value, sums)


def _at(number: int) -> tuple[slice, slice]:
    return slice(None, number), slice(number, None)


def retrieval_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    metric: str = "dot",
    block_size: int = 16,
    num_blocks: int | tuple[int, ...] = Search.num_blocks,
    min_weight: float = Search.min_weight,
    window_size: int = 64,
    num_sinks: int = 4,
    far_field: bool = True,
    cluster_keys: bool = Search.cluster_keys,
    lam: float | Tensor | None = None,
    p: float | None = None,
    scaling: float | None = None,
    mask: Tensor | None = None,
    softening: float | Tensor = 0.0,
    group: dist.ProcessGroup | None = None,
    stretch: Stretch | None = None,
) -> Tensor:
    """Compute causal `distattn_hf.retrieval_attention` of a sequence of which this rank holds one stretch.

    A rank sends its keys and values to all later ones: the last rank receives all but its own, as in ring attention, in
    one round. It holds them for the time of the call. Blocks are chosen, and those not read summarised, where the
    queries are. Fetching the chosen blocks alone would save little: model_cards/sequence_parallel.md.

    Args:
        query, key, value, mask, group, stretch: as in `nystrom_attention` here.
        metric, block_size, num_blocks, min_weight, window_size, num_sinks, far_field, cluster_keys, lam, p, scaling,
            softening: as there.

    Returns:
        (B, H, N, d_v) in value's dtype, of the rank's own queries.

    Raises:
        ValueError: on all ranks, where one has impossible arguments or ranks differ in shapes, dtypes or whether they
            want gradients. Options must be the same on all ranks, too; they are not compared.
    """
    options = {
        "metric": metric, "block_size": block_size, "num_blocks": num_blocks, "min_weight": min_weight,
        "window_size": window_size, "num_sinks": num_sinks, "far_field": far_field,
        "cluster_keys": cluster_keys, "lam": lam, "p": p,
        "scaling": scaling, "softening": softening,
    }  # fmt: skip
    error, keep = None, torch.ones(1, 1, dtype=torch.bool, device=query.device)
    try:
        own = problem_of(query, key, value, mask=mask, **options)
        if query.shape[2] != key.shape[2]:
            raise ValueError(f"a stretch has a query for each key, got {query.shape[2]} and {key.shape[2]}")
        keep = keep.expand(len(query), query.shape[2])
        if own.inputs.keep is not None:
            keep = own.inputs.keep[:, 0, 0]
    except ValueError as found:
        error = found
    if stretch is None:
        stretch = cut(keep, int(error is None), group, _agreed(query, key, value, error), error)
    elif error is not None:
        raise error
    key, value = (t.masked_fill(~keep[:, None, :, None], 0.0) for t in (key, value))
    context = RetrievalContext(query, key, value, keep, stretch)
    problem = problem_of(query, context.key, context.value, mask=context.keep, **options)
    return context.tied(run_retrieval(replace(problem, beginning=context.beginning))[0])


class RetrievalContext:
    """A rank's keys and values (B, H_kv, n, .) behind all earlier ones, which are kept, and the first queries."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor, stretch: Stretch):
        flag = keep[:, None, :, None].to(key.dtype).expand(-1, key.shape[1], -1, 1)
        rows = torch.cat([key, value, flag], dim=-1)
        rows = torch.cat([earlier_rows(rows, stretch, stretch.starts[-1], "keys"), rows], dim=2)
        self.keep = rows[:, 0, :, -1].detach() > 0
        self.key, self.value = rows[..., : key.shape[-1]], rows[..., key.shape[-1] : -1]
        place = stretch.first_kept[:, :1].clamp(max=stretch.starts[-1]) + torch.arange(BEGINNING, device=query.device)
        self.beginning = rows_at(query, place, stretch, "beginning")[:, :, : min(BEGINNING, rows.shape[2])]

    def tied(self, output: Tensor) -> Tensor:
        """Return the output of attention to these, as each rank must hand it on."""
        return tied(output, self.key, self.value, self.beginning)


_DTYPE = f"dtype ({', '.join(f'{number}: {dtype}' for number, dtype in enumerate(DTYPES))})"


def _agreed(query: Tensor, key: Tensor, value: Tensor, error: ValueError | None, **numbers: int) -> dict[str, int]:
    """Return the numbers that ranks must agree in; zeros for one that refuses its arguments, whose they need not be."""
    names = ("query heads", "key heads", "head size", "value's head size", _DTYPE, "whether gradients are wanted")
    names += tuple(numbers)
    if error is not None:
        return dict.fromkeys(names, 0)
    wants = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    sizes = (query.shape[1], key.shape[1], key.shape[3], value.shape[3], DTYPES.index(key.dtype), int(wants))
    return dict(zip(names, (*sizes, *numbers.values())))


def _rank_of(landmarks) -> int:
    return landmarks.shape[-2] if isinstance(landmarks, Tensor) and landmarks.dim() > 1 else 0
