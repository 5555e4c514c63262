"""Log what the attention does while a `Trainer` trains."""

import logging
from inspect import signature
from statistics import fmean

import torch
from transformers import Trainer, TrainerCallback

from ..conversion.observe import in_eval_mode
from ..core.configuration_native import check_integer
from ..core.discovery import base_prefix
from ..functional.row_statistics import COLLAPSED_ENTROPY, COLLAPSED_WEIGHT
from .statistics import measure

logger = logging.getLogger(__name__)

_INPUTS = {"input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features"}
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
        rows, tokens: of the batch, at most; all of them where it holds more than rows of tokens (4-D masks, pictures).

    `AttentionLoggingCallback(every=100).add_to(trainer)` puts the numbers into everything that the trainer logs to,
    TensorBoard included. Given as `callbacks=[...]` it comes after those and reaches the trainer's log history and
    console alone, which it says.

    Raises:
        ValueError: for numbers below 1; in training, for a model without attention weights.
    """

    def __init__(self, every: int = 100, rows: int = 4, tokens: int = 512):
        for name, value in (("every", every), ("rows", rows), ("tokens", tokens)):
            check_integer(name, value)
        self.every, self.rows, self.tokens = every, rows, tokens
        self.trainer: Trainer | None = None
        self._batch: dict | None = None
        self._handle = None
        self._collapsed: set[tuple[str, int]] = set()
        self._pending: dict[str, float] = {}
        self._said = False

    def add_to(self, trainer: Trainer) -> "AttentionLoggingCallback":
        """Add this callback to a trainer, and log through it; return the callback."""
        self.trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Say what is not reached."""
        self._forget()  # of a run that ended within a step
        reached = [name for name in args.report_to or [] if name != "none"]
        if self.trainer is None and reached:
            logger.warning(
                f"AttentionLoggingCallback logs to the log history and the console; .add_to(trainer) adds "
                f"{', '.join(reached)}"
            )

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Keep the first batch of a step that is looked at."""
        if (state.global_step + 1) % self.every == 0:
            self._forget()
            self._handle = model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _forget(self):
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._batch = None

    def _keep(self, module, arguments, keywords):
        if self._batch is None:
            inner = _unwrapped(module)
            named = dict(zip(signature(inner.forward).parameters, arguments, strict=False)) | keywords
            tensors = {name: t for name, t in named.items() if isinstance(t, torch.Tensor) and t.dim()}
            if not (inner.config.is_encoder_decoder and "decoder_input_ids" not in tensors):
                tensors.pop("labels", None)  # else what the decoder reads is made of them
            self._batch = _cut(tensors, self.rows, self.tokens)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Measure and log."""
        if self._handle is None:
            return
        batch = self._batch
        self._forget()
        if not batch:
            if not self._said:
                logger.warning("AttentionLoggingCallback logs nothing: the step did not call the model with tensors")
            self._said = True
            return
        # By every process: a model that is cut up over them (FSDP) runs on all or none.
        numbers = self._measure(_unwrapped(model), batch, state.is_world_process_zero)
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

    def _measure(self, model, batch: dict, warn: bool) -> dict[str, float]:
        with in_eval_mode(model), torch.no_grad():
            statistics = measure(model, [batch])
        numbers = {}
        for module in statistics.modules:
            heads = statistics.of(module)
            for name in ("entropy", "maximum", "collapsed"):
                numbers[f"attention/{module}/{name}"] = fmean(float(getattr(head, name)) for head in heads)
            if warn:
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


def _cut(batch: dict, rows: int, tokens: int) -> dict:
    """Return the first rows of a batch and so many tokens of each, at the end where padding is on the left.

    Tokens are cut where all tensors are (B,) or (B, N), rows where all are (B, ...) or (1, ...): what else there is
    (4-D masks, embeddings, pictures, sound, packed sequences) belongs to whole texts or batches.
    """
    size = max(len(tensor) for name, tensor in batch.items() if name in _INPUTS) if _INPUTS & batch.keys() else None
    if any(len(tensor) not in (1, size) for tensor in batch.values()):
        return batch
    if "input_values" not in batch and all(tensor.dim() <= 2 for tensor in batch.values()):
        mask = batch.get("attention_mask")
        left = mask is not None and mask.dim() == 2 and not bool(mask[:, 0].all())
        kept = slice(-tokens, None) if left else slice(tokens)
        batch = {name: tensor[:, kept] if tensor.dim() == 2 else tensor for name, tensor in batch.items()}
    return {name: tensor if len(tensor) == 1 else tensor[:rows] for name, tensor in batch.items()}


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
