"""Fit the far field of Nyström attention to the teacher's: landmarks, and the weights of keys at them."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.attention_spec import AttentionSpec
from ..core.head_groups import key_padding
from ..core.inputs import ModuleCall
from ..core.parameters import NystromParameters
from ..data.batches import length_for, longest_row
from ..functional.landmarks import select_landmarks
from .fit import draw_rows, split_sequences

# Keys per head that landmarks are chosen from.
_POINTS = 4096
# Weight of the divergence beside the relative error of the outputs.
_DIVERGENCE_WEIGHT = 0.1
# A row is off when its normaliser is wrong by more than this factor.
_ROW_OFF = 1.25
_LEAST_WEIGHT = 1e-30
_LEAST_OUTPUT = 1e-12
# The logit of a key that is not seen.
_HIDDEN = -1e30
# Weights (float32: 8 MB) that are written out at a time where every row of a text counts.
_ENTRIES = 2**21
# Rows of a text, at most, from which the errors that are reported come.
_REPORTED = 1024
# Log-weight that a key at a distance of one standard deviation loses, per coordinate.
_SHARPNESS = 0.125


class NystromData:
    """Query, key and value (B, H, N or M, d) of a layer over the calibration batch, and which rows are worth a fit."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, call: ModuleCall, heads: list[int] | None):
        select = slice(None) if heads is None else torch.tensor(heads, device=query.device)
        self.query, self.key, self.value = (t[:, select].float() for t in (query, key, value))
        bias = call.position_bias
        bias = bias if bias is None or bias.shape[1] == 1 else bias[:, select]
        sink = call.sink_logit
        sink = sink if sink is None or sink.shape[1] == 1 else sink.detach()[:, select]
        self.call = replace(call, return_weights=False, position_bias=bias, sink_logit=sink)
        batch, _, num_queries, _ = query.shape
        num_keys = key.shape[2]
        self.keep = key_padding(call.mask, query, num_keys)
        seen = self.keep.cumsum(-1)
        seen = seen[:, num_keys - num_queries :] if call.is_causal else seen[:, -1:]
        # Rows with something to choose from; in self-attention, no padding query.
        self.valid = (seen > 1).expand(batch, num_queries)
        if num_queries == num_keys:
            self.valid = self.valid & self.keep
        self.fit_sequences, self.report_sequences = split_sequences(self.valid)


@torch.no_grad()
def choose_landmarks(group: NystromParameters, data: NystromData, seed: int) -> None:
    """Set start values: the strategy's landmarks among the keys, and for each key the nearest of them."""
    spec, generator = group.spec, torch.Generator().manual_seed(seed)
    items = data.fit_sequences
    keep = data.keep[items] & (data.keep[items].cumsum(-1) > spec.num_sinks)
    keys = group.map(data.query[items], data.key[items])[1]
    points = keys.transpose(1, 2)[keep]  # (points, H, d)
    if not len(points):
        raise ValueError(f"calibration: no text is longer than num_sinks={spec.num_sinks} tokens")
    points = points[torch.randperm(len(points), generator=generator)[:_POINTS]].transpose(0, 1)
    lam = group.lam()
    lam = float(lam.mean()) if isinstance(lam, Tensor) else lam
    weight = lam * data.call.scaling
    landmarks = select_landmarks(points, spec.num_landmarks, spec.landmarks, scaling=2 * weight, seed=seed)
    # Points lie this far from their landmark, per coordinate; the softmax over landmarks decides on that scale.
    variance = torch.cdist(points, landmarks).amin(-1).square().mean(-1) / points.shape[-1]
    sharpness = (_SHARPNESS / variance.clamp_min(1e-6))[:, None]
    norms = landmarks.square().sum(-1)
    group.landmarks.copy_(landmarks)
    group.landmark_bias.zero_() if spec.lift else group.landmark_bias.copy_(-weight * norms)
    group.interpolation_map.copy_(2 * sharpness[..., None] * landmarks)
    group.interpolation_bias.copy_(-sharpness * norms)
    group.key_gain.zero_()


def fit_nystrom(group: NystromParameters, data: NystromData, options) -> dict[str, Tensor]:
    """Fit one layer in place; returns figures (H,) on sequences the fit has not seen.

    after: divergence from the teacher in nats per query (that of sinks and window alone is infinite); window_error,
    output_error: relative errors of the outputs, of sinks and window alone and as fitted; rows_off: share of rows whose
    normaliser is wrong by a quarter or more.
    """
    choose_landmarks(group, data, options.seed)
    steps = options.steps_for(group)
    if steps:
        _descend(group, data, options, steps)
    with torch.no_grad():
        return _figures(group, data)


