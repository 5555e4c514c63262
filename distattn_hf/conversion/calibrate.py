"""Fit λ, α, shift and maps of each head so that its attention diverges least from the teacher's.

One forward pass over the calibration batch visits the layers in order. At each converted attention module the observer
sees the teacher's query, key and value, fits the head parameters on the spot and hands back the teacher's own output;
so only one layer's activations are kept, and it works for every architecture.
"""

import math
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.attention_spec import AttentionSpec
from ..core.inputs import ModuleCall
from ..core.interface import attend
from ..core.metrics import get_metric
from ..core.nystrom_heads import nystrom_forward
from ..core.parameters import HeadParameters, NystromParameters
from ..core.softening import has_softened_form
from .beyond import SELECTIONS, SHARE, beyond_heads, largest_errors, take_beyond, take_share
from .calibrate_nystrom import NystromData, fit_nystrom
from .fit import LayerData, Rows, row_deviation
from .observe import observed, teacher_attention
from .probe import probe

# α from fully Euclidean (1) towards the teacher (0), each step a factor √2.
ALPHA_GRID = tuple(2.0 ** (-i / 2) for i in range(10))


# ε from the plain distance (almost 0) towards the teacher, in medians of the head's distances.
SOFTENING_GRID = (1e-3, 0.1, 0.3, 1.0, 3.0, 10.0)

# Nats per unit of log α and of log ε: far below any divergence worth fitting.
_ALPHA_PULL = 1e-4


@dataclass(frozen=True)
class CalibrationOptions:
    """Options of the fit. With 40 steps it took 3 to 11 minutes for 135M parameters on two busy cores.

    Args:
        steps: Adam steps per layer; None: 100, and 200 for `transform="maps"` and Nyström heads.
        learning_rate: its initial value; it falls to zero along a cosine.
        rows: query positions drawn per step from each sequence.
        sequences: sequences drawn per step; None: 4, and 2 for metrics without a matmul form (l1, lp, chebyshev).
        divergence_budget: nats per query. Where a smaller α only buys divergence below this, the larger (more
            Euclidean) α is kept.
        seed: of the draws. Same seed, same data: same result.
        progress: show a progress bar.
        max_error: Nyström heads whose outputs stay further from the teacher's (relative error) use what the spec's
            `beyond` says; None: none does, but for those of `beyond_share`.
        beyond_share: in its place, the share of the key heads with Nyström heads that do so, 0 < share <= 1: those
            first in the order of `select`. None: 0.1 with "probe".
        select: "error": of the largest relative error of their query heads' outputs, as fitted. "probe": of what hiding
            their far keys costs the teacher on key-value texts (see probe.py), before the fit; causal language models.
        probe_lengths: tokens of these texts, two of each length.
        max_length, max_tokens: of a calibration sequence, and of all together. None: 512 and 8,192; with Nyström
            attention, whose far field is what lies beyond the window, 1,024 and 16,384.
    """

    steps: int | None = None
    learning_rate: float = 0.03
    rows: int = 64
    sequences: int | None = None
    divergence_budget: float = 0.004
    seed: int = 0
    progress: bool = True
    max_error: float | None = None
    beyond_share: float | None = None
    select: str = "error"
    probe_lengths: tuple[int, ...] = (1024,)
    max_length: int | None = None
    max_tokens: int | None = None

    def __post_init__(self):
        for name in ("max_length", "max_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 2):
                raise ValueError(f"{name} must be None or an integer >= 2, got {value!r}")
        if self.max_error is not None and not self.max_error > 0:
            raise ValueError(f"max_error must be None or > 0, got {self.max_error!r}")
        if self.select not in SELECTIONS:
            raise ValueError(f"select must be one of {', '.join(SELECTIONS)}, got {self.select!r}")
        if self.beyond_share is not None and not 0 < self.beyond_share <= 1:
            raise ValueError(f"beyond_share must be None or 0 < share <= 1, got {self.beyond_share!r}")
        if self.select == "probe" and self.beyond_share is None:
            object.__setattr__(self, "beyond_share", SHARE)
        if self.max_error is not None and self.beyond_share is not None:
            raise ValueError(f"max_error and beyond_share={self.beyond_share!r} both say which heads go; leave one out")
        if not self.probe_lengths or not all(isinstance(n, int) and n > 0 for n in self.probe_lengths):
            raise ValueError(f"probe_lengths must be integers >= 1, got {self.probe_lengths!r}")
        if not isinstance(self.rows, int) or self.rows < 1:
            raise ValueError(f"rows must be an integer >= 1, got {self.rows!r}")
        if self.sequences is not None and (not isinstance(self.sequences, int) or self.sequences < 1):
            raise ValueError(f"sequences must be None or an integer >= 1, got {self.sequences!r}")
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 0):
            raise ValueError(f"steps must be None or an integer >= 0, got {self.steps!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate!r}")
        if not self.divergence_budget >= 0:
            raise ValueError(f"divergence_budget must be >= 0 nats, got {self.divergence_budget!r}")

    @property
    def chooses_heads(self) -> bool:
        """Whether some heads may use what a spec's `beyond` says."""
        return self.max_error is not None or self.beyond_share is not None

    def steps_for(self, group: HeadParameters) -> int:
        """Return the Adam steps for one group of heads: maps have d² values a head and take longer."""
        if self.steps is not None:
            return self.steps
        return 200 if group.transform == "maps" or isinstance(group, NystromParameters) else 100

    def sequences_for(self, group: HeadParameters) -> int:
        """Return the sequences drawn per step for one group of heads."""
        if self.sequences is not None:
            return self.sequences
        return 2 if get_metric(group.metric).elementwise else 4


