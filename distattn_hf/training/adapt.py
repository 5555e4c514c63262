"""`adapt`: convert a teacher and train the student in stages, each of them resumable, with a scorecard."""

import gc
import logging
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

from accelerate import PartialState
from transformers import set_seed

from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert
from ..conversion.fold import check_foldable, fold_alpha
from ..data.datasets import TaskData, build_data, check_data, check_tokenizers, row_length
from ..data.sources import read_texts
from ..data.tasks import TASKS, task_of
from ..evaluation.scorecard import Examiner, Scorecard, evaluation_pairs
from ..storage.models import load_checkpoint
from ..storage.runs import RunFolder, finished, remove_checkpoints, spent_on
from .arguments import FINETUNED, AdaptationConfig, StageOptions
from .objectives import STAGES
from .stages import Stage, check_stages
from .trainer import AdaptationTrainer, check_pair, num_steps

logger = logging.getLogger(__name__)

# Beside what no result depends on: what is scored, and in which stages there may be more.
_MAY_CHANGE = {"controls", "teacher_finetuned"}
# Until a stage begins, so may its options: what is wrong in them may only be found once there is a student.
_OF_STAGES = {"stage_options", *(field.name for field in fields(StageOptions))}
# Training rows that the fit may take its tokens from, where it does not read text itself.
_CALIBRATION_ROWS = 2048


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
    model, stages, training = config.model, config.adaptation.stages, config.training
    state = PartialState(cpu=training.use_cpu)
    say = say if state.is_main_process else lambda text: None

    teacher, tokenizer, task, data = load_inputs(config)
    pairs = None
    if task == "embedding":
        pairs = evaluation_pairs(config.data, config.adaptation.pair_columns, config.adaptation.max_pairs)
    elif data.evaluation is None:
        raise ValueError("eval_data must be given: the data has no split to evaluate on")
    run = open_run(config, state)
    names = {"train": config.data.train_data, "eval": config.data.eval_data or config.data.train_data}
    card = Scorecard.load(run.path) or Scorecard.for_task(task, names, model.teacher)
    examiner = Examiner(card, run.path, data, tokenizer, pairs, training, state)

    calibrated = run.path / "calibrated"
    if state.is_main_process and not finished(calibrated):
        if model.student is None:
            fits = model.init == "calibrated" and not training.disable_tqdm
            what = "the fit shows its progress" if fits else "no training yet"
            say(f"conversion begins: {model.teacher} -> {calibrated}; {what}")
        run.save(first_student(config, teacher, tokenizer, data), tokenizer, calibrated)
    state.wait_for_everyone()
    options = {stage: config.adaptation.options_for(stage) for stage in stages}
    length = row_length(config.data, tokenizer, teacher.config)
    check_stages(load_checkpoint(calibrated)[0], teacher, task, options, length)

    controls = examiner.missing(config.adaptation.controls)
    if "plain" in controls and model.specs is None:
        raise ValueError("control 'plain' needs spec: a given student says nothing about a swap")
    if examiner.missing(["teacher", "calibrated"]):
        say("scoring the teacher and the student as it was converted, on the evaluation data")
    if examiner.missing(["teacher"]):
        examiner.record("teacher", teacher)
    if controls or examiner.missing(["calibrated"]):
        student = load_checkpoint(calibrated)[0]
        if examiner.missing(["calibrated"]):
            examiner.record("calibrated", student)
        examiner.record_controls(controls, student, lambda: converted(config, teacher, tokenizer, data, "plain"))

    start = calibrated
    for name in (*([FINETUNED] if config.adaptation.teacher_finetuned else []), *stages):
        final, before = run.final(name), model.teacher if name == FINETUNED else start
        if finished(final):
            say(f"stage {name} is finished: {final}")
        else:
            student, arguments = load_checkpoint(before)[0], config.training_for(name)
            if name == FINETUNED:
                stage = Stage("task", student, None, task, config.adaptation.options_for(name))
                if "max_steps" not in config.adaptation.stage_options.get(name, {}):
                    arguments.max_steps = sum(num_steps(config.training_for(s), data.train) for s in stages)
            else:
                check_pair(teacher, student)
                stage = Stage(name, student, teacher, task, options[name])
            train_stage(stage, arguments, data, tokenizer, before, run, say)
        if examiner.missing([name]):
            examiner.record(name, load_checkpoint(final)[0], **spent_on(final))
        start = start if name == FINETUNED else final

    card.checkpoint = stages[-1]
    run.publish(start, "student", card.save)
    return card


