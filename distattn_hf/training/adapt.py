"""`adapt`: convert a teacher and train the student in stages, each of them resumable, with a scorecard."""

import gc
import json
import logging
import os
import shutil
import time
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback, set_seed

from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert, current_report
from ..conversion.fold import check_foldable, fold_alpha
from ..conversion.report import ConversionReport
from ..core.configuration_distattn import CLASS_PREFIX
from ..data.batches import read_texts
from ..data.datasets import TaskData, build_data, check_data, check_tokenizers, row_length
from ..evaluation.score import model_kind
from ..evaluation.scorecard import Scorecard, evaluation_pairs, score_controls, score_model
from ..storage.companions import Source
from ..storage.folders import save_checkpoint
from ..storage.models import load_checkpoint
from ..storage.pooling import read_pooling
from ..storage.runs import check_space, last_checkpoint, remove_checkpoints
from .arguments import FINETUNED, AdaptationConfig
from .objectives import STAGES
from .stages import Stage, StageOptions, check_stages
from .trainer import AdaptationTrainer, check_pair

logger = logging.getLogger(__name__)

_HEADS = (("ForSequenceClassification", "sequence-classification"), ("ForTokenClassification", "token-classification"))
_SPENT = "distattn_training.json"
_ARGUMENTS = "arguments.json"
# What may differ between a run and the one it goes on from: all else would be another experiment under the same name.
_MAY_CHANGE = {
    "output_dir", "stages", "controls", "teacher_finetuned", "disable_tqdm", "report_to", "logging_steps", "save_steps",
    "save_strategy", "save_total_limit", "use_cpu", "per_device_eval_batch_size", "num_proc", "dataloader_num_workers",
}  # fmt: skip
# Until a stage begins, so may its options: what is wrong in them may only be found once there is a student.
_OF_STAGES = {"stage_options", *(field.name for field in fields(StageOptions))}
# Training rows that the fit may take its tokens from, where it does not read text itself.
_CALIBRATION_ROWS = 2048


def task_of(model) -> str:
    """What a model's head is for: one of `TASKS`. Raises `ValueError` for any other head."""
    name = type(model).__name__.removeprefix(CLASS_PREFIX)
    return next((task for suffix, task in _HEADS if name.endswith(suffix)), None) or model_kind(model)


def converted(config: AdaptationConfig, teacher, tokenizer, data: TaskData, init: str | None = None, *, progress=True):
    """The teacher converted as `config` says; `init` "plain": the same swap without a fit."""
    model = config.model
    init = init or model.init
    if init == "plain":
        specs = [replace(spec, transform=None) for spec in model.specs]
        return convert(teacher, specs, init=init)
    if model.fold_alpha:
        check_foldable(teacher, model.specs)
    chosen = {"steps": model.calibration_steps, "max_tokens": model.calibration_tokens}
    chosen |= {"max_length": model.calibration_length, "max_error": model.max_error, "seed": config.training.seed}
    options = CalibrationOptions(progress=progress, **chosen)
    texts = None if init == "exact" else _calibration_texts(config, task_of(teacher), data)
    student = convert(teacher, model.specs, init=init, calibration=texts, tokenizer=tokenizer, options=options)
    return fold_alpha(student) if model.fold_alpha else student


def _calibration_texts(config: AdaptationConfig, task: str, data: TaskData) -> list:
    """calibration_data, or the training data: as text where the fit may cut it as it likes, else its first rows."""
    source, arguments = config.model.calibration_data, config.data
    if source is None and task in ("causal-lm", "masked-lm", "embedding") and not arguments.streaming:
        source = str(arguments.train_data)
    if source is None:
        kept = {"input_ids", "attention_mask", "token_type_ids"} | ({"labels"} if task == "seq2seq" else set())
        return [{k: v for k, v in row.items() if k in kept} for row in islice(data.train, _CALIBRATION_ROWS)]
    return read_texts(source, column=arguments.text_column, split=arguments.train_split)