def fitted_defaults(spec: AttentionSpec) -> AttentionSpec:
    """Return the spec of a calibrated conversion with what it leaves open: ε fitted, and maps where there is no ε.

    Beside an ε maps add next to nothing, and they cost time at every token that is generated.
    """
    if spec.lift or spec.mechanism == "nystrom":
        return spec
    metric = get_metric(spec.metric)
    if spec.softening is None and has_softened_form(metric):
        spec = replace(spec, softening="fit")
    if spec.transform is None:
        spec = replace(spec, transform="scalar" if spec.softening == "fit" else metric.preferred_transform)
    return spec


@torch.no_grad()
def _match_spread(group: HeadParameters, rows: Rows) -> None:
    """Set λ of each head so that its logits spread along a row as the teacher's do (position bias, sink and cap left
    out), and then where absolute logits count from."""
    if group.constant_lambda is None:
        alone = rows.alone()
        teacher = row_deviation(alone.teacher_log_weights(), rows.keep)
        student = row_deviation(alone.student_log_weights(group), rows.keep)
        group.log_lambda += (teacher / student.clamp_min(1e-12)).clamp(1e-6, 1e6).log()
    rows.start_absolute(group)


@torch.no_grad()
def _choose_softening(group: HeadParameters, rows: Rows, budget: float) -> dict[str, Tensor]:
    """Set per head the smallest ε of the grid that is within the budget, or within 10% of the best divergence, and α.

    Returns the values at the grid's least ε: those of the plain distance.
    """
    trials = []
    has_alpha = group.transform != "none" and not get_metric(group.metric).scale_free
    # ε follows the distances, which depend on α. Beside an ε, every other α is enough to start from.
    medians = {alpha: _median_distance(group, rows, alpha) for alpha in (ALPHA_GRID[::2] if has_alpha else (None,))}
    for share in SOFTENING_GRID:
        tried = [_try(group, rows, alpha, (share * median).log()) for alpha, median in medians.items()]
        _take_first_allowed(group, tried, budget)
        trials.append((rows.divergence(group), _snapshot(group)))
    _take_first_allowed(group, trials, budget)
    return trials[0][1]


def _take_first_allowed(group: HeadParameters, trials: list[tuple[Tensor, dict[str, Tensor]]], budget: float) -> None:
    """Set each head to the first of (divergences (H,), values) within the budget, or within 10% of the best."""
    divergences = torch.stack([divergence for divergence, _ in trials])
    allowed = torch.maximum(1.1 * divergences.amin(0), torch.full_like(divergences[0], budget))
    chosen = (divergences <= allowed).int().argmax(0)
    for number, (_, values) in enumerate(trials):
        _restore(group, values, chosen == number)


def _median_distance(group: HeadParameters, rows: Rows, alpha: float | None) -> Tensor:
    if alpha is not None:
        group.log_alpha.fill_(math.log(alpha))
    return rows.median_distance(group)


def _try(group: HeadParameters, rows: Rows, alpha: float | None, log_softening: Tensor | None = None):
    """Set α and ε, where given, and λ to match; return (divergences (H,), values)."""
    if alpha is not None:
        group.log_alpha.fill_(math.log(alpha))
    if log_softening is not None:
        group.log_softening.copy_(log_softening)
    _match_spread(group, rows)
    return rows.divergence(group), _snapshot(group)


