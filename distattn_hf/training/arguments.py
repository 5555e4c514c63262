"""The YAML config of an adaptation: model, stages, data, and transformers' `TrainingArguments`."""

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..conversion.calibrate import fitted_defaults
from ..conversion.convert import INITS
from ..core.attention_spec import AttentionSpec
from ..data.config import (
    check_numbers,
    field_names,
    is_integer,
    is_number,
    parse_kinds,
    parse_specs,
    read_mapping,
    read_specs,
    refuse_unknown,
)
from ..data.datasets import DataArguments
from ..data.tasks import TASKS
from .annealing import AnnealingOptions
from .objectives import STAGES

TRAIN = ("attention", "attention+qk", "all", "lora")
GROUPS = ("attention", "qk", "rest")
CONTROLS = ("plain", "window_only", "no_attention")
FINETUNED = "teacher_finetuned"


@dataclass
class ModelArguments:
    """Which model, and how it is converted before it is adapted.

    Args:
        teacher: Hub name, folder or embedded checkpoint ("minilm", "smollm2-135m", "iglm").
        task: one of `TASKS`; None: that of the teacher's head.
        student: folder or Hub name of a converted checkpoint; None: the teacher is converted as `spec` says.
        spec: fields of an `AttentionSpec`, a metric's name, a list of these, or a YAML file with such fields.
        init: "calibrated", "exact" or "plain".
        fold_alpha: move α into the query projections after the conversion (`distattn_hf.fold_alpha`).
        calibration_data: text for the fit, as `distattn convert --calibration`; None: the training data.
        calibration_steps, calibration_tokens, calibration_length, max_error: of `CalibrationOptions`. Like all options
            of the conversion, they have no effect on a given student.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    teacher: str | None = None
    task: str | None = None
    student: str | None = None
    spec: Any = None
    init: str = "calibrated"
    fold_alpha: bool = False
    calibration_data: str | None = None
    calibration_steps: int | None = None
    calibration_tokens: int | None = None
    calibration_length: int | None = None
    max_error: float | None = None

    def __post_init__(self):
        if not self.teacher or not isinstance(self.teacher, str):
            raise ValueError(f"teacher must be a Hub name, a folder or an embedded checkpoint, got {self.teacher!r}")
        if self.task is not None and self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {self.init!r}")
        if (self.student is None) == (self.spec is None):
            raise ValueError(
                f"give either spec (the teacher is converted) or student (a converted checkpoint), got "
                f"spec={self.spec!r}, student={self.student!r}"
            )
        if self.fold_alpha and self.spec is None:
            raise ValueError("fold_alpha=True needs spec: a given student is folded by distattn_hf.fold_alpha")
        self.specs = _specs(self.spec)
        if self.init != "calibrated":
            for name in ("calibration_data", "calibration_steps", "calibration_tokens", "calibration_length"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(f"{name}={value!r} is for init='calibrated'; init={self.init!r} fits nothing")


def _specs(spec) -> list[AttentionSpec] | None:
    if spec is None:
        return None
    is_file = isinstance(spec, str) and ("." in spec or "/" in spec or Path(spec).is_file())
    specs = read_specs(spec) if is_file else parse_specs(spec)
    # Nyström attention trains and is scored at every length, unless the file sets exact_below.
    not_set = [parsed.mechanism == "nystrom" and parsed.exact_below is None for parsed in specs]
    return [
        replace(parsed, exact_below=0) if use_default else parsed
        for parsed, use_default in zip(specs, not_set, strict=True)
    ]


@dataclass
class StageOptions:
    """How one stage trains.

    Args:
        train: "attention" (λ, α, shift, maps, landmarks), "attention+qk" (also the query and key projections), "all" or
            "lora" (attention and adapters). None: "attention" in attention transfer, "all" in the other stages.
        learning_rates: {"attention", "qk", "rest": rate}; a missing group takes TrainingArguments.learning_rate.
            Adapters belong to "rest".
        temperature, hidden_weight, task_weight, dropout: of `Distillation`; > 0, >= 0, in [0, 1], True or False.
        anneal: fields of `AnnealingOptions`.
        lora_r, lora_alpha, lora_targets: of peft's LoraConfig; targets are names, or a pattern for whole names; None:
            peft's defaults for the model.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    train: str | None = None
    learning_rates: dict = field(default_factory=dict)
    temperature: float = 1.0
    hidden_weight: float = 0.0
    task_weight: float = 0.0
    dropout: bool = False
    anneal: dict = field(default_factory=dict)
    lora_r: int = 8
    lora_alpha: int = 16
    lora_targets: list[str] | str | None = None

    def __post_init__(self):
        if self.train is not None and self.train not in TRAIN:
            raise ValueError(f"train must be one of {', '.join(TRAIN)} or None, got {self.train!r}")
        for name in ("learning_rates", "anneal"):
            value = getattr(self, name)
            if value is None:
                setattr(self, name, {})
            elif not isinstance(value, dict):
                raise ValueError(f"{name} must be a mapping, got {value!r}")
        refuse_unknown(self.learning_rates, GROUPS, "learning_rates")
        for name, rate in self.learning_rates.items():
            if not is_number(rate) or not rate >= 0:
                raise ValueError(
                    f"learning_rates.{name} must be a number >= 0 (in YAML 1.0e-3, not 1e-3), got {rate!r}"
                )
        refuse_unknown(self.anneal, [f.name for f in fields(AnnealingOptions)], "anneal")
        self.annealing = AnnealingOptions(**self.anneal)
        self.anneals = self.annealing.active
        for name, allowed, is_valid in (
            ("temperature", "a finite number > 0", lambda number: number > 0),
            ("hidden_weight", "a finite number >= 0", lambda number: number >= 0),
            ("task_weight", "a number in [0, 1]", lambda number: 0 <= number <= 1),
        ):
            value = getattr(self, name)
            if not is_number(value) or not math.isfinite(value) or not is_valid(value):
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        if not isinstance(self.dropout, bool):
            raise ValueError(f"dropout must be True or False, got {self.dropout!r}")
        for name in ("lora_r", "lora_alpha"):
            value = getattr(self, name)
            if not is_integer(value, 1):
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        targets = [self.lora_targets] if isinstance(self.lora_targets, str) else self.lora_targets
        if targets is not None and (
            not isinstance(targets, list) or not targets or not all(t and isinstance(t, str) for t in targets)
        ):
            raise ValueError(
                f"lora_targets must be a list of module names, a pattern or None, got {self.lora_targets!r}"
            )

    def trains(self, stage: str) -> str:
        """Return what trains in `stage`; raises `ValueError` for what gets no gradient in attention transfer."""
        if self.train is None:
            return "attention" if stage == "transfer" else "all"
        if stage == "transfer" and self.train in ("all", "lora"):
            raise ValueError(
                f"train={self.train!r} does not go with stage 'transfer', which has no gradients beyond 'attention' or "
                "'attention+qk'; set stage_options.transfer.train"
            )
        return self.train