def _descend(group, data: NystromData, options, steps: int) -> None:
    generator = torch.Generator().manual_seed(options.seed)
    rate = options.learning_rate
    scales = {name: max(float(t.detach().abs().mean()), 1e-3) for name, t in group.named_parameters()}
    # Adam moves every entry by about the rate: so much of what the entries are themselves.
    relative = {"landmarks", "interpolation_map", "shift"}
    rates = {"key_gain": 0.3 * rate, **{name: rate * scales[name] for name in relative & set(scales)}}
    flags = {name: t.requires_grad for name, t in group.named_parameters()}
    parameters = [{"params": [t.requires_grad_(True)], "lr": rates.get(n, rate)} for n, t in group.named_parameters()]
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    count = min(options.sequences_for(group), len(data.fit_sequences))
    with torch.enable_grad():
        for _ in range(steps):
            order = torch.randperm(len(data.fit_sequences), generator=generator)[:count].tolist()
            items = [data.fit_sequences[i] for i in order]
            optimizer.zero_grad()
            _add_gradients(group, data, items, draw_rows(data.valid, items, options.rows, generator))
            optimizer.step()
            schedule.step()
    for name, tensor in group.named_parameters():
        tensor.requires_grad_(flags[name])
        tensor.grad = None


def _add_gradients(group, data: NystromData, items: list[int], rows: Tensor) -> None:
    """Add the gradients of outputs' relative error plus a little divergence, summed over heads, at some rows (b, n).

    A sequence at a time: of all weights of long ones together the memory's fresh pages took as long as the sums.
    """
    parts = [_Rows(group.spec, data, item, own) for item, own in zip(items, rows, strict=True)]
    total = sum(part.size for part in parts).clamp_min(_LEAST_OUTPUT)
    for part in parts:
        student = part.logits(*_features(group, data, part.query, part.key))
        error = part.error(student) / total + _DIVERGENCE_WEIGHT * part.divergence(student) / len(parts)
        error.sum().backward()