@torch.no_grad()
def _choose_alpha(group: HeadParameters, rows: Rows, budget: float) -> None:
    """Set α of each head to the largest of the grid within the budget, or within 10% of the best divergence."""
    _take_first_allowed(group, [_try(group, rows, alpha) for alpha in ALPHA_GRID], budget)


def fit_group(group: HeadParameters, data: LayerData, options: CalibrationOptions) -> dict[str, Tensor]:
    """Fit one group of heads in place; return its divergences (H,) in nats on held-out rows, "before" and "after".

    With a fitted ε also "plain", the divergence of the plain distance with its own λ and α, and "softening_ratio", ε in
    medians of the head's plain distances (of cosine: of its norms): 0 is the plain distance.
    """
    generator = torch.Generator().manual_seed(options.seed)
    report = data.draw(data.report_sequences, 2 * options.rows, generator)
    with torch.no_grad():
        before = report.divergence(group)
        defaults = _snapshot(group)
        start = data.draw(data.fit_sequences[: options.sequences_for(group)], 2 * options.rows, generator)
        scale_free = get_metric(group.metric).scale_free
        if group.transform != "none":
            weights = data.keep.any(1).any(1).float()[:, None, :, None]
            group.shift.copy_((data.key * weights).sum((0, 2)) / weights.sum((0, 2)))
            if not scale_free and not group.fits_softening:
                _choose_alpha(group, start, options.divergence_budget)
        if group.fits_softening:
            plain_values = _choose_softening(group, start, options.divergence_budget)
        _match_spread(group, start)
    tensors = group.fitted_tensors()
    candidates = {n: t for n, t in tensors.items() if not (scale_free and n == "log_alpha")}
    start_values = _snapshot(group)
    steps = options.steps_for(group)
    if candidates and steps:
        _descend(group, candidates, data, options, steps, generator)
    with torch.no_grad():
        # The fit is judged on rows it has not seen; a head it did not help goes back to where it started.
        for fallback in (start_values, defaults):
            fitted = _snapshot(group)
            reached = report.divergence(group)
            _restore(group, fallback)
            better = reached <= report.divergence(group).clamp_min(options.divergence_budget)
            _restore(group, fitted, better)
        result = {"before": before, "after": report.divergence(group)}
        if report.sink_logit is not None:
            for name, log_weights in (
                ("sink_weight", report.student_log_weights(group)),
                ("teacher_sink_weight", report.teacher_log_weights()),
            ):
                result[name] = report.sink_weight(log_weights)
        if group.fits_softening:
            fitted = _snapshot(group)
            _restore(group, plain_values)
            result["plain"] = report.divergence(group)
            _restore(group, fitted)
            result["softening_ratio"] = group.softening() / report.median_distance(group)
    return result


def _snapshot(group) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in group.fitted_tensors().items()}


def _restore(group, values: dict[str, Tensor], heads: Tensor | None = None) -> None:
    """Set the group's tensors to `values`, for the chosen heads only when `heads` (bool, (H,)) is given."""
    for name, tensor in group.fitted_tensors().items():
        chosen = slice(None) if heads is None else heads
        tensor.data[chosen] = values[name][chosen]