def check_arguments(config: AdaptationConfig, state) -> None:
    """Note the arguments in output_dir; state: `PartialState` or `Accelerator`.

    Raises `ValueError` where output_dir holds a run with other arguments, or with stages that those of `config` do not
    begin with: each stage starts from the one before it.
    """
    out = Path(config.training.output_dir)
    file, values = out / _ARGUMENTS, json.loads(json.dumps(config.values, default=str))
    # The default may change, so what it is today is noted.
    values["stages"] = config.adaptation.stages
    # Where nothing came of a run, its arguments (a typo in them, perhaps) bind no one.
    if file.is_file() and any(path != file for path in out.iterdir()):
        before = json.loads(file.read_text(encoding="utf-8"))
        begun = any((out / stage).exists() for stage in (*STAGES, FINETUNED))
        may_change = _MAY_CHANGE if begun else _MAY_CHANGE | _OF_STAGES
        changed = {k for k in {*before, *values} - may_change if before.get(k) != values.get(k)}
        if changed:
            key = min(changed)
            raise ValueError(
                f"output_dir {str(out)!r} holds a run with {key}={before.get(key)!r}, now {values.get(key)!r} "
                f"({len(changed)} arguments differ); give another output_dir or remove that one"
            )
        stages = before.get("stages", ["transfer"])
        if begun and values["stages"][: len(stages)] != stages:
            raise ValueError(
                f"output_dir {str(out)!r} holds a run with stages={stages!r}, to which stages may be added at the end, "
                f"now {values['stages']!r}; give another output_dir or remove that one"
            )
    state.wait_for_everyone()
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values, indent=1), encoding="utf-8")


def adapt(config: AdaptationConfig, say=logger.info) -> Scorecard:
    """Run the stages of `config` one after another and return the scorecard.

    output_dir/calibrated, output_dir/<stage>/final and output_dir/student hold checkpoints that are complete or not
    there; output_dir/<stage>/checkpoint-N are what a run that was cut off goes on from, and go when the stage is
    finished. What is finished is not done again.

    Args:
        config: what `read_config` read.
        say: called with a line of text when a stage begins, from where, and how long it may take.

    Raises:
        ValueError: before anything is trained: bad input, or an output_dir with a run of other arguments; while
            training: a loss that is not finite.
        OSError: where a checkpoint finds no space; what was saved before stays.
    """
    run = _Run(config, say)
    check_arguments(config, run.state)
    run.convert()
    run.check_stages()
    run.baselines()
    for number, stage in enumerate(config.adaptation.stages):
        run.stage(stage, run.final(config.adaptation.stages[number - 1]) if number else run.out / "calibrated")
    return run.finish()


