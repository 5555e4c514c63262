"""One stage of an adaptation: trainable parameters, learning rates, loss and annealing, for both drivers."""

import copy
import re
import warnings
from dataclasses import replace
from itertools import islice

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ..conversion.report_of_model import current_report
from ..core.configuration_distattn import MODEL_TYPE_PREFIX
from ..core.discovery import base_prefix
from ..data.batches import label_loss
from ..data.datasets import TaskData
from ..data.tasks import TASKS
from .annealing import Annealing, remove_softening
from .arguments import StageOptions, check_exact
from .objectives import STAGES, AttentionTransfer, Distillation

# Names of the query and key projections in transformers' attention modules; fused ones also compute value.
_QUERY_KEY = re.compile(
    r"(q|k|query|key|q_proj|k_proj|q_lin|k_lin|q_norm|k_norm|query_proj|key_proj|q_layernorm|k_layernorm|to_q|to_k|c_attn"
    r"|q_attn|qkv|qkv_proj|Wqkv|in_proj|query_key_value|query_ln|key_ln)"
)


def group_of(name: str, student) -> str:
    """Return the group of a parameter of `student` by its name: "attention", "qk" or "rest"."""
    dotted = f".{name}"
    if ".distattn." in dotted:
        return "attention"
    if "lora_" in name:
        return "rest"
    prefix = base_prefix(student)
    for module in student.attention_states:
        for start in (f".{prefix}{module}.", f".{module}."):
            if dotted.startswith(start):
                return "qk" if _QUERY_KEY.fullmatch(dotted[len(start) :].split(".")[0]) else "rest"
    return "rest"


def set_trainable(student, train: str, task: str) -> None:
    """Make exactly the parameters of `train` require gradients.

    Raises `ValueError` where "attention+qk" finds no query or key projection, or nothing is left to train.
    """
    groups = {name: group_of(name, student) for name, _ in student.named_parameters()}
    trained_groups = {"attention": {"attention"}, "attention+qk": {"attention", "qk"}, "lora": {"attention"}}.get(train)
    if train == "attention+qk" and "qk" not in groups.values():
        example = next(iter(student.attention_states))
        children = sorted({n.split(".")[0] for n, _ in dict(student.named_modules())[example].named_children()})
        raise ValueError(f"train='attention+qk': no query or key projection known by name; {example!r} has {children}")
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(trained_groups is None or groups[name] in trained_groups)
        if task == "embedding" and re.search(r"(^|\.)pooler\.", name):
            # The loss is on token embeddings, so the pooler would never get a gradient, which DDP treats as an error.
            parameter.requires_grad_(False)


def check_pair(teacher, student) -> None:
    """Raise `ValueError` unless `student` is `teacher` with other attention: same class, same parameters.

    Names the first parameter or the config field that differs.
    """
    base = getattr(student, "base_class", None)
    if base is None:
        raise ValueError(f"student must be a converted model, got {type(student).__name__}")
    family = teacher.config.model_type.removeprefix(MODEL_TYPE_PREFIX)
    if base.config_class.model_type != family:
        raise ValueError(
            f"teacher and student are of different families: {type(teacher).__name__} (model_type {family!r}) and "
            f"{type(student).__name__} (made from {base.config_class.model_type!r})"
        )
    if not isinstance(teacher, base):
        raise ValueError(f"teacher must be a {base.__name__}, as the student was, got {type(teacher).__name__}")
    student_shapes = {n: tuple(p.shape) for n, p in student.named_parameters() if ".distattn." not in f".{n}"}
    for name, parameter in teacher.named_parameters():
        if student_shapes.pop(name, None) != tuple(parameter.shape):
            shape = dict(student.named_parameters()).get(name)
            raise ValueError(
                f"teacher and student differ in size: {name!r} is {tuple(parameter.shape)} in the teacher and "
                f"{None if shape is None else tuple(shape.shape)} in the student"
            )
    if student_shapes:
        raise ValueError(f"teacher and student differ in size: the teacher has no {next(iter(student_shapes))!r}")


def frozen_copy(student, teacher):
    """Return a copy of `student` with the weights of `teacher`, frozen: the reference model of attention transfer.

    Raises `ValueError` for a teacher whose parameters are not the student's.
    """
    frozen = copy.deepcopy(student).requires_grad_(False).eval()
    missing, unexpected = frozen.load_state_dict(teacher.state_dict(), strict=False)
    missing = [name for name in missing if ".distattn." not in f".{name}"]
    if mismatched := [*missing, *unexpected]:
        raise ValueError(f"teacher and student differ in {mismatched[0]!r} ({len(mismatched)} parameters)")
    return frozen


