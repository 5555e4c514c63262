"""RULER (Hsieh et al., 2024) by lm-eval's own tasks: the six that need no download, at short lengths, too.

The YAML files of configs/evaluation/ruler include lm-eval's and add the lengths that it does not score.
"""

import io
import logging
import random
import shutil
import sys
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy
import pandas
import torch

from ..core.discovery import max_positions
from ..data.config import is_integer, read_mapping
from ..data.shipped import CONFIGS
from ..data.tasks import text_task_of

FOLDER = CONFIGS / "evaluation" / "ruler"
# Task -> the fewest tokens of a text in which lm-eval can make it, in a tokenizer that reads words as SmolLM2's does;
# below them it leaves answers out (cwe) or tries for ever (vt).
TASKS = {
    "niah_single_1": 512, "niah_multikey_2": 512, "niah_multikey_3": 512, "vt": 1024, "fwe": 1024, "cwe": 2048,
}  # fmt: skip
# What lm-eval's tasks are made of, and how many tokens of SmolLM2's that is.
SAMPLE = "The grass is green. One of the special magic numbers for cheerful-hedge is: 7123456. VAR XKLQP = 12345"
SAMPLE_TOKENS = 41
# lm-eval makes texts of so many tokens with the answer, and puts the beginning of the answer on top.
ANSWER_BEGINS = 64
NEEDED = ("lm_eval", "wonderwords", "nltk", "scipy")


def scored_lengths() -> list[int]:
    """Return the lengths that the YAML files score."""
    return [int(entry["metric"]) for entry in read_mapping(FOLDER / "lengths.yaml", "lengths")["metric_list"]]


@dataclass(frozen=True)
class RulerOptions:
    """What is asked: texts of `lengths` tokens, the answer's included, `samples` of each task and length.

    Raises `ValueError` for a length that is not scored, and for other than positive numbers.
    """

    lengths: tuple[int, ...] = (1024, 2048)
    samples: int = 20
    progress: bool = False

    def __post_init__(self):
        known = scored_lengths()
        if not self.lengths or not all(length in known for length in self.lengths):
            raise ValueError(f"lengths must be among {', '.join(map(str, known))} for ruler, got {self.lengths!r}")
        if not is_integer(self.samples, 1) or self.samples > 500:
            raise ValueError(f"samples must be from 1 to lm-eval's 500 texts, got {self.samples!r}")

    def cells(self, tokenizer) -> list[tuple[str, int]]:
        """Return (task, length) of all that can be made with a tokenizer; one with more tokens needs longer texts.

        Raises `ValueError` where that is none.
        """
        ratio = max(1.0, len(tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]) / SAMPLE_TOKENS)
        cells = [(task, n) for n in self.lengths for task, least in TASKS.items() if n >= ratio * least]
        if not cells:
            raise ValueError(
                f"lengths must have one of {ratio * min(TASKS.values()):.0f} or more for RULER in the tokens of this "
                f"tokenizer, got {self.lengths!r}"
            )
        return cells


def require_lm_eval() -> None:
    """Raise `ValueError` with the install command where lm-eval, or what its RULER needs, is absent."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"task 'ruler' runs lm-eval's tasks, and {missing[0]} is absent: pip install 'lm-eval[ruler]'")


def evaluate_ruler(models: dict, tokenizer, options: RulerOptions) -> list[dict]:
    """Return a row for each task, length and model: {"model", "task", "length", "score", "samples"}.

    score: lm-eval's, the share of the asked words that the greedy continuation has, mean over texts, which are the same
    for all models. Tasks that cannot be made at a length have no row. models: {name: model}, causal, of one tokenizer.

    Raises `ValueError`, before any model is run, without lm-eval, for another kind of model and for too few positions.
    """
    require_lm_eval()
    for name, model in models.items():
        if (kind := text_task_of(model)) != "causal-lm":
            raise ValueError(f"task 'ruler' needs a causal model, and {name!r} is {type(model).__name__} ({kind})")
        limit = max_positions(model.config)
        if limit is not None and (longest := max(options.lengths)) + ANSWER_BEGINS > limit:
            raise ValueError(
                f"lengths must be at most {limit - ANSWER_BEGINS}, the positions of {name!r} ({limit}) less "
                f"{ANSWER_BEGINS} for the beginning of an answer; got {longest}"
            )
    cells = options.cells(tokenizer)
    rows = []
    with TemporaryDirectory() as folder, _quiet(options.progress), _left_as_it_was():
        _lay_out(Path(folder), tokenizer)
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        for task, length in cells:
            metadata = {"max_seq_lengths": [length], "tokenizer": str(Path(folder, "tokenizer"))}
            manager = TaskManager(include_path=folder, include_defaults=False, metadata=metadata)
            # lm-eval draws from both as it makes the texts.
            random.seed(0)
            numpy.random.seed(0)
            loaded = manager.load([str(Path(folder, f"{task}.yaml"))])
            (made,) = loaded["tasks"].values()
            made.set_config(key="num_fewshot", value=0)
            for name, model in models.items():
                lm = HFLM(
                    pretrained=model, tokenizer=tokenizer, batch_size=1, device=str(model.device),
                    max_length=length + ANSWER_BEGINS,
                )  # fmt: skip
                with torch.no_grad():
                    found = evaluate(lm, loaded, limit=options.samples, bootstrap_iters=0, log_samples=False)
                (scores,) = found["results"].values()
                score, samples = scores[f"{length},none"], min(options.samples, len(made.dataset["test"]))
                rows.append({"model": name, "task": task, "length": length, "score": score, "samples": samples})
    return rows


def _lay_out(folder: Path, tokenizer) -> None:
    """Put the YAML files where their includes lead to lm-eval's, and the tokenizer where its tasks load it from."""
    import nltk

    for file in FOLDER.glob("*.yaml"):
        shutil.copy(file, folder)
    (folder / "lm_eval_ruler").symlink_to(Path(find_spec("lm_eval").origin).parent / "tasks" / "ruler")
    tokenizer.save_pretrained(folder / "tokenizer")
    # lm-eval downloads this as it is imported, unless there is one; none of these tasks reads it.
    (folder / "nltk" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    nltk.data.path.append(str(folder / "nltk"))


@contextmanager
def _left_as_it_was():
    """Put back what is drawn from, and where nltk looks for data, which lie outside lm-eval and its tasks."""
    import nltk

    states, path = (random.getstate(), numpy.random.get_state(), torch.get_rng_state()), list(nltk.data.path)
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        nltk.data.path[:] = path


@contextmanager
def _quiet(progress: bool):
    """Keep what lm-eval prints from standard output; without progress from standard error, too."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with ExitStack() as stack:
            stack.enter_context(redirect_stdout(sys.stderr if progress else io.StringIO()))
            if not progress:
                stack.enter_context(redirect_stderr(io.StringIO()))
            yield
    finally:
        logger.setLevel(level)


def ruler_table(rows: list[dict]) -> str:
    """Format rows of `evaluate_ruler` for a terminal: scores by task, and their mean, by model and length."""
    frame = pandas.DataFrame(rows)
    grid = frame.pivot_table("score", ["model", "length"], "task", sort=False)
    grid["mean"] = grid.mean(axis=1)
    return f"share of what was asked for, by task:\n{grid.to_string(float_format='{:.2f}'.format, na_rep='-')}"
