"""Score causal models on long texts: what they find, how well they predict, whether they go on as the teacher does."""

import math
from contextlib import ExitStack
from dataclasses import dataclass

import pandas
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..core.discovery import max_positions
from ..data.config import is_integer, is_number
from ..data.tasks import text_task_of
from .retrieval_tasks import LONG_TEXT_TASKS, RETRIEVAL_TASKS, Haystack, Question, questions
from .score import warn_without_far_keys


@dataclass(frozen=True)
class LongTextOptions:
    """What is asked of how long texts.

    Args:
        task: "passkey", "needle", "kv", "perplexity" or "generation".
        lengths: tokens of a text, its question and answer included.
        depths: where something is hidden, 0 (at the beginning) to 1 (before the question).
        samples: texts of each length and depth.
        new_tokens: that "generation" compares.
        tail: the last tokens of a text, which "perplexity" scores.
        progress: show a progress bar.
    """

    task: str
    lengths: tuple[int, ...] = (1024, 2048)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 20
    new_tokens: int = 64
    tail: int = 256
    progress: bool = False

    def __post_init__(self):
        if self.task not in LONG_TEXT_TASKS:
            raise ValueError(f"task must be one of {', '.join(LONG_TEXT_TASKS)}, got {self.task!r}")
        for name in ("samples", "new_tokens", "tail"):
            if not is_integer(value := getattr(self, name), 1):
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not self.lengths or not all(is_integer(length, 2) for length in self.lengths):
            raise ValueError(f"lengths must be integers >= 2, got {self.lengths!r}")
        if not self.depths or not all(is_number(depth) and 0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths must be shares from 0 to 1, got {self.depths!r}")

    def cells(self) -> list[dict]:
        """Return what tells the cells apart: {"length"} and, where something is hidden, {"depth"}."""
        depths = [{"depth": depth} for depth in self.depths] if self.task in RETRIEVAL_TASKS else [{}]
        return [{"length": length, **depth} for length in self.lengths for depth in depths]

    def questions(self, text: Haystack, length: int, depth: float | None = None) -> list[Question]:
        """Return the texts of a cell; raises `ValueError` as `retrieval_tasks.questions`."""
        return questions(self.task, text, length, depth, self.samples, self.tail)


def check_model(name: str, model, options: LongTextOptions) -> None:
    """Raise `ValueError` for a model that is no causal language model, or has fewer positions than a text has tokens.

    name: how messages call it.
    """
    if (kind := text_task_of(model)) != "causal-lm":
        raise ValueError(
            f"task {options.task!r} needs a causal language model, and {name!r} is {type(model).__name__} ({kind})"
        )
    limit, added = max_positions(model.config), options.new_tokens if options.task == "generation" else 0
    if limit is not None and (longest := max(options.lengths)) + added > limit:
        more = f" less {added} new tokens" if added else ""
        raise ValueError(
            f"lengths must be at most {limit - added}, the positions of {name!r} ({limit}){more}; got {longest}"
        )


def evaluate_long_texts(
    models: dict, text: Haystack, options: LongTextOptions, teacher: str | None = None
) -> list[dict]:
    """Return a row for each model and cell: {"model", "length", "depth"?} and what `score_questions` gives.

    models: {name: model}; teacher: the name of the one that "generation" compares the others with.

    Raises `ValueError`, before any model is run, as `check_model` and `questions`, and for "generation" without a
    teacher.
    """
    if options.task == "generation" and (teacher is None or len(models) < 2):
        raise ValueError("task 'generation' compares a model with its teacher; give one (--against)")
    for name, model in models.items():
        check_model(name, model, options)
    cells = [(cell, options.questions(text, **cell)) for cell in options.cells()]
    compared = [name for name in models if name != teacher or options.task != "generation"]
    rows, total = [], len(cells) * len(models) * options.samples
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(warn_without_far_keys(model))
        bar = stack.enter_context(tqdm(total=total, desc=options.task, disable=not options.progress, leave=False))
        for cell, asked in cells:
            reference = continuations(models[teacher], asked, options, bar) if options.task == "generation" else None
            for name in compared:
                rows.append({"model": name, **cell, **score_cell(models[name], asked, options, reference, bar)})
    return rows


def score_cell(model, asked: list[Question], options: LongTextOptions, reference=None, bar=None) -> dict[str, float]:
    """Return the scores of a model on the texts of one cell.

    reference: for "generation", what the teacher went on with (see `continuations`).
    """
    model.eval()
    if options.task == "generation":
        return agreement(continuations(model, asked, options, bar), reference)
    return score_questions(model, asked, options.task, bar)


@torch.no_grad()
def score_questions(model, asked: list[Question], task: str, bar=None) -> dict[str, float]:
    """Return how well a model answers, given the answer up to each token.

    {"exact": share of texts all of whose answer's tokens are the likeliest ones, "hits": their number, "samples",
    "log_loss": mean over texts of the nats a token of the answer}; of "perplexity" {"perplexity", "log_loss",
    "samples", "tokens"}.
    """
    hits, losses = 0, []
    for question in asked:
        logits = answer_logits(model, question)
        answer = question.ids[0, -question.answer :].to(logits.device)
        hits += bool((logits.argmax(-1) == answer).all())
        losses.append(F.cross_entropy(logits, answer).item())
        if bar is not None:
            bar.update()
    log_loss = math.fsum(losses) / len(losses)
    if task == "perplexity":
        tokens = sum(question.answer for question in asked)
        perplexity = math.exp(min(log_loss, 80.0))
        return {"perplexity": perplexity, "log_loss": log_loss, "samples": len(asked), "tokens": tokens}
    return {"exact": hits / len(asked), "hits": hits, "samples": len(asked), "log_loss": log_loss}


def answer_logits(model, question: Question) -> Tensor:
    """Return the logits (answer, V), in float32, of which each predicts the next token of the answer."""
    ids = question.ids.to(model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=question.answer + 1).logits[0]
    # A model that takes any argument may know nothing of this one, and give all.
    return logits[-question.answer - 1 : -1].float()


@torch.no_grad()
def continuations(model, asked: list[Question], options: LongTextOptions, bar=None) -> list[Tensor]:
    """Return options.new_tokens (n,) for each text, greedily chosen; an end token does not end them."""
    tokens = []
    for question in asked:
        ids = question.ids.to(model.device)
        sequence = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, max_new_tokens=options.new_tokens,
            min_new_tokens=options.new_tokens, pad_token_id=model.generation_config.pad_token_id or 0,
        )  # fmt: skip
        tokens.append(sequence[0, ids.shape[1] :].cpu())
        if bar is not None:
            bar.update()
    return tokens


