"""Log what the attention does while a `Trainer` trains."""

import logging
from statistics import fmean

import torch
from transformers import Trainer, TrainerCallback

from ..core.discovery import base_prefix
from ..functional.row_statistics import COLLAPSED_ENTROPY, COLLAPSED_WEIGHT
from .statistics import measure

logger = logging.getLogger(__name__)

_REMEDY = (
    "a smaller learning rate for λ and α (learning_rates.attention), no weight decay on parameters named .distattn., a "
    "smaller lam, or a logit_clip or a larger temperature in a layer of your own widen it"
)


class AttentionLoggingCallback(TrainerCallback):
    """Log of each layer, every so many steps: entropy, largest weight, share of collapsed heads, and λ, α and ε.

    Names: attention/LAYER/entropy (nats), /maximum, /collapsed, means over its heads, and /lambda, /alpha, /softening
    of converted models and of native ones that have them. They are measured after the step, without dropout, on the
    first rows of the step's own batch; training goes on bit for bit as without. A head that collapses is warned of
    once.

    Args:
        every: optimizer steps between two looks.
        rows, tokens: of the batch, at most.

    `AttentionLoggingCallback(every=100).add_to(trainer)` puts the numbers into everything that the trainer logs to,
    TensorBoard included. Given as `callbacks=[...]` it comes after those and reaches the trainer's log history and
    console alone, which it says.

    Raises:
        ValueError: for numbers below 1; in training, for a model without attention weights.
    """

    def __init__(self, every: int = 100, rows: int = 4, tokens: int = 512):
        for name, value in (("every", every), ("rows", rows), ("tokens", tokens)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        self.every, self.rows, self.tokens = every, rows, tokens
        self.trainer: Trainer | None = None
        self._batch: dict | None = None
        self._handle = None
        self._collapsed: set[tuple[str, int]] = set()
        self._pending: dict[str, float] = {}

    def add_to(self, trainer: Trainer) -> "AttentionLoggingCallback":
        """Add this callback to a trainer, and log through it; return the callback."""
        self.trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Say what is not reached."""
        reached = [name for name in args.report_to or [] if name != "none"]
        if self.trainer is None and reached:
            logger.warning(
                f"AttentionLoggingCallback logs to the log history and the console; .add_to(trainer) adds "
                f"{', '.join(reached)}"
            )

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Keep the first batch of a step that is looked at."""
        if (state.global_step + 1) % self.every == 0:
            self._batch = None
            self._handle = model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module, arguments, keywords):
        if self._batch is None and not arguments:
            self._batch = {
                name: tensor[: self.rows, : self.tokens] if tensor.dim() == 2 else tensor[: self.rows]
                for name, tensor in keywords.items()
                if isinstance(tensor, torch.Tensor) and tensor.dim() and name != "labels"
            }

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Measure and log."""
        if self._handle is None:
            return
        self._handle.remove()
        batch, self._handle, self._batch = self._batch, None, None
        if not state.is_world_process_zero or batch is None:
            return
        numbers = self._measure(_unwrapped(model), batch)
        if self.trainer is not None:
            self.trainer.log(numbers)
        else:
            self._pending = numbers
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the numbers to what is logged next, where there is no trainer to log through."""
        if self._pending and logs is not None:
            logs.update(self._pending)
            state.log_history[-1].update(self._pending)
            self._pending = {}

    def _measure(self, model, batch: dict) -> dict[str, float]:
        modes = {module: module.training for module in model.modules()}
        try:
            model.eval()
            with torch.no_grad():
                statistics = measure(model, [batch])
        finally:
            for module, mode in modes.items():
                module.training = mode
        numbers = {}
        for module in statistics.modules:
            heads = statistics.of(module)
            for name in ("entropy", "maximum", "collapsed"):
                numbers[f"attention/{module}/{name}"] = fmean(float(getattr(head, name)) for head in heads)
            self._warn(module, heads)
        for name, state in _states(model).items():
            for group in state:
                for what, values in group.reported_values().items():
                    key = {"lam": "lambda"}.get(what, what)
                    if values is not None and key in ("lambda", "alpha", "softening"):
                        numbers[f"attention/{name}/{key}"] = fmean(values)
        return {name: round(value, 6) for name, value in numbers.items()}

    def _warn(self, module: str, heads: list) -> None:
        for head in heads:
            if head.collapsed and (module, head.head) not in self._collapsed:
                self._collapsed.add((module, head.head))
                logger.warning(
                    f"attention of head {head.head} of {module} has collapsed: mean entropy {head.entropy:.3f} nats, "
                    f"mean largest weight {head.maximum:.3f} (entropy < {COLLAPSED_ENTROPY} or weight > "
                    f"{COLLAPSED_WEIGHT}); {_REMEDY}"
                )


def _unwrapped(model):
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = getattr(model, "module", None) or model._orig_mod
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _states(model) -> dict[str, list]:
    """Return {attention module: its groups of heads with parameters of their own} of converted and native models."""
    if hasattr(model, "attention_states"):
        return {name: list(state.groups) for name, state in model.attention_states.items()}
    modules = model.attention_modules() if hasattr(model, "attention_modules") else {}
    prefix = base_prefix(model)
    states = {name.removeprefix(prefix): getattr(module, "distattn", None) for name, module in modules.items()}
    return {name: list(state.groups) for name, state in states.items() if hasattr(state, "groups")}
