"""Annealing: move α, ε, the window and the landmarks of a converted model to a target while the rest trains.

Every value is a function of (value at the start of the stage, step, steps in all), so a run that is killed and resumed
sets the same values as one that is not. λ, which trains, moves along with α and ε by a function of their two values.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..conversion.observe import observed, teacher_attention
from ..core.discovery import find_attention_modules, select_modules
from ..core.metrics import get_metric
from ..core.parameters import HeadParameters, NystromParameters
from ..core.relative_bias import RelativeBias, has_relative_bias
from ..core.softening import LEAST
from ..data.batches import query_mask
from ..data.config import is_integer, is_number

# Share of its initial weight that a landmark has left when it is removed.
_REST = 1e-12

# Share of its first ε at which a head on its way to the plain distance is all but there.
_NEARLY_PLAIN = 1e-2


@dataclass(frozen=True)
class AnnealingOptions:
    """Annealing targets of one stage; None leaves a value unchanged.

    Args:
        alpha: target of α, in (0, 1]; 1 takes the distance (softened, where there is an ε) of the query and the shifted
            key as they are. Moves log-linearly; α does not train meanwhile, and λ of l2, l1, lp and chebyshev goes
            along so that q·k keeps its weight (see `Annealing.prepare`).
        softening: target of each fitted ε, as a share in [0, 1) of what it is when the stage starts. Moves as α does;
            0 goes to the plain distance, and the heads have no ε when the stage ends.
        window_size: target of the Nyström window, an integer >= 0.
        num_landmarks: target m >= 1 of the landmarks per head. The least used ones fade and are removed at the end.
        warmup, hold: fractions of the steps before anything moves, and at the end, at the target.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    alpha: float | None = None
    window_size: int | None = None
    num_landmarks: int | None = None
    warmup: float = 0.0
    hold: float = 0.2
    softening: float | None = None

    def __post_init__(self):
        if self.alpha is not None and not (is_number(self.alpha) and 0 < self.alpha <= 1):
            raise ValueError(f"anneal.alpha must be in (0, 1], got {self.alpha!r}")
        if self.softening is not None and not (is_number(self.softening) and 0 <= self.softening < 1):
            raise ValueError(f"anneal.softening must be a share in [0, 1), got {self.softening!r}")
        for name, minimum in (("window_size", 0), ("num_landmarks", 1)):
            value = getattr(self, name)
            if value is not None and not is_integer(value, minimum):
                raise ValueError(f"anneal.{name} must be an integer >= {minimum}, got {value!r}")
        for name in ("warmup", "hold"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < 1:
                raise ValueError(f"anneal.{name} must be a fraction in [0, 1), got {value!r}")
        if self.warmup + self.hold >= 1:
            raise ValueError(f"anneal.warmup + anneal.hold must be < 1, got {self.warmup} + {self.hold}")

    @property
    def active(self) -> bool:
        """Whether there is anything to anneal."""
        targets = (self.alpha, self.softening, self.window_size, self.num_landmarks)
        return any(value is not None for value in targets)


def progress(step: int, total: int, warmup: float = 0.0, hold: float = 0.0) -> float:
    """Return the progress at `step` of `total`: 0 for the first `warmup`, 1 for the last `hold` of the steps."""
    moving = max((1 - warmup - hold) * total, 1)
    return min(max((step - warmup * total) / moving, 0.0), 1.0)


def log_linear(start: Tensor, end: float, done: float) -> Tensor:
    """Return the log of the value at `done` in [0, 1] between start (given as its log) and end, linear in the log."""
    return start * (1 - done) + math.log(end) * done


def softening_at(start: Tensor, share: float, done: float) -> Tensor:
    """Return log ε at `done` in [0, 1] between start (given as its log) and `share` of it; 0 ends at (almost) 0."""
    if share == 0 and done == 1:
        return torch.full_like(start, math.log(LEAST))
    return start + done * math.log(max(share, _NEARLY_PLAIN))


def integer_linear(start: int, end: int, done: float) -> int:
    """Return the integer nearest to the value at `done` in [0, 1] between start and end."""
    return round(start + (end - start) * done)


def fading(done: float) -> float:
    """Return the log of a landmark's remaining share, which falls linearly to (almost) 0."""
    return math.log(max(1 - done, _REST))


class Annealing:
    """Apply `AnnealingOptions` to a converted model; created when a stage starts, before any checkpoint is loaded.

    Raises `ValueError` where the model lacks the parameter that is to be annealed, or cannot reach the target: a window
    too small for its relative position bias, more landmarks than it has.
    """

    def __init__(self, student, options: AnnealingOptions):
        self.student, self.options = student, options
        self.spec_numbers = _spec_numbers(student)
        groups = list(self.spec_numbers)
        self.alphas: list[tuple[HeadParameters, Tensor]] = []
        self.softened: dict[HeadParameters, Tensor] = {}
        # Squared norms of query and key, from which λ follows α and ε.
        self.sizes: dict[HeadParameters, tuple[Tensor, Tensor, int]] = {}
        if options.alpha is not None:
            self.alphas = [(g, g.log_alpha.detach().clone()) for g in groups if g.transform != "none"]
            if not self.alphas:
                raise ValueError(f"anneal.alpha={options.alpha}: no converted head has α (transform 'none' everywhere)")
            for group, _ in self.alphas:
                group.log_alpha.requires_grad_(False)
        if options.softening is not None:
            self.softened = {g: g.log_softening.detach().clone() for g in groups if g.fits_softening}
            if not self.softened:
                raise ValueError(
                    f"anneal.softening={options.softening}: no converted head has an ε that was fitted "
                    "(by convert, init='calibrated', but for softening=0); a stage that drove it to 0 has left none"
                )
            for group in self.softened:
                group.log_softening.requires_grad_(False)
        self.nystrom = [group for group in groups if isinstance(group, NystromParameters)]
        for name in ("window_size", "num_landmarks"):
            if getattr(options, name) is not None and not self.nystrom:
                raise ValueError(f"anneal.{name} needs a model with mechanism='nystrom', which no head has")
        if options.window_size is not None:
            _check_window(student, options.window_size)
        fewest_landmarks = min((group.spec.num_landmarks for group in self.nystrom), default=0)
        if options.num_landmarks is not None and options.num_landmarks > fewest_landmarks:
            raise ValueError(
                f"anneal.num_landmarks must be at most the model's own {fewest_landmarks}, got {options.num_landmarks}"
            )
        self.windows = [group.spec.window_size for group in self.nystrom]
        self.leaving: list[tuple[NystromParameters, Tensor, Tensor]] = []

    @property
    def needs_batches(self) -> bool:
        """Whether `prepare` needs batches."""
        return self.options.num_landmarks is not None or bool(self._following())

    def prepare(self, batches: list[dict]) -> None:
        """Measure on the first training rows which landmarks are least used, and how large queries and keys are.

        For a metric of degree 1 the share of q·k in a logit is λ/dist with dist² ≈ ‖q‖²/α² + α²‖k - c‖². Where α moves,
        λ is multiplied by the factor by which dist grows: otherwise α = 1 would come with a temperature many times off,
        which takes hundreds of steps at λ's own learning rate to undo. Where ε moves, the same holds of
        √(dist² + ε²), and for cosine of √(‖q‖² + ε²)·√(‖k‖² + ε²).
        """
        self._choose_landmarks(batches)
        if following := self._following():
            self.sizes = head_sizes(self.student, following, batches)

    def _following(self) -> list[HeadParameters]:
        """Return the groups whose λ follows α or ε."""
        groups = [g for g, _ in self.alphas if get_metric(g.metric).degree == 1]
        return [g for g in dict.fromkeys([*groups, *self.softened]) if g.constant_lambda is None]

    def _choose_landmarks(self, batches: list[dict]) -> None:
        """Select each head's least used landmarks, by the far attention that goes through them on `batches`."""
        target = self.options.num_landmarks
        if target is None:
            return
        use = landmark_use(self.student, batches)
        for group in self.nystrom:
            leaving = use[group].argsort(dim=-1, stable=True)[:, : group.spec.num_landmarks - target]
            self.leaving.append((group, leaving, group.interpolation_bias.detach().clone()))

    @torch.no_grad()
    def apply(self, step: int, total: int) -> None:
        """Set every annealed value to the one for `step` of `total`."""
        options = self.options
        done = progress(step, total, options.warmup, options.hold)
        # Relative to the current α and ε, so that a resumed run continues from the λ of its checkpoint.
        before = {group: self._log_size(group) for group in self.sizes}
        for group, start in self.alphas:
            group.log_alpha.copy_(log_linear(start, options.alpha, done))
        for group, start in self.softened.items():
            group.log_softening.copy_(softening_at(start, options.softening, done))
        for group, log_size in before.items():
            group.log_lambda.add_(self._log_size(group) - log_size)
        if options.window_size is not None:
            for group, start in zip(self.nystrom, self.windows, strict=True):
                window = integer_linear(start, options.window_size, done)
                group.spec = replace(group.spec, window_size=window)
            self._write_specs("window_size", self.nystrom)
        for group, indices, start in self.leaving:
            # β(k) is a softmax over landmarks: a landmark whose share is 0 is gone, and the others take its keys.
            faded = start.gather(-1, indices) + fading(done)
            group.interpolation_bias.scatter_(-1, indices, faded)

    def _log_size(self, group: HeadParameters) -> Tensor:
        """Return the log of what divides q·k in a logit, of each head, (H,): of a metric of degree 1 the distance.

        With δ = ε / d^(1/p) it is d^(1/p)·√(x² + δ²), where x² = (‖q‖²/α² + α²‖k - c‖²) / d.
        """
        *sizes, head_dim = self.sizes[group]
        query, key = (size.log() for size in sizes)
        metric = get_metric(group.metric)
        epsilon = 2 * group.log_softening.to(query) if group.fits_softening else None
        if metric.scale_free:
            return 0.5 * (torch.logaddexp(query, epsilon) + torch.logaddexp(key, epsilon))
        log_alpha = group.log_alpha.to(query) if group.transform != "none" else 0.0
        squared = torch.logaddexp(query - 2 * log_alpha, key + 2 * log_alpha)
        if epsilon is not None:
            order = getattr(metric, "order", None) or group.p or 2.0
            squared = torch.logaddexp(squared + (2 / order - 1) * math.log(head_dim), epsilon)
        return 0.5 * squared

    def finish(self, total: int) -> None:
        """Set the targets and remove faded landmarks and an ε of 0, after the last step."""
        self.apply(total, total)
        for group, indices, _ in self.leaving:
            remove_landmarks(group, indices)
        if self.leaving:
            self._write_specs("num_landmarks", self.nystrom)
        if self.options.window_size is not None:
            self._follow_window()
        self.leaving = []
        if self.options.softening == 0:
            for group in self.softened:
                remove_softening(group)
            self._write_specs("softening", list(self.softened))
            self.softened, self.sizes = {}, {}

    def _follow_window(self) -> None:
        """Give heads that retrieve beside Nyström heads the window that a reload will give them."""
        specs = self.student.config.attention_specs
        for group, number in self.spec_numbers.items():
            if specs[number].mechanism == "nystrom" and group.spec.mechanism == "retrieval":
                group.spec = specs[number].beyond_spec()

    def _write_specs(self, name: str, groups: list[HeadParameters]) -> None:
        """Write field `name` of the groups' specs into the config, so that a saved checkpoint describes itself."""
        specs = self.student.config.distattn["specs"]
        for group in groups:
            specs[self.spec_numbers[group]][name] = getattr(group.spec, name)


def _spec_numbers(student) -> dict[HeadParameters, int]:
    """Return {group of heads: the number of its spec in the config}."""
    # A model made from a config names no modules: its specs choose them.
    modules = student.config.distattn["modules"] or select_modules(
        find_attention_modules(student), student.config.attention_specs
    )
    return {
        group: entry["spec"]
        for name, state in student.attention_states.items()
        for group, entry in zip(state.groups, modules[name]["groups"], strict=True)
    }


@torch.no_grad()
def _check_window(student, window_size: int) -> None:
    """Raise `ValueError` for a window that cannot carry a relative position bias of Nyström heads."""
    nystrom_modules = [k for k, s in student.attention_states.items() if s.is_nystrom and not s.is_cross]
    for name, module in student.named_modules():
        # The layers of a stack share the bias of one of them.
        stack = name.partition("block.")[0]
        if not has_relative_bias(module) or not module.has_relative_attention_bias:
            continue
        if not any(f".{key}".partition("block.")[0].endswith(f".{stack}") for key in nystrom_modules):
            continue
        try:
            if not window_size:
                raise ValueError("it cannot carry the model's relative position bias")
            # Long enough that any window too small for the bias is refused.
            bias = RelativeBias.from_module(module, 0, module.relative_attention_bias.weight.device)
            bias.window(window_size, module.relative_attention_max_distance + 2, module.is_decoder)
        except ValueError as error:
            raise ValueError(f"anneal.window_size={window_size}: {error}") from None


@torch.no_grad()
def head_sizes(student, groups: list[HeadParameters], batches: list[dict]) -> dict[HeadParameters, tuple]:
    """Return {group: (‖q·Q‖², ‖(k - c)·K‖², d)}, both (H,): medians over the tokens of a batch, mean over batches.

    Medians, because the first tokens of a text have keys many times larger than all others. Padding is included.
    """
    dims: dict[HeadParameters, int] = {}
    sizes_by_group: dict[HeadParameters, list[tuple[Tensor, Tensor]]] = {group: [] for group in groups}

    def observe(state, query, key, value, call):
        for heads, group in state.parts():
            if group in sizes_by_group:
                alpha = group.log_alpha.exp()[:, None, None] if group.transform != "none" else 1.0
                query_mapped, key_mapped = group.map(query[:, heads], key[:, heads])
                dims[group] = query.shape[-1]
                sizes = (query_mapped * alpha).square().sum(-1), (key_mapped / alpha).square().sum(-1)
                sizes_by_group[group].append(tuple(size.transpose(0, 1).flatten(1).median(-1).values for size in sizes))
        return teacher_attention(query, key, value, call)

    _run_observed(student, observe, batches)
    if unreached := [group for group, group_sizes in sizes_by_group.items() if not group_sizes]:
        raise ValueError(f"anneal: no batch reached {len(unreached)} of the converted attention modules")
    return {
        group: (*(torch.stack(batch_sizes).mean(0).clamp_min(1e-12) for batch_sizes in zip(*group_sizes)), dims[group])
        for group, group_sizes in sizes_by_group.items()
    }


def _run_observed(student, observe, batches: list[dict]) -> None:
    was_training = student.training
    student.eval()
    with observed(student, observe):
        for inputs in batches:
            student(**{k: v for k, v in inputs.items() if k != "labels" or student.config.is_encoder_decoder})
    student.train(was_training)


@torch.no_grad()
def landmark_use(student, batches: list[dict]) -> dict[NystromParameters, Tensor]:
    """Return {group: (H, m)}: the share of a query's far attention that goes through each landmark, mean over queries.

    The queries are those of all batches, without padding. Keys of the whole row count as far.
    """
    sums: dict[NystromParameters, Tensor] = {}
    counts: dict[NystromParameters, Tensor] = {}
    names = {state: name for name, state in student.attention_states.items()}
    inputs: dict = {}

    def observe(state, query, key, value, call):
        for heads, group in state.parts():
            if not isinstance(group, NystromParameters):
                continue
            _, _, far_query, far_key = group(query[:, heads], key[:, heads], "features", scaling=call.scaling)
            mask = call.mask
            if mask is not None:
                far_key = far_key * mask[:, :, 0, :, None]
            weight = (far_query + far_key.sum(-2, keepdim=True).clamp_min(1e-30).log()).softmax(-1)
            valid = query_mask(names[state], state.is_cross, inputs, student.config.is_encoder_decoder)
            if valid is None or tuple(valid.shape) != (query.shape[0], query.shape[2]):
                valid = torch.ones(query.shape[0], query.shape[2], device=query.device)
            valid = valid.to(weight.dtype)
            sums[group] = sums.get(group, 0.0) + (weight * valid[:, None, :, None]).sum((0, 2))
            counts[group] = counts.get(group, 0.0) + valid.sum()
        return teacher_attention(query, key, value, call)

    was_training = student.training
    student.eval()
    with observed(student, observe):
        for inputs in batches:  # noqa: B007 (`observe` reads it)
            student(**{k: v for k, v in inputs.items() if k != "labels" or student.config.is_encoder_decoder})
    student.train(was_training)
    if not sums:
        raise ValueError("anneal.num_landmarks: no batch reached a head with landmarks")
    return {group: total / counts[group].clamp_min(1) for group, total in sums.items()}


@torch.no_grad()
def remove_landmarks(group: NystromParameters, indices: Tensor) -> None:
    """Remove the landmarks `indices` (H, n) from a group of heads, and update its spec."""
    keep = torch.ones_like(group.landmark_bias, dtype=torch.bool).scatter_(-1, indices, False)
    count = int(keep[0].sum())
    for name in ("landmarks", "interpolation_map", "landmark_bias", "interpolation_bias"):
        parameter = getattr(group, name)
        shape = (group.num_heads, count, *parameter.shape[2:])
        setattr(
            group,
            name,
            torch.nn.Parameter(parameter[keep].reshape(shape).clone(), requires_grad=parameter.requires_grad),
        )
    group.spec = replace(group.spec, num_landmarks=count)


def remove_softening(group: HeadParameters) -> None:
    """Take ε out of a group of heads, whose distance is the plain one then, and update its spec."""
    # 0 and not None, which would ask a new fit of this spec for an ε.
    group.spec = replace(group.spec, softening=0.0)
    group.fits_softening, group.constant_softening = False, None
    del group.log_softening


class AnnealingCallback(TrainerCallback):
    """A `TrainerCallback` that sets the annealed values before every step, and the targets after the last one."""

    def __init__(self, annealing: Annealing):
        self.annealing = annealing

    def on_step_begin(self, args, state, control, **kwargs):
        """Set the values for the step that begins."""
        self.annealing.apply(state.global_step, state.max_steps)

    def on_train_end(self, args, state, control, **kwargs):
        """Set the targets, if the run reached its last step."""
        if state.global_step >= state.max_steps:
            self.annealing.finish(state.max_steps)