class Stage:
    """One stage of the adaptation of `student`: `loss`, `parameter_groups`, `annealing`, and `finish` at the end.

    Args:
        name: "transfer", "distillation" or "task".
        student: a converted model (any model, in stage "task").
        teacher: the model it was converted from; gets frozen. Needed by distillation, and by transfer that trains query
            and key projections.
        task: one of `TASKS`.
        recompute: as in `AttentionTransfer`, where gradient checkpointing would save no memory.

    `model` is the one to train: the student, or a PeftModel around it.
    """

    def __init__(self, name: str, student, teacher, task: str, options: StageOptions, *, recompute: bool = False):
        if name not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {name!r}")
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        if name == "task" and task == "embedding":
            raise ValueError("stage 'task' needs a head with a loss, which an encoder has not; use distillation")
        self.name, self.student, self.task, self.options = name, student, task, options
        self.converted = hasattr(student, "attention_states")
        self.trains = options.trains(name) if self.converted else "all"
        set_trainable(student, self.trains, task) if self.converted else student.requires_grad_(True)
        anneals = options.anneals and self.converted
        self.annealing = Annealing(student, options.annealing) if anneals else None
        self.model = self._with_adapters() if self.trains == "lora" else student
        self.parameter_groups(self.model, 0.0, 0.0, ())  # raises where none is left to train
        self.objective = None
        if teacher is not None and name != "task":
            teacher.requires_grad_(False).eval()
        if name == "transfer":
            frozen = frozen_copy(student, teacher) if self.trains == "attention+qk" else None
            self.objective = AttentionTransfer(student, frozen, recompute=recompute)
        elif name == "distillation":
            self.objective = Distillation(
                teacher,
                task,
                temperature=options.temperature,
                hidden_weight=options.hidden_weight,
                task_weight=options.task_weight,
                dropout=options.dropout,
            )

    def _with_adapters(self):
        from peft import LoraConfig, get_peft_model

        options = self.options
        config = LoraConfig(r=options.lora_r, lora_alpha=options.lora_alpha, target_modules=options.lora_targets)
        attention_parameters = [p for n, p in self.student.named_parameters() if p.requires_grad]
        model = get_peft_model(self.student, config)
        # peft freezes all but the adapters.
        for parameter in attention_parameters:
            parameter.requires_grad_(True)
        return model

    @property
    def has_output(self) -> bool:
        """Whether `loss` also returns predictions for labels."""
        return self.name != "transfer" and self.task != "embedding"

    @property
    def counts_items(self) -> bool:
        """Whether the loss is a mean over labels, so that a step must count those of all its micro-batches."""
        config = self.student.config
        if self.task == "sequence-classification" and config.num_labels == 1:
            return False
        return self.has_output and config.problem_type in (None, "single_label_classification")

    def loss(self, model: nn.Module, inputs: dict, num_items=None) -> tuple[torch.Tensor, object]:
        """Return (loss, model output or None) of one batch; `model` is `self.model` or its wrapper."""
        if self.name == "transfer":
            return self.objective(model, inputs), None
        if self.name == "distillation":
            return self.objective(model, inputs, num_items)
        if num_items is None or not self.counts_items:
            output = model(**inputs)
            return output.loss, output
        if TASKS[self.task].shifted:
            output = model(**inputs, num_items_in_batch=num_items)
            return output.loss, output
        # These models accept num_items_in_batch but ignore it, and return the mean over their own micro-batch.
        output = model(**inputs)
        return label_loss(output.logits, inputs["labels"], num_items), output

    def place(self, device) -> None:
        """Move the frozen teacher to the student's device."""
        teacher = getattr(self.objective, "teacher", None)
        if teacher is not None:
            teacher.to(device)

    def prepare(self, data: TaskData, size: int, device, count: int = 4) -> None:
        """Prepare annealing on the first `count` batches of `size` rows, the same in every run.

        A data loader would give other rows, and advance the generator that shuffles the training rows.
        """
        if self.annealing is not None and self.annealing.needs_batches:
            rows = list(islice(data.train, count * size))
            batches = [data.collator(rows[first_row : first_row + size]) for first_row in range(0, len(rows), size)]
            self.student.to(device)
            self.annealing.prepare([{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches])

    def parameter_groups(self, model: nn.Module, learning_rate: float, weight_decay: float, decayed) -> list[dict]:
        """Return optimizer groups {"name", "params", "lr", "weight_decay"} of the trainable parameters of `model`.

        decayed: names of the parameters that get weight decay. Attention parameters never do: it would pull λ towards
        1, where most metrics are uniform, and maps towards 0.
        """
        groups: dict[tuple[str, bool], list] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                kind = group_of(_plain(name), self.student) if self.converted else "rest"
                # In transfer the value part of fused projections gets no gradient and must not change.
                decays = kind != "attention" and self.name != "transfer" and name in decayed
                groups.setdefault((kind, decays), []).append(parameter)
        if not groups:
            raise ValueError(f"stage {self.name!r}, train={self.trains!r}: no parameter is left to train")
        return [
            {
                "name": kind if decays or kind == "attention" else f"{kind} (no decay)",
                "params": parameters,
                "lr": float(self.options.learning_rates.get(kind, learning_rate)),
                "weight_decay": weight_decay if decays else 0.0,
            }
            for (kind, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
        ]

    def make_optimizer(self, arguments: TrainingArguments):
        """Return the optimizer that `Trainer` would make; weight decay leaves λ, α and maps alone."""
        decayed = set(Trainer.get_decay_parameter_names(None, self.model))
        groups = self.parameter_groups(self.model, arguments.learning_rate, arguments.weight_decay, decayed)
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, self.model)
        return optimizer_class(groups, **options)

    def trained_parameters(self) -> int:
        """Return the number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def finish(self):
        """Return the trained student: adapters merged, all parameters trainable again, conversion report updated."""
        student = self.model.merge_and_unload() if self.trains == "lora" else self.student
        if self.converted and student.conversion_report:
            student.conversion_report = current_report(student)
        return student.requires_grad_(True).eval()


def check_stages(student, teacher, task: str, options: dict[str, StageOptions], max_length: int) -> None:
    """Raise the `ValueError` that a stage of `options`, {stage: its options}, would raise, before any of them trains.

    `student` is the converted model that the first stage would get. It cannot be used afterwards: it is moved to the
    meta device. max_length: largest number of tokens in a row of data.
    """
    check_pair(teacher, student)
    student = student.to("meta")
    groups = [group for state in student.attention_states.values() for group in state.groups]
    for name, stage_options in options.items():
        check_exact([group.spec for group in groups], name, max_length)
        with warnings.catch_warnings():
            # A warning that copying to the meta device does nothing.
            warnings.simplefilter("ignore")
            # A copy, since adapters are inserted in place.
            Stage(name, copy.deepcopy(student), teacher, task, stage_options)
        target = stage_options.annealing
        for group in groups:
            if group.spec.mechanism == "nystrom":
                annealed = {"window_size": target.window_size, "num_landmarks": target.num_landmarks}
                group.spec = replace(group.spec, **{k: v for k, v in annealed.items() if v is not None})
            if target.softening == 0 and group.fits_softening:
                remove_softening(group)


def _plain(name: str) -> str:
    """Return a parameter's name without the parts that wrappers (DDP, PEFT, compile) add."""
    for affix in ("module.", "_orig_mod.", "base_model.model."):
        name = name.removeprefix(affix)
    return name.replace(".base_layer.", ".")


@torch.no_grad()
def attention_means(student) -> dict[str, float]:
    """Return means over the heads of each metric: {"lambda/l2", "alpha/l2", "softening/l2": ...}; empty if sharded."""
    values_by_name: dict[str, list] = {}
    for state in student.attention_states.values():
        for group in state.groups:
            if not group.reported_values():
                continue
            lam = group.lam()
            if isinstance(lam, torch.Tensor):
                values_by_name.setdefault(f"lambda/{group.metric}", []).append(lam.float().flatten())
            if group.transform != "none":
                values_by_name.setdefault(f"alpha/{group.metric}", []).append(group.log_alpha.float().exp().flatten())
            if group.fits_softening:
                values_by_name.setdefault(f"softening/{group.metric}", []).append(group.softening().float().flatten())
    return {name: float(torch.cat(values).mean()) for name, values in values_by_name.items()}