def _descend(group, candidates, data, options, steps, generator) -> None:
    flags = {n: t.requires_grad for n, t in group.fitted_tensors().items()}
    for name, tensor in group.fitted_tensors().items():
        tensor.requires_grad_(name in candidates)
    # A map's entries are of order 1/√d, so they move in steps that much smaller.
    maps = [t for n, t in candidates.items() if n.endswith("_map")]
    others = [t for n, t in candidates.items() if not n.endswith("_map")]
    rate = options.learning_rate
    parameter_groups = [{"params": others, "lr": rate}, {"params": maps, "lr": rate / 3}]
    optimizer = torch.optim.Adam([g for g in parameter_groups if g["params"]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    count = min(options.sequences_for(group), len(data.fit_sequences))
    with torch.enable_grad():
        for _ in range(steps):
            order = torch.randperm(len(data.fit_sequences), generator=generator)[:count].tolist()
            rows = data.draw([data.fit_sequences[i] for i in order], options.rows, generator)
            loss = rows.divergence(group).clamp_min(options.divergence_budget).sum()
            if "log_alpha" in candidates:
                # Within the budget no other term acts on a head, and α rises towards fully Euclidean.
                loss = loss - _ALPHA_PULL * group.log_alpha.sum()
            if "log_softening" in candidates:
                loss = loss + _ALPHA_PULL * group.log_softening.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if "log_alpha" in candidates:
                group.log_alpha.data.clamp_(max=0)
    for name, tensor in group.fitted_tensors().items():
        tensor.requires_grad_(flags[name])
        tensor.grad = None


class _AllFittedError(Exception):
    """Raised inside the forward pass once the last layer is fitted: the head of the model need not run."""


def _count_uses(model, batch) -> dict[str, int]:
    """Count how often one forward pass runs each converted module: more than once where layers share it (ALBERT)."""
    uses: dict[str, int] = {}
    names = {state: name for name, state in model.attention_states.items()}

    def count(state, query, key, value, call):
        uses[names[state]] = uses.get(names[state], 0) + 1
        return teacher_attention(query, key, value, call)

    _observed_forward(model, {name: tensor[:1] for name, tensor in batch.items()}, count)
    return uses


def _observed_forward(model, batch, observer) -> None:
    with suppress(_AllFittedError), observed(model, observer), torch.no_grad():
        model(**batch)


def calibrate(model, batch: dict[str, Tensor], options: CalibrationOptions) -> dict[str, list[dict]]:
    """Fit every converted attention module of `model` on `batch`.

    A module that several layers share is fitted once, on all its uses together. Returns {module name: one {"before",
    "after"} of (H,) divergences per group}. Raises `ValueError` when the batch never reaches a converted module.
    """
    names = {state: name for name, state in model.attention_states.items()}
    rises, groups = {}, {}
    if options.select == "probe":
        rises, groups = probe(model, batch, options)
        take_share(model, {name: [{} for _ in state.groups] for state, name in names.items()}, rises, groups, options)
    uses = _count_uses(model, batch)
    if missing := [name for name in names.values() if name not in uses]:
        raise ValueError(f"calibration: the batch never reached {missing[0]!r} ({len(missing)} modules in all)")
    seen: dict[str, list[tuple[Tensor, Tensor, Tensor, ModuleCall]]] = {}
    results: dict[str, list[dict]] = {}
    bar = tqdm(total=len(names), desc="calibrate", unit="layer", disable=not options.progress)

    def observe(state, query, key, value, call):
        name = names[state]
        groups[name] = call.groups
        seen.setdefault(name, []).append((query, key, value, call))
        if len(seen[name]) == uses[name]:
            *tensors, calls = zip(*seen.pop(name), strict=True)
            queries, keys, values = map(torch.cat, tensors)
            results[name] = []
            joined_call = _joined(calls, len(query))
            for group, heads in zip(state.groups, state.head_lists, strict=True):
                if group.spec.mechanism == "retrieval" and not group.fitted_tensors():
                    results[name].append({})
                    continue
                if isinstance(group, NystromParameters):
                    data = NystromData(queries, keys, values, joined_call, heads)
                    _check_sequences(data, name)
                    results[name].append(fit_nystrom(group, data, options))
                    continue
                data = LayerData(queries, keys, joined_call, heads)
                _check_sequences(data, name)
                results[name].append(fit_group(group, data, options))
            if options.max_error is not None:
                chosen = beyond_heads(state, results[name], options.max_error, call.groups)
                results[name] = take_beyond(model, name, state, results[name], chosen)
            bar.update()
            if len(results) == len(names):
                raise _AllFittedError
            if state.is_nystrom:
                # The layers above are fitted on the far field's output, errors included.
                return nystrom_forward(state, query, key, value, replace(call, backend=None), attend)[0]
        return teacher_attention(query, key, value, call)

    try:
        _observed_forward(model, batch, observe)
    finally:
        bar.close()
    if options.select == "error" and options.beyond_share is not None:
        take_share(model, results, largest_errors(model, results, groups), groups, options)
    for name, state in model.attention_states.items() if rises else ():
        for (heads, group), result in zip(state.parts(), results[name]):
            if group is not None and (name, 0) in rises:
                result["probe_rise"] = torch.tensor([rises[name, head // groups[name]] for head in heads])
    return results


def _check_sequences(data, name: str) -> None:
    if not data.fit_sequences:
        raise ValueError(f"calibration: no sequence reaches {name!r} with two or more visible keys")


def _joined(calls: list[ModuleCall], batch: int) -> ModuleCall:
    """Return one call for all uses of a module: the masks, biases and sinks of each, stacked along the batch."""

    def join(tensors):
        if len(tensors) == 1 or tensors[0] is None:
            return tensors[0]
        return torch.cat([tensor.expand(batch, -1, -1, -1) for tensor in tensors])

    names = ("mask", "position_bias", "sink_logit")
    return replace(calls[-1], **{name: join([getattr(call, name) for call in calls]) for name in names})
