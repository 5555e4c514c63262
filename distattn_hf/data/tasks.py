"""The tasks of model heads: one row each, with the properties that data, evaluation, training and the Hub need."""

from dataclasses import dataclass

from ..core.configuration_distattn import CLASS_PREFIX


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: its name in configs.
        auto_class: transformers' Auto class of the head.
        metric, higher_is_better: the main score on a scorecard, and its direction.
        pipeline_tag: the Hub's name of the task; None if it has none.
        shifted: whether logits at i predict the label at i + 1.
        reads_text: whether plain text alone is enough to score a model.
        inputs: what a row holds beside labels: "text", "image" or "sound" (see `features`).
    """

    name: str
    auto_class: str
    metric: str
    higher_is_better: bool
    pipeline_tag: str | None
    shifted: bool = False
    reads_text: bool = True
    inputs: str = "text"

    @property
    def is_language_model(self) -> bool:
        """Whether a model can learn the task from text without labels, as in `distattn train`."""
        return self.metric == "perplexity" and self.inputs == "text"

    def covers(self, model) -> bool:
        """Return whether `model` has this head: transformers' own, converted, or registered with the Auto class."""
        import transformers

        name = type(model).__name__.removeprefix(CLASS_PREFIX)
        mapping = getattr(transformers, self.auto_class)._model_mapping
        listed = {
            n for value in mapping._model_mapping.values() for n in ((value,) if isinstance(value, str) else value)
        }
        suffix = self.auto_class.removeprefix("AutoModel")
        matches_suffix = not self.reads_text and name.endswith(suffix)
        return matches_suffix or name in listed or mapping._extra_content.get(type(model.config)) is type(model)


# `task_of` takes the first match: BartForConditionalGeneration is also listed as a masked language model.
# Sequence-to-sequence has no pipeline tag: the Hub and transformers 5 dropped text2text-generation.
TASKS = {
    task.name: task
    for task in (
        Task("causal-lm", "AutoModelForCausalLM", "perplexity", False, "text-generation", shifted=True),
        Task("seq2seq", "AutoModelForSeq2SeqLM", "perplexity", False, None),
        Task("masked-lm", "AutoModelForMaskedLM", "perplexity", False, "fill-mask"),
        # Before sequence classification, as which some models of sound are named.
        Task("audio-classification", "AutoModelForAudioClassification", "accuracy", True, "audio-classification",
             reads_text=False, inputs="sound"),
        Task("image-classification", "AutoModelForImageClassification", "accuracy", True, "image-classification",
             reads_text=False, inputs="image"),
        Task("speech-recognition", "AutoModelForSpeechSeq2Seq", "perplexity", False, "automatic-speech-recognition",
             reads_text=False, inputs="sound"),
        Task("sequence-classification", "AutoModelForSequenceClassification", "accuracy", True, "text-classification",
             reads_text=False),
        Task("token-classification", "AutoModelForTokenClassification", "accuracy", True, "token-classification",
             reads_text=False),
        Task("embedding", "AutoModel", "mrr", True, None),
    )
}  # fmt: skip
LANGUAGE_MODELS = tuple(name for name, task in TASKS.items() if task.is_language_model)


def task_of(model) -> str:
    """Return the task of a model's head, one of `TASKS`. Raises `ValueError` naming the class for any other head."""
    for name, task in TASKS.items():
        if task.covers(model):
            return name
    raise ValueError(f"{type(model).__name__} has a head that is for no task known here: {', '.join(TASKS)}")


def text_task_of(model) -> str:
    """Return the task as `task_of` does; also raises `ValueError` for a classifier: plain text has no labels."""
    task = next((name for name, task in TASKS.items() if task.covers(model)), None)
    if task is None or not TASKS[task].reads_text:
        raise ValueError(
            f"{type(model).__name__} has a head that cannot be evaluated on plain text; expected a causal, masked or "
            "sequence-to-sequence language model, or an encoder"
        )
    return task