def _features(group, data: NystromData, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return group(query, key, "features", scaling=data.call.scaling, sink_logit=data.call.sink_logit)


class _Rows:
    """Teacher's and student's weights at some rows (n,) of one sequence, written out.

    teacher and weights: its logits and their softmax (1, H, n, M); output (1, H, n, d_v) and size (H,), ‖output‖².
    """

    @torch.no_grad()
    def __init__(self, spec: AttentionSpec, data: NystromData, item: int, rows: Tensor):
        self.query = data.query[item : item + 1, :, rows]
        self.key, self.value = data.key[item : item + 1], data.value[item : item + 1]
        self.call = call = data.call
        num_keys = self.key.shape[2]
        relative = torch.arange(num_keys, device=rows.device) - rows[None, :, None]  # (1, n, M)
        keep = data.keep[item : item + 1]
        seen = keep[:, None].expand_as(relative)
        if call.is_causal:
            seen = seen & (relative <= 0)
        window = 0 if call.is_cross else spec.window_size
        sinks = 0 if call.is_cross else spec.num_sinks
        exact = (relative.abs() < window) | (keep & (keep.cumsum(-1) <= sinks))[:, None]
        self.exact, self.hidden = exact[:, None], ~seen[:, None]
        bias = call.position_bias
        self.bias = None if bias is None else bias[:1, :, rows].float()
        logits = self._masked(call.scaling * self.query @ self.key.mT)
        if call.sink_logit is not None:
            # One more key, which all see exactly, without a value.
            logits = torch.cat([logits, call.sink_logit.float().expand_as(logits[..., :1])], -1)
            self.exact = F.pad(self.exact, (0, 1), value=True)
            self.value = F.pad(self.value, (0, 0, 0, 1))
        self.teacher, self.weights = logits, logits.softmax(-1)
        self.output = self.weights @ self.value
        self.size = self.output.square().sum((0, 2, 3))

    def _masked(self, logits: Tensor) -> Tensor:
        # Finite, so that no weight of 0 meets an infinite logarithm.
        return (logits if self.bias is None else logits + self.bias).masked_fill(self.hidden, _HIDDEN)

    def logits(self, query: Tensor, key: Tensor, far_query: Tensor, far_key: Tensor) -> Tensor:
        """Return the student's logits (1, H, n, M) of its `_features`, after them that of the sink."""
        row_maximum = far_query.amax(-1, keepdim=True).detach()
        far = ((far_query - row_maximum).exp() @ far_key.mT).clamp_min(_LEAST_WEIGHT).log() + row_maximum
        num_keys = key.shape[2]
        logits = self._masked(torch.where(self.exact[..., :num_keys], query @ key.mT, far))
        return logits if self.call.sink_logit is None else torch.cat([logits, query[..., -1:]], -1)

    def divergence(self, student: Tensor) -> Tensor:
        """Return KL(teacher ‖ student) in nats, mean over rows, of the student's logits: (H,)."""
        return (self.weights * (self.teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1).mean((0, 2))

    def error(self, student: Tensor) -> Tensor:
        """Return ‖teacher's output - student's‖² of the student's logits: (H,)."""
        return (self.output - student.softmax(-1) @ self.value).square().sum((0, 2, 3))


def _figures(group, data: NystromData) -> dict[str, Tensor]:
    """Compute the figures of `fit_nystrom` over valid rows of the held-out sequences, evenly over long ones."""
    results: dict[str, list[Tensor]] = {}
    at_once = max(1, _ENTRIES // (data.key.shape[1] * data.key.shape[2]))
    for i in data.report_sequences:
        rows = data.valid[i].nonzero()[:, 0]
        rows = rows[:: -(-len(rows) // _REPORTED)]
        sums: dict[str, Tensor] = {}
        query, key, far_query, far_key = _features(group, data, data.query[i : i + 1, :, rows], data.key[i : i + 1])
        for part, *own in zip(*(t.split(at_once, axis) for t, axis in ((rows, 0), (query, 2), (far_query, 2)))):
            problem = _Rows(group.spec, data, i, part)
            student = problem.logits(own[0], key, own[1], far_key)
            alone = student.masked_fill(~problem.exact, -1e4)
            added = {
                "after": problem.divergence(student) * len(part),
                "window_error": torch.stack([problem.error(alone), problem.size]),
                "output_error": torch.stack([problem.error(student), problem.size]),
            }
            if group.spec.lift:
                gap = student.logsumexp(-1) - problem.teacher.logsumexp(-1)
                added["rows_off"] = (gap.abs() > torch.tensor(_ROW_OFF).log()).float().sum((0, 2))
            sums = {name: value + sums.get(name, 0.0) for name, value in added.items()}
        for name, value in sums.items():
            is_error = name in ("window_error", "output_error")
            value = (value[0] / value[1].clamp_min(_LEAST_OUTPUT)).sqrt() if is_error else value / len(rows)
            results.setdefault(name, []).append(value)
    return {name: torch.stack(values).mean(0) for name, values in results.items()}


def exact_span(model, *, exact_below: bool = True) -> int | None:
    """Return up to how many tokens every Nyström head sees all keys exactly, by sinks and window or `exact_below`.

    None for a model without a far field.
    """
    spans = [
        max(_near_span(group.spec, module), (group.spec.exact_below or 0) if exact_below else 0)
        for module in model.attention_modules().values()
        if (state := getattr(module, "distattn", None)) is not None
        for group in state.groups
        if isinstance(group, NystromParameters) and group.far_field
    ]
    return min(spans, default=None)


def _near_span(spec, module) -> int:
    if module.distattn.is_cross:
        return spec.num_sinks
    if getattr(module, "is_causal", False):
        return spec.num_sinks + spec.window_size
    return max(spec.num_sinks, spec.window_size)


def far_field_warnings(student, batch: dict[str, Tensor]) -> list[str]:
    """Return warnings of what a fit on `batch` does not cover, and of an exact part that leaves no far field."""
    warnings, longest = [], longest_row(batch)
    span = exact_span(student, exact_below=False)
    if span is not None and 0 < longest <= span:
        warnings.append(
            f"calibration: no text is longer than {longest} tokens, and sinks and window see {span} exactly: landmarks "
            "had nothing to be fitted to, and the errors are no test of them; give longer texts or a smaller "
            "window_size"
        )
    span = exact_span(student)
    if span is not None and length_for(student, span + 1) <= span:
        warnings.append(
            f"mechanism='nystrom': all keys are seen exactly up to {span} tokens, and the model has "
            f"{length_for(student, span)} positions: nothing is linear; lower exact_below or window_size"
        )
    return warnings