def train_stage(stage: Stage, arguments, data: TaskData, tokenizer, before, run: RunFolder, say) -> None:
    """Train one stage from the checkpoint `before`, or on from its own last one, and save what comes of it."""
    set_seed(arguments.seed)
    trainer = AdaptationTrainer(
        stage,
        arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=data.collator,
        processing_class=tokenizer,
    )
    stage.prepare(data, arguments.per_device_train_batch_size, trainer.args.device)
    trained, earlier = stage.trained_parameters(), spent_on(Path(before))
    trainer.announce(say, before)
    trainer.train(resume_from_checkpoint=True)
    if trainer.is_world_process_zero():
        final = run.final(Path(arguments.output_dir).name)
        run.save(
            stage.finish(),
            tokenizer,
            final,
            trained_parameters=max(trained, earlier.get("trained_parameters", 0)),
            tokens=int(trainer.state.num_input_tokens_seen) + earlier.get("tokens", 0),
            seconds=round(trainer.seconds + earlier.get("seconds", 0), 1),
        )
        # Training goes on from them no more; optimizer states are most of what they hold.
        remove_checkpoints(final.parent)
    trainer.accelerator.wait_for_everyone()
    del trainer
    gc.collect()


def load_inputs(config: AdaptationConfig) -> tuple:
    """Load (teacher, tokenizer, task, data); raises `ValueError` where they do not go together."""
    model = config.model
    teacher, tokenizer = load_checkpoint(model.teacher)
    if tokenizer is None:
        raise ValueError(f"teacher {model.teacher!r} has no tokenizer files, so it cannot read text")
    check_tokenizers(teacher, tokenizer)
    task = task_of(teacher)
    if model.task not in (None, task):
        raise ValueError(f"task {model.task!r} needs another head than {type(teacher).__name__} ({task})")
    if task == "embedding" and (config.adaptation.teacher_finetuned or "task" in config.adaptation.stages):
        raise ValueError(f"{model.teacher!r} has no loss of its own: leave out stage 'task' and teacher_finetuned")
    data = build_data(config.data, task, tokenizer, teacher.config)
    check_data("train_data", data.train)
    return teacher, tokenizer, task, data


def open_run(config: AdaptationConfig, state) -> RunFolder:
    """Note the arguments in output_dir, after all processes have seen that no other run is there.

    Raises `ValueError` where output_dir holds a run with other arguments, or with stages that those of `config` do not
    begin with.
    """
    # The default stages may change, so what they are today is noted.
    values = {**config.values, "stages": config.adaptation.stages}
    run = RunFolder(config.training.output_dir, values, state, config.model.student or config.model.teacher)
    run.check(may_change=_MAY_CHANGE, until_begun=_OF_STAGES, stages=(*STAGES, FINETUNED))
    run.note()
    return run


def first_student(config: AdaptationConfig, teacher, tokenizer, data: TaskData):
    """Return the student that the first stage starts from: the one that was given, or the teacher converted."""
    if config.model.student is None:
        return converted(config, teacher, tokenizer, data)
    student, own_tokenizer = load_checkpoint(config.model.student)
    check_pair(teacher, student)
    if own_tokenizer is not None:
        check_tokenizers(student, own_tokenizer, tokenizer)
    return student


def converted(config: AdaptationConfig, teacher, tokenizer, data: TaskData, init: str | None = None):
    """Convert the teacher as `config` says; `init` "plain": the same swap without a fit."""
    model, teacher, texts = config.model, teacher.to("cpu"), None
    init = init or model.init
    if init == "plain":
        return convert(teacher, [replace(spec, transform=None) for spec in model.specs], init=init)
    if model.fold_alpha:
        check_foldable(teacher, model.specs)
    options = CalibrationOptions(
        steps=model.calibration_steps,
        max_tokens=model.calibration_tokens,
        max_length=model.calibration_length,
        max_error=model.max_error,
        seed=config.training.seed,
        progress=not config.training.disable_tqdm,
    )
    if init == "calibrated":
        # Text where the fit may cut it as it likes, else the first rows.
        task, arguments = task_of(teacher), config.data
        cuts = task == "embedding" or (TASKS[task].is_language_model and task != "seq2seq")
        source = model.calibration_data or (str(arguments.train_data) if cuts and not arguments.streaming else None)
        if source is not None:
            texts = read_texts(source, column=arguments.text_column, split=arguments.train_split)
        else:
            kept = {"input_ids", "attention_mask", "token_type_ids"} | ({"labels"} if task == "seq2seq" else set())
            rows = islice(data.train, _CALIBRATION_ROWS)
            texts = [{name: value for name, value in row.items() if name in kept} for row in rows]
    student = convert(teacher, model.specs, init=init, calibration=texts, tokenizer=tokenizer, options=options)
    return fold_alpha(student) if model.fold_alpha else student