class _Run:
    """One adaptation: what every step of it needs."""

    def __init__(self, config: AdaptationConfig, say):
        self.config, self.out = config, Path(config.training.output_dir)
        self.state = PartialState(cpu=config.training.use_cpu)
        self.say = say if self.state.is_main_process else lambda text: None
        self.progress = self.state.is_main_process and not config.training.disable_tqdm
        model = config.model
        self.teacher, self.tokenizer = load_checkpoint(model.teacher)
        self.source = Source(model.student or model.teacher)
        if self.tokenizer is None:
            raise ValueError(f"teacher {model.teacher!r} has no tokenizer files, so it cannot read text")
        check_tokenizers(self.teacher, self.tokenizer)
        self.task = task_of(self.teacher)
        if model.task not in (None, self.task):
            raise ValueError(f"task {model.task!r} needs another head than {type(self.teacher).__name__} ({self.task})")
        if self.task == "embedding" and (config.adaptation.teacher_finetuned or "task" in config.adaptation.stages):
            raise ValueError(f"{model.teacher!r} has no loss of its own: leave out stage 'task' and teacher_finetuned")
        self.data: TaskData = build_data(config.data, self.task, self.tokenizer, self.teacher.config)
        check_data("train_data", self.data.train)
        self.pairs, self.pooling = None, "mean"
        if self.task == "embedding":
            self.pooling = read_pooling(model.teacher)
            self.pairs = evaluation_pairs(config.data, config.adaptation.pair_columns, config.adaptation.max_pairs)
        elif self.data.evaluation is None:
            raise ValueError("eval_data must be given: the data has no split to evaluate on")
        names = {"train": config.data.train_data, "eval": config.data.eval_data or config.data.train_data}
        self.card = Scorecard.load(self.out) or Scorecard.for_task(self.task, names, model.teacher)

    def final(self, stage: str) -> Path:
        """Where a finished stage is."""
        return self.out / stage / "final"

    def score(self, model) -> dict[str, float]:
        """The model's scores on the evaluation data."""
        model.to(self.config.training.device)
        size = self.config.training.per_device_eval_batch_size
        return score_model(
            model, self.task, self.data, self.tokenizer, pairs=self.pairs, pooling=self.pooling, batch_size=size,
            progress=self.progress,
        )  # fmt: skip

    def record(self, name: str, model, **spent) -> None:
        """Score a model into the scorecard, on the main process; the others wait."""
        if self.state.is_main_process:
            row = self.card.put(name, self.score(model), **spent)
            self.card.save(self.out)
            logger.info("%s: %s %.4f", name, self.card.metric, row.score)
        self.state.wait_for_everyone()

    def _converted(self, init: str | None = None):
        return converted(self.config, self.teacher.to("cpu"), self.tokenizer, self.data, init, progress=self.progress)

    def convert(self) -> None:
        """output_dir/calibrated: the teacher converted, or the student that was given."""
        path, model = self.out / "calibrated", self.config.model
        if self.state.is_main_process and not (path / "config.json").exists():
            if model.student is not None:
                student, tokenizer = load_checkpoint(model.student)
                check_pair(self.teacher, student)
                if tokenizer is not None:
                    check_tokenizers(student, tokenizer, self.tokenizer)
            else:
                fit = (
                    "the fit shows its progress" if model.init == "calibrated" and self.progress else "no training yet"
                )
                self.say(f"conversion begins: {model.teacher} -> {path}; {fit}")
                student = self._converted()
            check_space(path, student, with_optimizer=False)
            save_checkpoint(student, self.tokenizer, path, source=self.source)
        self.state.wait_for_everyone()

    def check_stages(self) -> None:
        """Raise `ValueError` for options that a stage would refuse, before the first one trains."""
        student = load_checkpoint(self.out / "calibrated")[0]
        length = row_length(self.config.data, self.tokenizer, self.teacher.config)
        options = {stage: self._options(stage) for stage in self.config.adaptation.stages}
        check_stages(student, self.teacher, self.task, options, length)

    def baselines(self) -> None:
        """The rows that need no training: teacher, calibrated, controls; and the teacher fine-tuned."""
        if self.card.row("teacher") is None or self.card.row("calibrated") is None:
            self.say("scoring the teacher and the student as it was converted, on the evaluation data")
        if self.card.row("teacher") is None:
            self.record("teacher", self.teacher)
        controls = [name for name in self.config.adaptation.controls if self.card.row(name) is None]
        if self.card.row("calibrated") is None or controls:
            student = load_checkpoint(self.out / "calibrated")[0]
            if self.card.row("calibrated") is None:
                self.record("calibrated", student)
            if "plain" in controls and self.config.model.specs is None:
                raise ValueError("control 'plain' needs spec: a given student says nothing about a swap")
            if self.state.is_main_process:
                for name, metrics in score_controls(
                    controls, student, lambda: self._converted("plain"), self.score
                ).items():
                    self.card.put(name, metrics)
                    self.card.save(self.out)
            self.state.wait_for_everyone()
        if self.config.adaptation.teacher_finetuned:
            self._finetune_teacher()

    def _finetune_teacher(self) -> None:
        path = self.final(FINETUNED)
        if not (path / "config.json").exists():
            arguments = self.config.training_for(FINETUNED)
            if "max_steps" not in self.config.adaptation.stage_options.get(FINETUNED, {}):
                arguments.max_steps = sum(self._steps(stage) for stage in self.config.adaptation.stages)
            model = load_checkpoint(self.config.model.teacher)[0]
            self._train(Stage("task", model, None, self.task, self._options(FINETUNED)), arguments, path)
        if self.card.row(FINETUNED) is None:
            self.record(FINETUNED, load_checkpoint(path)[0], **self._spent(path))

    def _options(self, stage: str):
        return self.config.adaptation.options_for(stage)

    def _steps(self, stage: str) -> int:
        return self._steps_of(self.config.training_for(stage))

    def _steps_of(self, arguments) -> int:
        if arguments.max_steps > 0:
            return arguments.max_steps
        rows = arguments.per_device_train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
        return max(1, int(arguments.num_train_epochs * len(self.data.train) / rows))

    def stage(self, name: str, start: Path) -> None:
        """Train one stage from the checkpoint `start`, unless it is finished."""
        path = self.final(name)
        if (path / "config.json").exists():
            self.say(f"stage {name} is finished: {path}")
        else:
            student, tokenizer = load_checkpoint(start)
            check_pair(self.teacher, student)
            if tokenizer is not None:
                check_tokenizers(student, tokenizer, self.tokenizer)
            arguments = self.config.training_for(name)
            stage = Stage(name, student, self.teacher, self.task, self._options(name))
            self._train(stage, arguments, path, before=start)
        if self.card.row(name) is None:
            self.record(name, load_checkpoint(path)[0], **self._spent(path))

    def _train(self, stage: Stage, arguments, path: Path, before: Path | None = None) -> None:
        """Train, from the last complete checkpoint if there is one, and save to `path`."""
        set_seed(arguments.seed)
        if arguments.include_num_input_tokens_seen == "no":
            arguments.include_num_input_tokens_seen = "non_padding"
        trainer = AdaptationTrainer(
            stage,
            arguments,
            train_dataset=self.data.train,
            eval_dataset=self.data.evaluation,
            data_collator=self.data.collator,
            processing_class=self.tokenizer,
        )
        if stage.annealing is not None and stage.annealing.needs_batches:
            size, device = arguments.per_device_train_batch_size, trainer.args.device
            stage.annealing.prepare(first_batches(self.data, size, device))
        trained = stage.trained_parameters()
        self._announce(path.parent.name, trainer, arguments, before or self.config.model.teacher)
        trainer.train(resume_from_checkpoint=True)
        earlier = self._spent(before) if before is not None else {}
        spent = {
            "trained_parameters": max(trained, earlier.get("trained_parameters") or 0),
            "tokens": int(trainer.state.num_input_tokens_seen) + (earlier.get("tokens") or 0),
            "seconds": round(trainer.seconds + (earlier.get("seconds") or 0), 1),
        }
        if trainer.is_world_process_zero():
            model = stage.finish()
            if stage.converted:
                _update_report(model)
            check_space(path, model, with_optimizer=False)
            save_checkpoint(_Noted(model.to("cpu"), spent), self.tokenizer, path, overwrite=True, source=self.source)
            # Training goes on from them no more; optimizer states are most of what they hold.
            remove_checkpoints(arguments.output_dir)
        trainer.accelerator.wait_for_everyone()
        del trainer
        gc.collect()

    def _announce(self, name: str, trainer, arguments, before) -> None:
        """Say that a stage begins, from which checkpoint, and after a few steps how long it may take."""
        steps, found = self._steps_of(arguments), last_checkpoint(arguments.output_dir)
        done = 0 if found is None else int(found.name.rpartition("-")[2])
        if found is None:
            self.say(f"stage {name} begins: {steps:,} steps from {before}")
        else:
            self.say(f"stage {name} goes on from {found}: {steps - done:,} of {steps:,} steps are left")
        trainer.add_callback(_Estimate(name, steps, self.say))

    def _spent(self, path: Path | None) -> dict:
        file = Path(path or "") / _SPENT
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def finish(self) -> Scorecard:
        """output_dir/student: the last stage's result with the scorecard."""
        target, last = self.out / "student", self.final(self.config.adaptation.stages[-1])
        if self.state.is_main_process:
            staging = self.out / ".student"
            shutil.rmtree(staging, ignore_errors=True)
            shutil.copytree(last, staging)
            self.card.checkpoint = self.config.adaptation.stages[-1]
            self.card.save(staging)
            if target.exists():
                shutil.rmtree(target)
            os.replace(staging, target)
        self.state.wait_for_everyone()
        return self.card


