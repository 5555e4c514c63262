"""The student that an adaptation starts from: a given one, or the teacher converted as the config says."""

from dataclasses import replace
from itertools import islice

from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert
from ..conversion.fold import check_foldable, fold_alpha
from ..data.batches import forward_inputs
from ..data.datasets import TaskData, check_tokenizers
from ..data.sources import read_texts
from ..data.tasks import TASKS, task_of
from ..storage.models import load_checkpoint
from .arguments import AdaptationConfig
from .stages import check_pair

# How many training rows the fit may take its tokens from, where it does not read text itself.
_ROWS = 2048
# Pictures or pieces of sound in a batch of the fit.
_BATCH = 64


def first_student(config: AdaptationConfig, teacher, tokenizer, data: TaskData):
    """Return the student that the first stage starts from: the given one, or the converted teacher."""
    if config.model.student is None:
        return converted(config, teacher, tokenizer, data)
    student, own_tokenizer = load_checkpoint(config.model.student)
    check_pair(teacher, student)
    if own_tokenizer is not None and TASKS[task_of(teacher)].inputs == "text":
        check_tokenizers(student, own_tokenizer, tokenizer)
    return student


def fit_options(config: AdaptationConfig) -> CalibrationOptions:
    """Return the options of the teacher's fit."""
    model = config.model
    return CalibrationOptions(
        steps=model.calibration_steps,
        max_tokens=model.calibration_tokens,
        max_length=model.calibration_length,
        max_error=model.max_error,
        seed=config.training.seed,
        progress=not config.training.disable_tqdm,
    )


def converted(config: AdaptationConfig, teacher, tokenizer, data: TaskData, init: str | None = None):
    """Return the teacher converted as `config` says; `init` "plain": the same swap without a fit."""
    model, teacher, texts = config.model, teacher.to("cpu"), None
    init = init or model.init
    if init == "plain":
        return convert(teacher, [replace(spec, transform=None, softening=None) for spec in model.specs], init=init)
    if model.fold_alpha:
        check_foldable(teacher, model.specs)
    options = fit_options(config)
    if init == "calibrated":
        # Text where the fit may choose its own row boundaries, else the first training rows.
        task, arguments = task_of(teacher), config.data
        reads_text = TASKS[task].reads_text and task != "seq2seq"
        if model.calibration_data is not None and TASKS[task].inputs != "text":
            raise ValueError(
                f"calibration_data={model.calibration_data!r} is text, and task {task!r} reads none: the fit takes "
                "the training data"
            )
        source = model.calibration_data or (
            str(arguments.train_data) if reads_text and not arguments.streaming else None
        )
        if source is not None:
            texts = read_texts(source, column=arguments.text_column, split=arguments.train_split)
        elif TASKS[task].inputs != "text":
            rows = list(islice(data.train, _ROWS))
            batches = (data.collator(rows[start : start + _BATCH]) for start in range(0, len(rows), _BATCH))
            texts = [forward_inputs(teacher, batch) for batch in batches]
        else:
            input_names = {"input_ids", "attention_mask", "token_type_ids"} | (
                {"labels"} if task == "seq2seq" else set()
            )
            rows = islice(data.train, _ROWS)
            texts = [{name: value for name, value in row.items() if name in input_names} for row in rows]
    student = convert(teacher, model.specs, init=init, calibration=texts, tokenizer=tokenizer, options=options)
    return fold_alpha(student) if model.fold_alpha else student