def agreement(ours: list[Tensor], theirs: list[Tensor]) -> dict[str, float]:
    """Compare continuations (n,) with the teacher's.

    {"agreement": share of tokens that are the same at the same place, "first_divergence": mean of how many are the same
    before the first that is not (n where all are), "identical": share of texts of which all are, "samples",
    "new_tokens"}.
    """
    equal = torch.stack([mine == other for mine, other in zip(ours, theirs, strict=True)])
    return {
        "agreement": equal.double().mean().item(),
        "first_divergence": equal.long().cumprod(-1).sum(-1).double().mean().item(),
        "identical": equal.all(-1).double().mean().item(),
        "samples": len(equal),
        "new_tokens": equal.shape[1],
    }


def score_table(rows: list[dict]) -> str:
    """Format rows of `evaluate_long_texts` for a terminal; with depths, exact answers in a grid, length by depth."""
    frame = pandas.DataFrame(rows)
    if "depth" not in frame:
        counts = [name for name in ("samples", "tokens", "new_tokens") if name in frame]
        return frame.drop(columns=counts).to_string(index=False, float_format="{:.4f}".format)
    grid = frame.pivot_table("exact", ["model", "length"], "depth", sort=False)
    grid["all"] = grid.mean(axis=1)
    # dropna: a model may give NaN everywhere.
    grid["log-loss"] = frame.pivot_table("log_loss", ["model", "length"], sort=False, dropna=False)["log_loss"]
    return f"share of exact answers, by depth:\n{grid.to_string(float_format='{:.2f}'.format)}"
