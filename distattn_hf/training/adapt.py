"""`adapt`: convert a teacher and train the student in stages, each of them resumable, with a scorecard."""

import logging
from dataclasses import fields

from accelerate import PartialState

from ..conversion.convert import describe_fit
from ..data.at_hand import check_data_fields
from ..data.datasets import build_data, check_tokenizers, row_length
from ..data.tasks import TASKS, task_of
from ..evaluation.scorecard import Examiner, Scorecard, evaluation_pairs, passkey_questions
from ..storage.models import load_checkpoint, load_processor
from ..storage.pooling import read_pooling
from ..storage.runs import TRAINER_STATE, RunFolder, finished, spent_on
from .arguments import FINETUNED, AdaptationConfig, StageOptions
from .first_student import converted, first_student, fit_options
from .objectives import STAGES
from .stages import Stage, check_stages
from .trainer import num_steps, train_stage

logger = logging.getLogger(__name__)

# Fields that a resumed run may change, besides those that no result depends on.
_MAY_CHANGE = {"controls", "teacher_finetuned"}
# Fields that may change until their stage begins: an error in them may only show once there is a student.
_OF_STAGES = {"stage_options", *(field.name for field in fields(StageOptions))}


def adapt(config: AdaptationConfig, say=logger.info) -> Scorecard:
    """Run the stages of `config` one after another and return the scorecard.

    output_dir/calibrated, output_dir/<stage>/final and output_dir/student hold checkpoints that are complete or absent;
    an interrupted run resumes from output_dir/<stage>/checkpoint-N, which are deleted when the stage is finished. A
    finished stage is not run again.

    Args:
        config: as returned by `read_config`.
        say: called with one line of text per message: which stage begins, from where, and how long it may take.

    Raises:
        ValueError: before anything is trained: bad input, or an output_dir with a run of other arguments; during
            training: a loss that is not finite.
        OSError: no space for a checkpoint; what was saved before stays.
    """
    model, stages, training = config.model, config.adaptation.stages, config.training
    state = PartialState(cpu=training.use_cpu)
    say = say if state.is_main_process else lambda text: None

    # Models, data, and what an earlier run has finished.
    teacher, tokenizer, task, data = load_inputs(config)
    pairs, pooling = None, "mean"
    if task == "embedding":
        pairs = evaluation_pairs(config.data, config.adaptation.pair_columns, config.adaptation.max_pairs)
        pooling = read_pooling(model.teacher)
    elif data.evaluation is None:
        raise ValueError("eval_data must be given: the data has no split to evaluate on")
    asked = []
    if (passkey_length := config.adaptation.passkey_length) is not None:
        asked = passkey_questions(teacher, tokenizer, data, passkey_length)
    run = open_run(config, state)
    part_paths = {name: run.part(name) for name in ("calibrated", FINETUNED, *stages)}
    finished_parts = {name for name, path in part_paths.items() if finished(path)}
    run.note()

    # The student before training.
    calibrated, reads_text = part_paths["calibrated"], TASKS[task].inputs == "text"
    if state.is_main_process and "calibrated" not in finished_parts:
        if model.student is None:
            say(f"conversion begins: {model.teacher} -> {calibrated}; {_fit_note(config, reads_text)}")
        run.save(first_student(config, teacher, tokenizer, data), tokenizer, calibrated)
    state.wait_for_everyone()
    options = {stage: config.adaptation.options_for(stage) for stage in stages}
    length = row_length(config.data, tokenizer, teacher.config) if reads_text else config.data.max_length
    check_stages(load_checkpoint(calibrated)[0], teacher, task, options, length)

    # The rows of the scorecard that need no training.
    names = {"train": config.data.train_data, "eval": config.data.eval_data or config.data.train_data}
    names |= {"passkey_length": passkey_length} if asked else {}
    card = Scorecard.load(run.path) or Scorecard.for_task(task, names, model.teacher)
    examiner = Examiner(card, run.path, data, tokenizer, pairs, pooling, training, state, asked)
    controls = examiner.missing(config.adaptation.controls)
    if "plain" in controls and model.specs is None:
        raise ValueError("control 'plain' needs spec: a given student says nothing about a swap")
    if examiner.missing(["teacher", "calibrated"]):
        rows = f"{len(pairs):,} pairs (max_pairs)" if pairs else "the evaluation data (max_eval_samples)"
        say(f"scoring the teacher and the student as it was converted, on {rows}; then each stage's student")
    if examiner.missing(["teacher"]):
        examiner.record("teacher", teacher)
    if controls or examiner.missing(["calibrated"]):
        student = load_checkpoint(calibrated)[0]
        if examiner.missing(["calibrated"]):
            examiner.record("calibrated", student)
        examiner.record_controls(controls, student, lambda: converted(config, teacher, tokenizer, data, "plain"))

    if config.adaptation.teacher_finetuned:
        if FINETUNED not in finished_parts:
            arguments = config.training_for(FINETUNED)
            if "max_steps" not in config.adaptation.stage_options.get(FINETUNED, {}):
                arguments.max_steps = sum(num_steps(config.training_for(stage), data.train) for stage in stages)
            finetuned_teacher = load_checkpoint(model.teacher)[0]
            stage = Stage("task", finetuned_teacher, None, task, config.adaptation.options_for(FINETUNED))
            train_stage(stage, arguments, data, tokenizer, run, model.teacher, say)
        if examiner.missing([FINETUNED]):
            examiner.record(FINETUNED, load_checkpoint(part_paths[FINETUNED])[0], **spent_on(part_paths[FINETUNED]))

    # The stages, each starting from the final checkpoint of the one before it.
    for previous, name in zip(("calibrated", *stages), stages, strict=False):
        if name in finished_parts:
            say(f"stage {name} is finished: {part_paths[name]}")
        else:
            student, arguments = load_checkpoint(part_paths[previous])[0], config.training_for(name)
            stage = Stage(name, student, teacher, task, options[name])
            train_stage(stage, arguments, data, tokenizer, run, part_paths[previous], say)
        if examiner.missing([name]):
            examiner.record(name, load_checkpoint(part_paths[name])[0], **spent_on(part_paths[name]))

    card.checkpoint = stages[-1]
    run.publish(part_paths[stages[-1]], "student", card.save)
    return card