@dataclass
class AdaptationArguments(StageOptions):
    """Which stages run, with which options, and which models the scorecard compares.

    Args:
        stages: some of "transfer", "distillation", "task", in the order in which they run.
        stage_options: {stage: {field: value}}: fields of `StageOptions` or `TrainingArguments` for one stage alone.
        teacher_finetuned: also fine-tune the teacher on the same data for as many steps as all stages together (or as
            stage_options.teacher_finetuned sets), and compare with it.
        controls: some of "plain" (swapped, no fit), "window_only" (of Nyström and retrieval sinks and window alone)
            and "no_attention".
        pair_columns: [query, passage], two columns of the evaluation data, for retrieval; encoders only.
        max_pairs: how many of the last pairs to use.
        passkey_length: each row of the scorecard also says in how many of ten texts of so many tokens, made of the
            evaluation data, the model finds a number (see `retrieval_tasks.passkey`); causal language models only.

    In addition, the fields of `StageOptions` apply to all stages.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    stages: list[str] = field(default_factory=lambda: ["transfer"])
    stage_options: dict = field(default_factory=dict)
    teacher_finetuned: bool = False
    controls: list[str] = field(default_factory=list)
    pair_columns: list[str] | None = None
    max_pairs: int = 300
    passkey_length: int | None = None

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (("stages", STAGES), ("controls", CONTROLS)):
            values = getattr(self, name)
            if not isinstance(values, list) or len(set(map(str, values))) != len(values):
                raise ValueError(f"{name} must be a list without repetition, got {values!r}")
            for value in values:
                if value not in allowed:
                    raise ValueError(f"{name} must be some of {', '.join(allowed)}, got {value!r}")
        if not self.stages:
            raise ValueError(f"stages must name at least one of {', '.join(STAGES)}, got an empty list")
        if not isinstance(self.stage_options, dict):
            raise ValueError(f"stage_options must be a mapping, got {self.stage_options!r}")
        refuse_unknown(self.stage_options, [*STAGES, FINETUNED], "stage_options")
        option_names = field_names(StageOptions) | field_names(TrainingArguments) - {"output_dir"}
        for stage, options in self.stage_options.items():
            if not isinstance(options, dict):
                raise ValueError(f"stage_options.{stage} must be a mapping, got {options!r}")
            refuse_unknown(options, option_names, f"stage_options.{stage}")
            check_numbers(options, f"stage_options.{stage}.")
        if self.pair_columns is not None and (not isinstance(self.pair_columns, list) or len(self.pair_columns) != 2):
            raise ValueError(f"pair_columns must be [query column, passage column], got {self.pair_columns!r}")
        if self.passkey_length is not None and not is_integer(self.passkey_length, 2):
            raise ValueError(f"passkey_length must be None or an integer >= 2, got {self.passkey_length!r}")

    def options_for(self, stage: str) -> StageOptions:
        """Return the options of one stage: its own override the shared ones; learning_rates are merged."""
        shared = {entry.name: getattr(self, entry.name) for entry in fields(StageOptions)}
        stage_values = {key: value for key, value in self.stage_options.get(stage, {}).items() if key in shared}
        if "learning_rates" in stage_values:
            stage_values["learning_rates"] = {**shared["learning_rates"], **stage_values["learning_rates"]}
        return StageOptions(**{**shared, **stage_values})


@dataclass
class AdaptationConfig:
    """All arguments of an adaptation; `values` holds them as the file and the command line gave them."""

    model: ModelArguments
    adaptation: AdaptationArguments
    data: DataArguments
    training: TrainingArguments
    values: dict

    def training_for(self, stage: str) -> TrainingArguments:
        """Return the `TrainingArguments` of one stage: its own override the shared ones; output in a subfolder."""
        names = field_names(TrainingArguments)
        shared = {key: value for key, value in self.values.items() if key in names}
        stage_values = {
            key: value for key, value in self.adaptation.stage_options.get(stage, {}).items() if key in names
        }
        # The scorecard needs the number of tokens, so they are counted unless the file says otherwise.
        arguments = {"include_num_input_tokens_seen": "non_padding", **shared, **stage_values}
        return TrainingArguments(**{**arguments, "output_dir": str(Path(self.training.output_dir) / stage)})


def read_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> AdaptationConfig:
    """Read the arguments from a YAML file, with `key=value` overrides (dots for nested keys: spec.metric=l1).

    Raises `ValueError` for a file that is absent or no YAML mapping, an unknown key (with the closest names), or a
    value that a field does not take.
    """
    return parse_config(path, overrides)


def parse_config(source: dict | str | Path, overrides: list[str] | tuple[str, ...] = ()) -> AdaptationConfig:
    """Read the arguments from a mapping or a file; raises as `read_config`."""
    values = source if isinstance(source, dict) else read_mapping(source, "config", overrides)
    if "model" in values and "teacher" not in values:
        raise ValueError("the config has a model and no teacher: it is for `distattn train`, not `distattn adapt`")
    kinds = (ModelArguments, AdaptationArguments, DataArguments, TrainingArguments)
    config = AdaptationConfig(*parse_kinds(values, kinds, ("teacher", "train_data", "output_dir")), values)
    _check(config)
    return config


def _check(config: AdaptationConfig) -> None:
    """Check combinations of fields before anything is loaded; raises `ValueError`."""
    adaptation, model = config.adaptation, config.model
    for stage in adaptation.stages:
        options = adaptation.options_for(stage)
        options.trains(stage)
        training = config.training_for(stage)
        if training.max_steps <= 0 and training.num_train_epochs <= 0:
            raise ValueError(f"stage {stage!r}: set max_steps or num_train_epochs")
        if config.data.streaming and training.max_steps <= 0:
            raise ValueError(
                f"stage {stage!r}: max_steps must be > 0 with streaming=True, whose data has no known length, got "
                f"{training.max_steps}"
            )
        if stage != "task" and training.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={training.label_smoothing_factor} is for stage 'task', not {stage!r}; set "
                "stage_options.task"
            )
        check_exact(model.specs or (), stage, config.data.max_length)
        if model.specs and all(s.mechanism != "nystrom" for s in model.specs):
            for name in ("window_size", "num_landmarks"):
                if getattr(options.annealing, name) is not None:
                    raise ValueError(f"anneal.{name} needs a spec with mechanism='nystrom'")
        fits = model.init == "calibrated" and any(fitted_defaults(s).softening == "fit" for s in model.specs or ())
        if options.annealing.softening is not None and model.specs and not fits:
            raise ValueError("anneal.softening needs a spec whose ε is fitted (init='calibrated', softening not 0)")
    if adaptation.teacher_finetuned:
        adaptation.options_for(FINETUNED)
    nystrom = [spec.mechanism == "nystrom" for spec in model.specs or ()]
    if "plain" in adaptation.controls and (not nystrom or any(nystrom)):
        raise ValueError("controls: 'plain' needs a spec with mechanism='distance' (landmarks cannot do without a fit)")
    reads_far = [spec.mechanism in ("nystrom", "retrieval") for spec in model.specs or ()]
    if "window_only" in adaptation.controls and reads_far and not any(reads_far):
        raise ValueError("controls: 'window_only' needs a spec with mechanism='nystrom' or 'retrieval'")
    if model.task == "embedding" and (adaptation.teacher_finetuned or "task" in adaptation.stages):
        raise ValueError("task 'embedding' has no loss of its own: leave out stage 'task' and teacher_finetuned")


def check_exact(specs, stage: str, max_length: int) -> None:
    """Raise `ValueError` where rows of max_length tokens never reach the landmarks of a Nyström spec of `specs`."""
    for spec in specs:
        if stage != "transfer" and spec.mechanism == "nystrom" and (spec.exact_below or 0) >= max_length:
            raise ValueError(
                f"stage {stage!r} would train no landmark: rows have at most max_length={max_length} tokens, and the "
                f"spec's exact_below={spec.exact_below} takes exact attention for all of them; set exact_below=0 while "
                "adapting, or a greater max_length"
            )


def refuse_others(config: AdaptationConfig, honoured: set[str], orders) -> None:
    """Raise `ValueError` for TrainingArguments outside `honoured` and row orders that a plain loop does not support."""
    defaults = {entry.name: entry.default for entry in fields(TrainingArguments)}
    if config.data.streaming:
        raise ValueError("streaming=True: this loop does not do that; `distattn adapt` does")
    stages = config.adaptation.stage_options
    for prefix, settings in (("", config.values), *((f"stage_options.{name}.", stages[name]) for name in stages)):
        for name, value in settings.items():
            if name == "train_sampling_strategy":
                if value not in orders:
                    raise ValueError(
                        f"{prefix}{name} must be one of {', '.join(orders)} in this loop, got {value!r}; `distattn "
                        "adapt` takes it"
                    )
            elif name in defaults and name not in honoured and value != defaults[name]:
                raise ValueError(f"{prefix}{name}={value!r}: this loop does not do that; `distattn adapt` does")
            if prefix and name in ("bf16", "fp16", "use_cpu") and value != getattr(config.training, name):
                raise ValueError(f"{prefix}{name}={value!r}: all stages of this loop share it; set {name} itself")
