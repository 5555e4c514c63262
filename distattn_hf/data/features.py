"""Rows of pictures and sound with labels, and the collator that batches them."""

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .packing import IGNORED
from .rows import LABEL_COLUMNS, Job, column_of, first_row, first_rows, label_of, label_options, workers_of
from .tasks import TASKS

# Columns of the model's own inputs, and of what a processor makes them of.
READY = {"image": ("pixel_values",), "sound": ("input_features", "input_values")}
RAW = {"image": ("image", "img"), "sound": ("audio",)}
TRANSCRIPTS = ("text", "sentence", "transcription")


def feature_rows(job: Job, dataset, argument: str):
    """Return rows of a model's inputs with "labels", of data with one of `READY`'s columns or one of `RAW`'s.

    A ready column is taken as it is ("pixel_values": (channels, height, width) floats, as the model's processor would
    scale them; "input_features", "input_values"; "attention_mask" beside them); images and sound ({"array",
    "sampling_rate"}) go through the processor, `job.tokenizer`. Classification: labels as those of texts.
    speech-recognition: a column "labels" of token ids, or a transcript that the processor's tokenizer reads.

    Raises `ValueError` for data without such columns, raw inputs without a processor, and labels that do not fit.
    """
    arguments = job.arguments
    first = first_row(dataset, argument, arguments)
    options = _columns(first, argument, TASKS[job.task].inputs, job.tokenizer, arguments.text_column)
    options["max_length"] = job.max_length
    if job.task == "speech-recognition":
        column = column_of(first, "label_column", arguments.label_column, ("labels", *TRANSCRIPTS))
        tokenizer = getattr(job.tokenizer, "tokenizer", None)
        if isinstance(first[column], str) and tokenizer is None:
            raise ValueError(
                f"label_column {column!r} holds text, and the model comes without a tokenizer; give token ids"
            )
        options |= {"label_column": column, "tokenizer": tokenizer}
    else:
        column = column_of(first, "label_column", arguments.label_column, LABEL_COLUMNS)
        options |= label_options(job, dataset, column, argument == "train_data")
    if (limit := arguments.limit_of(argument)) is not None:
        dataset = first_rows(dataset, limit)
    names = [name for name in (dataset.features or first) if name != "labels"]
    return dataset.map(
        _read, batched=True, batch_size=100, remove_columns=names, fn_kwargs=options, **workers_of(job, dataset)
    )


def input_batches(dataset, model, processor, column: str | None = None, *, count: int = 2048, size: int = 64):
    """Return batches of a model's inputs, without labels, from the first `count` rows of a data set, for a fit.

    Raises `ValueError` as `feature_rows`.
    """
    kind = next(kind for kind, names in READY.items() if model.main_input_name in names)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("calibration holds no rows")
    options = _columns(first, "calibration", kind, processor, column)
    batches = first_rows(dataset, count).iter(size)
    rows = (_read(batch, **options, max_length=None, label_column=None) for batch in batches)
    return [collate_features([dict(zip(batch, row)) for row in zip(*batch.values())]) for batch in rows]


def _columns(first: dict, argument: str, kind: str, processor, column: str | None) -> dict:
    """Return which columns `_read` takes the inputs from."""
    ready = next((name for name in READY[kind] if name in first), None)
    raw = None if ready else column_of(first, "text_column", column, RAW[kind])
    if raw is not None and processor is None:
        raise ValueError(
            f"{argument} has a column {raw!r}, and the model comes without the files of a processor that would read "
            f"it; give a column {' or '.join(map(repr, READY[kind]))} of its own inputs"
        )
    return {"ready": ready, "raw": raw, "processor": processor}


def _read(batch, *, ready, raw, processor, max_length, label_column, tokenizer=None, ids=None, num_labels=None):
    """Return the inputs and labels of a batch of rows."""
    if ready is not None:
        rows = {name: batch[name] for name in (ready, "attention_mask") if name in batch}
    elif raw in RAW["image"]:
        rows = dict(processor(images=[image.convert("RGB") for image in batch[raw]], return_tensors="np"))
    else:
        rates = {sound["sampling_rate"] for sound in batch[raw]}
        if len(rates) > 1:
            raise ValueError(f"column {raw!r} must have one sampling rate, got {sorted(rates)}")
        arrays = [np.asarray(sound["array"], dtype=np.float32) for sound in batch[raw]]
        rows = dict(processor(arrays, sampling_rate=rates.pop(), return_tensors=None))
    if label_column is None:
        return rows
    labels = batch[label_column]
    if num_labels is not None:
        rows["labels"] = [label_of(value, label_column, ids, num_labels) for value in labels]
    elif tokenizer is not None and isinstance(labels[0], str):
        rows["labels"] = tokenizer(list(labels), truncation=True, max_length=max_length)["input_ids"]
    else:
        rows["labels"] = [list(value)[:max_length] for value in labels]
    return rows


def collate_features(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return a batch of rows: inputs of one shape stacked; sequences of different lengths padded at the end, labels
    with -100, all else with 0, and an "attention_mask" made where inputs (n,) have none.

    Raises `ValueError` for pictures of different sizes.
    """
    batch = {}
    for name in rows[0]:
        values = [torch.as_tensor(np.asarray(row[name])) for row in rows]
        values = [value.float() if value.is_floating_point() else value for value in values]
        if len({value.shape for value in values}) > 1:
            if values[0].dim() != 1:
                raise ValueError(f"{name} must have one shape in all rows, got {sorted({v.shape for v in values})}")
            if name in READY["sound"] and "attention_mask" not in rows[0]:
                masks = [torch.ones(len(value), dtype=torch.long) for value in values]
                batch["attention_mask"] = pad_sequence(masks, batch_first=True)
            batch[name] = pad_sequence(values, True, IGNORED if name == "labels" else 0)
        else:
            batch[name] = torch.stack(values)
    return batch