def _fit_note(config: AdaptationConfig, reads_text: bool) -> str:
    """Say what the conversion's fit is and which fields shorten it."""
    if config.model.init != "calibrated":
        return "nothing is fitted"
    told = describe_fit(config.model.specs, fit_options(config), reads_text)
    return f"{told}; calibration_steps and calibration_tokens set this, max_steps is of the stages after it"


def load_inputs(config: AdaptationConfig) -> tuple:
    """Load (teacher, tokenizer or processor, task, data); raises `ValueError` where they do not fit together."""
    model = config.model
    check_data_fields(config.values)
    teacher, tokenizer = load_checkpoint(model.teacher)
    task = task_of(teacher)
    reads_text = TASKS[task].inputs == "text"
    if not reads_text:
        tokenizer = load_processor(model.teacher)
    elif tokenizer is None:
        raise ValueError(f"teacher {model.teacher!r} has no tokenizer files, so it cannot read text")
    if model.task not in (None, task):
        raise ValueError(f"task {model.task!r} needs another head than {type(teacher).__name__} ({task})")
    if task == "embedding" and (config.adaptation.teacher_finetuned or "task" in config.adaptation.stages):
        raise ValueError(f"{model.teacher!r} has no loss of its own: leave out stage 'task' and teacher_finetuned")
    if reads_text:
        check_tokenizers(teacher, tokenizer)
    return teacher, tokenizer, task, build_data(config.data, task, tokenizer, teacher.config)


def open_run(config: AdaptationConfig, state, driver: str = TRAINER_STATE) -> RunFolder:
    """Return the folder of the run, checked but not yet written to; driver: the last file written to its checkpoints.

    Raises `ValueError` where output_dir holds a run with other arguments, or whose stages are not the first stages of
    `config`.
    """
    # The default stages may change between versions, so the current ones are recorded.
    values = {**config.values, "stages": config.adaptation.stages}
    run = RunFolder(config.training.output_dir, values, state, config.model.student or config.model.teacher)
    run.check(may_change=_MAY_CHANGE, until_begun=_OF_STAGES, stages=(*STAGES, FINETUNED), driver=driver)
    return run