class _Estimate(TrainerCallback):
    """Says once how long a training may take, by the time of its first steps."""

    def __init__(self, name: str, steps: int, say, after: int = 3):
        self.name, self.steps, self.say, self.after = name, steps, say, after
        self.began = None

    def on_step_end(self, args, state, control, **kwargs):
        """After the first step start the clock, as it has what is done once; some steps later say what it tells."""
        if self.began is None:
            self.began = (state.global_step, time.perf_counter())
        elif state.global_step == self.began[0] + self.after:
            each, left = (time.perf_counter() - self.began[1]) / self.after, self.steps - state.global_step
            if left > 0:
                self.say(
                    f"stage {self.name}: {each:.2g} s a step, about {_duration(each * left)} for the {left:,} left"
                )


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


class _Noted:
    """A model whose `save_pretrained` also writes what its training took, so that both are there or neither is."""

    def __init__(self, model, spent: dict):
        self.model, self.spent = model, spent

    def save_pretrained(self, folder) -> None:
        """Both files."""
        self.model.save_pretrained(folder)
        (Path(folder) / _SPENT).write_text(json.dumps(self.spent), encoding="utf-8")


def first_batches(data: TaskData, size: int, device, count: int = 4) -> list[dict]:
    """The first few training rows in the order of the data, as batches: the same in every run of a stage.

    A data loader would give others, and move the random numbers that the training's order comes from.
    """
    rows = list(islice(data.train, count * size))
    batches = [data.collator(rows[i : i + size]) for i in range(0, len(rows), size)]
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


def _update_report(student) -> None:
    """The conversion report with λ and α as training left them."""
    if student.conversion_report:
        report: ConversionReport = current_report(student)
        student.conversion_report = report.to_dict()
