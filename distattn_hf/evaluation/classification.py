"""Score heads for classes, and for transcripts of speech, on data with labels."""

from dataclasses import replace

from ..data.datasets import DataArguments, TaskData, build_data
from ..data.sources import scored_split
from ..data.tasks import task_of
from .score import score_model

# Of the command's tasks the heads that each can score.
KINDS = {
    "classification": (
        "sequence-classification", "token-classification", "image-classification", "audio-classification",
    ),
    "speech": ("speech-recognition",),
}  # fmt: skip


def evaluate_labels(
    models: dict, arguments: DataArguments, *, task: str = "classification", progress: bool = False
) -> dict[str, dict[str, float]]:
    """Return {name: scores} of models {name: (model, tokenizer or processor)} with a head of `KINDS[task]`.

    "classification": "loss", "accuracy", "f1" (macro); of token classification each word counts at its first piece.
    "speech": "loss" and "perplexity" of each transcript's tokens given the sound and those before, and "accuracy". Both
    with the number of "texts" (rows). arguments: train_data is what they are scored on, with its columns (see
    `DataArguments`; of pictures and sound `features.feature_rows`); of several splits train_split, or where that is
    "train", its default, the split "validation" or "test" if there is one.

    Raises `ValueError`, before any model is run, for another head or several kinds of them, a regression head, labels
    that are no class of the model, names where the model's classes have none, and as `build_data`.
    """
    kinds = {name: task_of(model) for name, (model, _) in models.items()}
    for name, kind in kinds.items():
        if kind not in KINDS[task]:
            raise ValueError(
                f"task {task!r} needs one of the heads {', '.join(KINDS[task])}, and {name!r} is "
                f"{type(models[name][0]).__name__} ({kind})"
            )
        if task == "classification" and models[name][0].config.num_labels == 1:
            raise ValueError(f"{name!r} has a regression head (num_labels=1), which has no accuracy")
    if len(set(kinds.values())) > 1:
        raise ValueError(f"the models have different heads: {kinds}")
    arguments = replace(arguments, train_split=scored_split(arguments))
    data = {name: _labelled(arguments, kinds[name], *pair) for name, pair in models.items()}
    return {
        name: {**score_model(model, kinds[name], data[name], tokenizer, progress=progress),
               "texts": len(data[name].evaluation)}
        for name, (model, tokenizer) in models.items()
    }  # fmt: skip


def _labelled(arguments: DataArguments, kind: str, model, tokenizer) -> TaskData:
    data = build_data(arguments, kind, tokenizer, model.config)
    own_names = [model.config.id2label[index] for index in sorted(model.config.id2label)]
    if data.label_names is not None and not set(data.label_names) <= set(own_names):
        raise ValueError(
            f"the labels are names ({', '.join(map(str, data.label_names[:8]))}), and the model calls its classes "
            f"{', '.join(map(str, own_names[:8]))}: give labels as integers, or name the classes in config.id2label"
        )
    return replace(data, evaluation=data.train)
