"""Annealing: α, the window and the landmarks of a converted model go to a target while the rest trains.

Every value is a function of (value at the start of the stage, step, steps in all), so a run that is killed and resumed
sets the same values as one that is not.
"""

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..core.parameters import HeadParameters, NystromParameters
from .objectives import observed, teacher_attention

# What is left of a landmark before it is taken out, as a share of its weight at the start.
_REST = 1e-12


@dataclass(frozen=True)
class AnnealingOptions:
    """Targets of one stage; None leaves a value alone.

    Args:
        alpha: target of α, in (0, 1]; 1 is fully Euclidean. Moves log-linearly; α does not train meanwhile.
        window_size: target of the Nyström window, an integer >= 0.
        num_landmarks: target m >= 1 of the landmarks per head. The least used ones fade and are taken out at the end.
        warmup, hold: fractions of the steps before anything moves, and at the target at the end.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    alpha: float | None = None
    window_size: int | None = None
    num_landmarks: int | None = None
    warmup: float = 0.0
    hold: float = 0.2

    def __post_init__(self):
        if self.alpha is not None and not (_is_number(self.alpha) and 0 < self.alpha <= 1):
            raise ValueError(f"anneal.alpha must be in (0, 1], got {self.alpha!r}")
        for name, least in (("window_size", 0), ("num_landmarks", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"anneal.{name} must be an integer >= {least}, got {value!r}")
        for name in ("warmup", "hold"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise ValueError(f"anneal.{name} must be a fraction in [0, 1), got {value!r}")
        if self.warmup + self.hold >= 1:
            raise ValueError(f"anneal.warmup + anneal.hold must be < 1, got {self.warmup} + {self.hold}")

    @property
    def active(self) -> bool:
        """Whether there is anything to anneal."""
        return any(value is not None for value in (self.alpha, self.window_size, self.num_landmarks))


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def progress(step: int, total: int, warmup: float = 0.0, hold: float = 0.0) -> float:
    """Share of the way done at `step` of `total`: 0 for the first `warmup`, 1 for the last `hold` of the steps."""
    moving = max((1 - warmup - hold) * total, 1)
    return min(max((step - warmup * total) / moving, 0.0), 1.0)


def log_linear(start: Tensor, end: float, done: float) -> Tensor:
    """log of the value between start (given as its log) and end that `done` in [0, 1] of the way gives."""
    return start * (1 - done) + math.log(end) * done


def integer_linear(start: int, end: int, done: float) -> int:
    """The integer nearest to the value `done` of the way from start to end."""
    return round(start + (end - start) * done)


def fading(done: float) -> float:
    """log of what is left of a landmark, which falls linearly to (almost) 0."""
    return math.log(max(1 - done, _REST))


class Annealing:
    """Applies `AnnealingOptions` to a converted model; made when a stage starts, before any checkpoint is loaded.

    Raises `ValueError` where the model has nothing of the kind that is to move.
    """

    def __init__(self, student, options: AnnealingOptions):
        self.student, self.options = student, options
        groups = [group for state in student.attention_states.values() for group in state.groups]
        self.alphas: list[tuple[HeadParameters, Tensor]] = []
        if options.alpha is not None:
            self.alphas = [(g, g.log_alpha.detach().clone()) for g in groups if g.transform != "none"]
            if not self.alphas:
                raise ValueError(f"anneal.alpha={options.alpha}: no converted head has α (transform 'none' everywhere)")
            for group, _ in self.alphas:
                group.log_alpha.requires_grad_(False)
        self.linear = [group for group in groups if isinstance(group, NystromParameters)]
        for name in ("window_size", "num_landmarks"):
            if getattr(options, name) is not None and not self.linear:
                raise ValueError(f"anneal.{name} needs a model with mechanism='nystrom', which no head has")
        self.windows = [group.spec.window_size for group in self.linear]
        self.leaving: list[tuple[NystromParameters, Tensor, Tensor]] = []

    def choose_landmarks(self, batches: list[dict]) -> None:
        """Mark each head's least used landmarks, by the far attention that goes through them on `batches`.

        Raises `ValueError` for a target above what a head has.
        """
        target = self.options.num_landmarks
        if target is None:
            return
        use = landmark_use(self.student, batches)
        for group in self.linear:
            count = group.spec.num_landmarks
            if target > count:
                raise ValueError(f"anneal.num_landmarks must be at most the model's own {count}, got {target}")
            order = use[group].argsort(dim=-1, stable=True)
            self.leaving.append((group, order[:, : count - target], group.interpolation_bias.detach().clone()))

    @torch.no_grad()
    def apply(self, step: int, total: int) -> None:
        """Set everything to its value at `step` of `total`."""
        options = self.options
        done = progress(step, total, options.warmup, options.hold)
        for group, start in self.alphas:
            group.log_alpha.copy_(log_linear(start, options.alpha, done))
        if options.window_size is not None:
            for group, start in zip(self.linear, self.windows, strict=True):
                window = integer_linear(start, options.window_size, done)
                group.spec = replace(group.spec, window_size=window)
            self._write_specs("window_size")
        for group, indices, start in self.leaving:
            # β(k) is a softmax over landmarks: without its share a landmark is gone, and the others take its keys.
            faded = start.gather(-1, indices) + fading(done)
            group.interpolation_bias.scatter_(-1, indices, faded)

    def finish(self, total: int) -> None:
        """The state after the last step: targets reached, faded landmarks taken out."""
        self.apply(total, total)
        for group, indices, _ in self.leaving:
            remove_landmarks(group, indices)
        if self.leaving:
            self._write_specs("num_landmarks")
        self.leaving = []

    def _write_specs(self, name: str) -> None:
        """What the groups' specs say, into the config: a saved checkpoint says what it is."""
        block = self.student.config.distattn
        names = {state: key for key, state in self.student.attention_states.items()}
        for state, key in names.items():
            entries = (block["modules"] or {}).get(key, {}).get("groups") or []
            for group, entry in zip(state.groups, entries, strict=False):
                if isinstance(group, NystromParameters):
                    block["specs"][entry["spec"]][name] = getattr(group.spec, name)
        if not block["modules"]:
            for spec in block["specs"]:
                if spec["mechanism"] == "nystrom":
                    spec[name] = getattr(self.linear[0].spec, name)


