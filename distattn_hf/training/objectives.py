"""The losses of the adaptation's stages: attention transfer, distillation, or the task's own loss.

Attention transfer follows LoLCATs (Zhang et al., 2024): each layer learns the teacher's attention outputs on the
teacher's own inputs. No gradient flows between layers, so no graph through the model is built.
"""

import inspect
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from ..conversion.observe import observed, teacher_attention
from ..core.attention import without_autocast
from ..core.inputs import ModuleCall
from ..core.interface import attend, attend_groups
from ..core.nystrom_heads import nystrom_forward
from ..core.parameters import DistanceAttentionState
from ..core.retrieval_heads import retrieval_forward
from ..data.batches import forward_inputs, label_loss, query_mask
from ..data.tasks import TASKS

STAGES = ("transfer", "distillation", "task")
# Rows of logits whose divergence is computed at once; the backward pass recomputes them.
_ROWS = 1024


def relative_error(student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
    """Return Σ_n ‖student - teacher‖² / Σ_n ‖teacher‖² over a sequence's valid queries n, mean over sequences: (H,).

    student and teacher (B, H, N, d_v), valid (B, N) or None. One ratio per sequence, so that the error of a batch is
    the mean over its parts. Sequences without a valid query do not count.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    difference, norm = ((student.to(dtype) - teacher.to(dtype)).square().sum(-1), teacher.to(dtype).square().sum(-1))
    if valid is None:
        return (difference.sum(-1) / norm.sum(-1).clamp_min(1e-12)).mean(0)
    valid = valid.to(dtype)[:, None]
    ratio = (difference * valid).sum(-1) / (norm * valid).sum(-1).clamp_min(1e-12)
    return ratio.sum(0) / (valid.sum(-1) > 0).sum().clamp_min(1)


def student_attention(
    state: DistanceAttentionState, query: Tensor, key: Tensor, value: Tensor, call: ModuleCall
) -> Tensor:
    """Compute a converted module's own attention for one observed call, without dropout: (B, H, N, d_v)."""
    call = replace(call, dropout_p=0.0, backend=None, return_weights=False)
    if state.is_nystrom:
        observer = state.observer
        # An observed module takes no exact shortcut. It must not take one in the backward pass either, where
        # `recomputed` runs this again without an observer.
        state.observer = observer or student_attention
        try:
            with without_autocast(query.device.type):
                return nystrom_forward(state, query, key, value, call, attend)[0]
        finally:
            state.observer = observer
    if state.is_retrieval:
        return retrieval_forward(state, query, key, value, call, attend)[0]
    return attend_groups(state, query, key, value, call)[0]


class AttentionTransfer:
    """The loss of attention transfer: `relative_error` of each converted head, mean over heads, then over layers.

    Args:
        student: a converted model.
        teacher: None where only the attention submodules train: the student's own query, key and value are then the
            teacher's. Where query and key projections train, a frozen converted model with the teacher's weights
            (`frozen_copy`), which runs first on each batch.
        recompute: recompute each layer's attention in the backward pass instead of storing its intermediates.

    Every layer gets the teacher's attention output of the layer below, detached: gradients reach a layer's own
    attention parameters and, where they train, its query and key projections. A module that several layers share counts
    once per use.

    Raises:
        ValueError: a student without converted modules, or, without a teacher, one whose other parameters train.
    """

    def __init__(self, student, teacher=None, *, recompute: bool = False):
        self.student, self.teacher, self.recompute = student, teacher, recompute
        self.names = {state: name for name, state in getattr(student, "attention_states", {}).items()}
        if not self.names:
            raise ValueError(f"attention transfer needs a converted model, got {type(student).__name__}")
        if teacher is None and student.config.distattn.get("queries_scaled"):
            raise ValueError(
                "attention transfer takes a student's own queries and keys for the teacher's, but this one has α in "
                "its query projections (fold_alpha): its query projections are not the teacher's; set train: "
                "attention+qk"
            )
        trainable = [n for n, p in student.named_parameters() if p.requires_grad and ".distattn." not in f".{n}"]
        if teacher is None and trainable:
            raise ValueError(
                f"attention transfer without a frozen teacher trains attention parameters only, but {trainable[0]!r} "
                f"requires gradients ({len(trainable)} such parameters)"
            )

    def __call__(self, model: nn.Module, inputs: dict) -> Tensor:
        """Return the loss of one batch. `model`: the student or its wrapper (DDP); dropout off, as in the teacher."""
        model.eval()
        arguments = self._arguments(inputs)
        targets = None if self.teacher is None else self._record(arguments)
        losses: list[Tensor] = []
        with observed(self.student, self._observer(inputs, targets, losses)), self._in_output(losses):
            output = model(**arguments)
        return output["transfer_loss"]

    def _arguments(self, inputs: dict) -> dict:
        accepted = inspect.signature(self.student.forward).parameters
        options = {"use_cache": False, "logits_to_keep": 1, "return_dict": True}
        return {**forward_inputs(self.student, inputs), **{k: v for k, v in options.items() if k in accepted}}

    def _observer(self, inputs, targets, losses):
        encoder_decoder = self.student.config.is_encoder_decoder

        def observe(state: DistanceAttentionState, query: Tensor, key: Tensor, value: Tensor, call: ModuleCall):
            value = value.detach()
            if targets is None:
                query, key = query.detach(), key.detach()
                with torch.no_grad():
                    target = teacher_attention(query, key, value, call)
            else:
                target = targets.pop(0)
            if not state.groups:  # every head of the module was left exact
                return target.to(value.dtype)
            valid = query_mask(self.names[state], state.is_cross, inputs, encoder_decoder)
            if valid is not None and tuple(valid.shape) != (query.shape[0], query.shape[2]):
                valid = None
            if self.recompute and torch.is_grad_enabled():
                loss = recomputed(_layer_loss, state, query, key, value, call, target, valid, use_reentrant=False)
            else:
                loss = _layer_loss(state, query, key, value, call, target, valid)
            losses.append(loss)
            return target.to(value.dtype)

        return observe

    @torch.no_grad()
    def _record(self, arguments: dict) -> list[Tensor]:
        """Return the teacher's attention outputs on this batch, in the order in which the modules run."""
        outputs: list[Tensor] = []

        def record(state: DistanceAttentionState, query: Tensor, key: Tensor, value: Tensor, call: ModuleCall):
            outputs.append(teacher_attention(query, key, value, call))
            return outputs[-1]

        with observed(self.teacher, record):
            self.teacher(**arguments)
        return outputs

    @contextmanager
    def _in_output(self, losses: list[Tensor]):
        """Let the student return the loss as its output: DDP looks there for the parameters that were used."""

        def add(module: nn.Module, arguments, output):
            if not losses:
                raise ValueError(f"attention transfer: the batch never reached a converted module of {type(module)}")
            return {"transfer_loss": torch.stack(losses).mean()}

        handle = self.student.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()


def _layer_loss(
    state: DistanceAttentionState, query: Tensor, key: Tensor, value: Tensor, call: ModuleCall, target, valid
) -> Tensor:
    errors = relative_error(student_attention(state, query, key, value, call), target, valid)
    heads = [head for heads, group in state.parts() if group is not None for head in heads]
    return errors.mean() if len(heads) == len(errors) else errors[heads].mean()


def logits_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T²·KL(softmax(teacher / T) ‖ softmax(student / T)) in nats, summed over rows; both (rows, classes)."""
    total = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
    for pair in zip(student.split(_ROWS), teacher.split(_ROWS), strict=True):
        if torch.is_grad_enabled() and len(student) > _ROWS:
            total = total + recomputed(_divergence, *pair, temperature, use_reentrant=False)
        else:
            total = total + _divergence(*pair, temperature)
    return temperature**2 * total


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = ((logits.to(dtype) / temperature).log_softmax(-1) for logits in (student, teacher))
    return F.kl_div(student, teacher, log_target=True, reduction="sum")


class Distillation:
    """The loss of distillation: the teacher's predictions, its hidden states, and the labels.

    (1 - task_weight)·T²·KL(teacher ‖ student) + task_weight·CE(student, labels)
    + hidden_weight·mean over layers of MSE(student's, teacher's hidden states)

    KL and CE are means over the positions that have a label; without labels over all that are not padding, in seq2seq
    over all. Task
    "embedding" has neither; its loss is 1 - cosine + MSE of the last hidden states, mean over tokens that are not
    padding. `dropout` False puts the student in eval mode, like the teacher (except under gradient checkpointing, which
    only works in training mode, so dropout stays on).

    Raises:
        ValueError: for an option out of range, or a head without a distribution (regression).
    """

    def __init__(
        self,
        teacher,
        task: str,
        *,
        temperature: float = 1.0,
        hidden_weight: float = 0.0,
        task_weight: float = 0.0,
        dropout: bool = False,
    ):
        for name, value, is_valid, allowed in (
            ("temperature", temperature, temperature > 0, "> 0"),
            ("hidden_weight", hidden_weight, hidden_weight >= 0, ">= 0"),
            ("task_weight", task_weight, 0 <= task_weight <= 1, "in [0, 1]"),
            ("task", task, task in TASKS, f"one of {', '.join(TASKS)}"),
        ):
            if not is_valid:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        if task == "sequence-classification" and teacher.config.problem_type in (
            "regression",
            "multi_label_classification",
        ):
            raise ValueError(f"distillation needs one label a row, got problem_type={teacher.config.problem_type!r}")
        if task == "embedding" and task_weight:
            raise ValueError(f"task_weight must be 0 for an encoder without a head, got {task_weight!r}")
        self.teacher, self.task, self.dropout = teacher, task, dropout
        self.temperature, self.hidden_weight, self.task_weight = temperature, hidden_weight, task_weight

    def __call__(self, model: nn.Module, inputs: dict, num_items: Tensor | None = None) -> tuple[Tensor, object]:
        """Return (loss, the student's output). num_items: positions with a label in the whole batch that `inputs` is
        part of; None: those in `inputs`."""
        arguments = forward_inputs(self.teacher, inputs)
        arguments["output_hidden_states"] = bool(self.hidden_weight)
        if "use_cache" in inspect.signature(self.teacher.forward).parameters:
            arguments["use_cache"] = False
        if not self.dropout and not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            model.eval()
        with torch.no_grad():
            target = self.teacher(**arguments)
        output = model(**arguments)
        if self.task == "embedding":
            loss = encoder_distance(output.last_hidden_state, target.last_hidden_state, inputs.get("attention_mask"))
        else:
            loss = self._on_logits(output.logits, target.logits, inputs, num_items)
        if self.hidden_weight:
            loss = loss + self.hidden_weight * self._hidden(output, target, inputs)
        return loss, output

    def _on_logits(self, student: Tensor, teacher: Tensor, inputs: dict, num_items: Tensor | None) -> Tensor:
        labels = inputs.get("labels")
        if labels is None:
            mask = inputs.get("attention_mask") if self.task != "sequence-classification" else None
            keep = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
            keep = keep if mask is None else mask.bool()
            if self.task == "seq2seq":
                keep = torch.ones_like(student[..., 0], dtype=torch.bool)
            labels = torch.where(keep, 0, -100)
        if self.task == "causal-lm":
            student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
        keep = labels != -100
        count = keep.sum().clamp_min(1) if num_items is None else num_items
        student, teacher, labels = student[keep], teacher[keep], labels[keep]
        loss = student.sum() * 0.0
        if self.task_weight < 1:
            loss = loss + (1 - self.task_weight) * logits_divergence(student, teacher, self.temperature) / count
        if self.task_weight:
            if inputs.get("labels") is None:
                raise ValueError(f"task_weight={self.task_weight} needs labels in the batch, got {sorted(inputs)}")
            loss = loss + self.task_weight * label_loss(student, labels, count)
        return loss

    def _hidden(self, output, target, inputs) -> Tensor:
        names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
        total, layers = 0.0, 0
        for name in names:
            student_states, teacher_states = getattr(output, name, None), getattr(target, name, None)
            if student_states is None:
                continue
            encoder_decoder = self.teacher.config.is_encoder_decoder
            mask = query_mask("decoder" if name.startswith("decoder") else "", False, inputs, encoder_decoder)
            # The first hidden state is the embedding, before any attention.
            for student_state, teacher_state in zip(student_states[1:], teacher_states[1:], strict=True):
                total, layers = total + masked_error(student_state, teacher_state, mask), layers + 1
        if not layers:
            raise ValueError(f"hidden_weight={self.hidden_weight} needs a model that returns hidden states")
        return total / layers


def masked_error(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean squared difference of (B, N, width) over width and over the tokens that `mask` (B, N) keeps."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    error = (student.to(dtype) - teacher.to(dtype)).square().mean(-1)
    return error.mean() if mask is None else (error * mask).sum() / mask.sum().clamp_min(1)


def encoder_distance(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return 1 - cosine + mean squared difference of the last hidden states (B, N, width): the mean over the tokens of
    a sequence that are not padding, then over sequences."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(dtype), teacher.to(dtype)
    distance = 1 - F.cosine_similarity(student, teacher, dim=-1) + (student - teacher).square().mean(-1)
    mask = torch.ones_like(distance) if mask is None else mask.to(dtype)
    return ((distance * mask).sum(-1) / mask.sum(-1).clamp_min(1)).mean()