@torch.no_grad()
def landmark_use(student, batches: list[dict]) -> dict[NystromParameters, Tensor]:
    """{group: (H, m)}: the share of a query's far attention that goes through each landmark, mean over queries.

    Keys of the whole row count as far, and padding is left out.
    """
    found: dict[NystromParameters, Tensor] = {}

    def observe(state, query, key, value, call):
        for heads, group in state.parts():
            if not isinstance(group, NystromParameters):
                continue
            _, _, far_query, far_key = group.features(query[:, heads], key[:, heads], call["scaling"])
            mask = call["mask"]
            if mask is not None:
                far_key = far_key * mask[:, :, 0, :, None]
            weight = (far_query + far_key.sum(-2, keepdim=True).clamp_min(1e-30).log()).softmax(-1)
            found[group] = found.get(group, 0.0) + weight.mean((0, 2))
        return teacher_attention(query, key, value, call)

    was_training = student.training
    student.eval()
    with observed(student, observe):
        for batch in batches:
            student(**{k: v for k, v in batch.items() if k != "labels" or student.config.is_encoder_decoder})
    student.train(was_training)
    if not found:
        raise ValueError("anneal.num_landmarks: no batch reached a head with landmarks")
    return found


@torch.no_grad()
def remove_landmarks(group: NystromParameters, indices: Tensor) -> None:
    """Take the landmarks `indices` (H, n) out of a group of heads, and say so in its spec."""
    keep = torch.ones_like(group.landmark_bias, dtype=torch.bool).scatter_(-1, indices, False)
    count = int(keep[0].sum())
    for name in ("landmarks", "interpolation_map", "landmark_bias", "interpolation_bias"):
        old = getattr(group, name)
        shape = (group.num_heads, count, *old.shape[2:])
        setattr(group, name, torch.nn.Parameter(old[keep].reshape(shape).clone(), requires_grad=old.requires_grad))
    group.spec = replace(group.spec, num_landmarks=count)


class AnnealingCallback(TrainerCallback):
    """Sets the annealed values before every step; after the last one, the targets."""

    def __init__(self, annealing: Annealing):
        self.annealing = annealing

    def on_step_begin(self, args, state, control, **kwargs):
        """Values for the step that begins."""
        self.annealing.apply(state.global_step, state.max_steps)

    def on_train_end(self, args, state, control, **kwargs):
        """The targets, where the run reached its last step."""
        if state.global_step >= state.max_steps:
            self.annealing.finish(state.max_steps)


def describe(options: AnnealingOptions) -> dict:
    """The options that are set, for logs and reports."""
    return {name: value for name, value in asdict(options).items() if value is not None}
