"""What is still found in a long text: pass key, needle, key and value, and perplexity, by attention, length and depth.

The texts are those of `distattn evaluate --task`, the same ones for every student of one checkpoint. Teacher and
"window" (sinks and window alone) are the two ends between which the others lie. A student is made when a row of it is
missing: "l2" and "nystrom" are then fitted, which takes minutes; `keep=true` saves them.
"""

import copy
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from ..analysis.figure_style import COLOURS, INK, new_figure, save_figure, styled
from ..analysis.retrieval_map import retrieval_map
from ..benchmark.measure import only_errors
from ..conversion.beyond import SELECTIONS, largest_errors, take_share
from ..conversion.cache_bytes import TOKENS, cache_bytes
from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert
from ..conversion.observe import read_share
from ..conversion.probe import probe
from ..core.attention_spec import AttentionSpec
from ..data.batches import MAX_LENGTH, MAX_TOKENS, calibration_batch
from ..data.sources import read_texts
from ..data.tokenizer import byte_level_bpe
from ..evaluation.long_text_scores import LongTextOptions, check_model, score_cell
from ..evaluation.retrieval_tasks import RETRIEVAL_TASKS, Haystack, Question
from ..storage.folders import json_values, save_checkpoint
from ..storage.models import load_checkpoint
from .compensation_token import compensated

STUDENTS = ("teacher", "window", "compensation", "retrieval", "fixed", "blocks", "l2", "nystrom", "nystrom+retrieval")
TASKS = (*RETRIEVAL_TASKS, "perplexity")
MADE = "made"
# In the folder of a student that is kept: what it was made of.
NOTE = "long_context_student.json"


@dataclass(frozen=True)
class Options:
    """Options of the experiment.

    checkpoint: a causal language model. data: what the texts are made of, and what is fitted on (of "news" articles
    that no text is made of; of a file the same). "made", of either: a small Llama with random weights, the package's
    own source; they need nothing installed, and say nothing but that it runs.
    students: "teacher"; "window": sinks and window alone, and "compensation": these and one mean key and value for all
    between them, both once for each of `windows` (none: window_size); "retrieval", once for each of `min_weights` (by
    which queries read blocks); "fixed", once for each of `blocks` (how many a query reads); "blocks": the same without
    the far field; "l2": exact attention by distance; "nystrom": all heads;
    "nystrom+retrieval", once for each of `shares` (of the key heads, chosen by `select`: "error" or "probe"). refit:
    each by a fit of its own, as `convert` does; false: all from one fit of all heads, which for "error" is the same,
    and for "probe" differs in what the layers above saw in the fit.
    tasks, lengths, depths, samples, tail: as in `LongTextOptions`.
    steps, fit_length, fit_tokens, probe_lengths, seed: of the fits, as in `CalibrationOptions`; null: its defaults.
    num_landmarks, window_size, num_sinks, block_size, exact_below, cluster_keys: of the students (`AttentionSpec`).
    device: "auto" is cuda where there is one. keep: save each fitted student as a checkpoint in STUDENT of the folder,
    from where a run that goes on loads it, and `distattn evaluate` can.
    """

    checkpoint: str = "smollm2-135m"
    data: str = "news"
    students: tuple[str, ...] = ("teacher", "window", "retrieval", "l2", "nystrom", "nystrom+retrieval")
    tasks: tuple[str, ...] = TASKS
    lengths: tuple[int, ...] = (1024, 2048)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 20
    tail: int = 256
    windows: tuple[int, ...] = ()
    min_weights: tuple[float, ...] = (0.003,)
    blocks: tuple[int, ...] = (16,)
    shares: tuple[float, ...] = (0.1,)
    select: str = "probe"
    refit: bool = True
    steps: int | None = None
    fit_length: int | None = None
    fit_tokens: int | None = None
    probe_lengths: tuple[int, ...] = (1024,)
    seed: int = 0
    num_landmarks: int = 64
    window_size: int = 64
    num_sinks: int = 4
    block_size: int = 16
    exact_below: int = 0
    cluster_keys: bool = True
    device: str = "auto"
    keep: bool = False

    def __post_init__(self):
        for name, allowed in (("students", STUDENTS), ("tasks", TASKS)):
            values = getattr(self, name)
            if not values or not set(values) <= set(allowed):
                raise ValueError(f"{name} must be some of {', '.join(allowed)}, got {', '.join(values) or 'none'}")
        for name, allowed in (("select", SELECTIONS), ("device", ("auto", "cpu", "cuda"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        self.texts(self.tasks[0])
        self.made()

    def texts(self, task: str) -> LongTextOptions:
        """Return what is asked for a task."""
        return LongTextOptions(task, self.lengths, self.depths, self.samples, tail=self.tail)

    def made(self) -> dict[str, tuple[AttentionSpec | int | None, CalibrationOptions | None]]:
        """Return {student as rows call it: (its spec, of "compensation" its window, None for the teacher; the options
        of its fit, if it has one)}.
        """

        def near(**fields):
            return AttentionSpec(**{"window_size": self.window_size, "num_sinks": self.num_sinks, **fields})

        def blocks(count, far_field):
            return retrieval(num_blocks=count, min_weight=0.0, far_field=far_field)

        def retrieval(**options):
            options = {"block_size": self.block_size, "cluster_keys": self.cluster_keys, **options}
            return near(mechanism="retrieval", **options)

        def fit(**choice):
            return CalibrationOptions(
                steps=self.steps, max_length=self.fit_length, max_tokens=self.fit_tokens, seed=self.seed,
                progress=sys.stderr.isatty(), probe_lengths=self.probe_lengths, **choice,
            )  # fmt: skip

        nystrom = {"mechanism": "nystrom", "num_landmarks": self.num_landmarks, "exact_below": self.exact_below}
        beyond = {"beyond": "retrieval", "block_size": self.block_size, "cluster_keys": self.cluster_keys}
        where = "" if self.cluster_keys else ", blocks of the text"
        # Exactly the window, which goes on to the start of its unit in clusters.
        alone = {"num_blocks": 0, "min_weight": 0.0, "far_field": False, "cluster_keys": False}
        windows = {
            size: "" if size == self.window_size else f" of {size}" for size in self.windows or (self.window_size,)
        }
        found = {
            "teacher": {"teacher": (None, None)},
            "window": {
                f"sinks and window{of}": (retrieval(window_size=size, **alone), None) for size, of in windows.items()
            },
            "compensation": {f"sinks, window{of} and a mean": (size, None) for size, of in windows.items()},
            "retrieval": {
                f"retrieval, weight {least:g}{where}": (retrieval(min_weight=least), None)
                for least in self.min_weights
            },
            "fixed": {f"retrieval, {count} blocks{where}": (blocks(count, True), None) for count in self.blocks},
            "blocks": {f"{count} blocks alone{where}": (blocks(count, False), None) for count in self.blocks},
            "l2": {"l2": (AttentionSpec("l2"), fit())},
            "nystrom": {"nystrom": (near(**nystrom), fit())},
            "nystrom+retrieval": {
                f"nystrom + {share:.3g} retrieval{where}": (
                    near(**nystrom, **beyond), fit(beyond_share=share, select=self.select)
                )
                for share in self.shares
            },
        }  # fmt: skip
        return {label: entry for name in self.students for label, entry in found[name].items()}


QUICK = {
    "checkpoint": MADE, "data": MADE,
    "lengths": (128, 200), "depths": (0.0, 1.0), "samples": 2, "tail": 32, "min_weights": (0.03,), "blocks": (2,),
    "shares": (0.25,),
    "block_size": 4, "steps": 2, "fit_length": 200, "fit_tokens": 800, "probe_lengths": (180,),
    "num_landmarks": 8, "window_size": 16,
    "num_sinks": 2,
}  # fmt: skip
AXES = ("students", "tasks", "lengths", "depths", "windows", "min_weights", "blocks", "shares", "keep")


@only_errors("transformers")
def run(options: Options, results) -> None:
    """Ask every student about every text that the record lacks; students one after another, made when needed."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be 'auto' or 'cpu' here, where there is no GPU, got 'cuda'")
    device = {"auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(options.device, options.device)
    teacher, tokenizer = made_checkpoint() if options.checkpoint == MADE else load_checkpoint(options.checkpoint)
    teacher.eval().to(device)
    text = Haystack(tokenizer, _texts(options, "test"))
    cells = []
    for task in options.tasks:
        asked = options.texts(task)
        check_model(options.checkpoint, teacher, asked)
        cells += [(asked, cell, asked.questions(text, **cell)) for cell in asked.cells()]

    def fitted(label, spec, fit):
        kept = results.path.parent / re.sub(r"\W+", "-", label)
        of = {"checkpoint": options.checkpoint, "data": options.data, "spec": asdict(spec)}
        of = json_values({**of, "fit": {name: value for name, value in asdict(fit).items() if name != "progress"}})
        if options.keep and kept.is_dir():
            return _load_kept(kept, of).to(device)
        made = convert(teacher, spec, calibration=_texts(options, "train"), tokenizer=tokenizer, options=fit)
        if options.keep:
            save_checkpoint(made, tokenizer, kept, notes={NOTE: of})
        return made

    @cache
    def fitted_once():
        spec, fit = next(entry for entry in options.made().values() if entry[1] and entry[1].beyond_share)
        # No error is above that.
        alone = replace(fit, beyond_share=None, select="error", max_error=math.inf)
        return FittedOnce(fitted("nystrom of all heads", spec, alone), fit, _texts(options, "train"), tokenizer)

    for label, (spec, fit) in options.made().items():

        @cache
        def student(label=label, spec=spec, fit=fit):
            if spec is None:
                return teacher
            if isinstance(spec, int):
                return compensated(teacher, spec, options.num_sinks)
            if fit is None:
                return convert(teacher, spec)
            if fit.beyond_share is None or options.refit:
                return fitted(label, spec, fit)
            return fitted_once().with_share(fit.beyond_share)

        for asked, cell, questions in cells:
            key = {"student": label, "task": asked.task, **cell}
            results.row(key, partial(_measure, student, spec, questions, asked))


class FittedOnce:
    """A Nyström student of all heads, and how much each key head wants to do what its spec's `beyond` says."""

    def __init__(self, student, fit: CalibrationOptions, texts: list[str], tokenizer):
        self.student, self.fit = student, fit
        modules = student.attention_modules()
        self.groups = {name: getattr(modules[name], "num_key_value_groups", 1) for name in student.attention_states}
        if fit.select == "probe":
            sizes = {"max_length": fit.max_length or 2 * MAX_LENGTH, "max_tokens": fit.max_tokens or 2 * MAX_TOKENS}
            batch = calibration_batch(student, texts, tokenizer, seed=fit.seed, **sizes)
            self.scores, self.groups = probe(student, batch, fit)
        else:
            self.scores = largest_errors(student, self._figures(), self.groups)

    def _figures(self) -> dict[str, list[dict]]:
        figures: dict[str, list[dict]] = {}
        for group in self.student.conversion_report.groups:
            figures.setdefault(group.module, []).append({"output_error": torch.tensor(group.output_error)})
        return figures

    @torch.no_grad()
    def with_share(self, share: float):
        """Return a copy in which this share of the key heads does so."""
        student = copy.deepcopy(self.student)
        take_share(student, self._figures(), self.scores, self.groups, replace(self.fit, beyond_share=share))
        return student


def _load_kept(folder: Path, of: dict):
    note = folder / NOTE
    if not note.is_file():
        raise ValueError(f"keep: {str(folder)!r} is there and holds no {NOTE}, so no student of this experiment")
    before = json.loads(note.read_text(encoding="utf-8"))
    if changed := [name for name in of if before.get(name) != of[name]]:
        name = changed[0]
        raise ValueError(
            f"keep: {str(folder)!r} holds a student of another {name}, {before.get(name)!r} in place of {of[name]!r}; "
            "take it away, or give another folder (--out)"
        )
    return load_checkpoint(folder)[0]


def made_texts() -> list[str]:
    """Return texts that are in every installation: the source of `evaluation`."""
    folder = Path(__file__).parents[1] / "evaluation"
    return [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py"))]


def made_checkpoint() -> tuple:
    """Return a Llama of two layers with random weights, the same ones each time, and a tokenizer of `made_texts`."""
    tokenizer = byte_level_bpe(made_texts(), 2000)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def _texts(options: Options, split: str) -> list[str]:
    return made_texts() if options.data == MADE else read_texts(options.data, split=split)


def _measure(student: Callable, spec: AttentionSpec | int | None, questions: list, asked: LongTextOptions) -> dict:
    model = student()
    with tqdm(total=len(questions), desc=asked.task, disable=not sys.stderr.isatty(), leave=False) as bar:
        scores = score_cell(model, questions, asked, bar=bar)
    return {**scores, **_sizes(model, spec, questions[0])}


def _sizes(model, spec: AttentionSpec | int | None, question: Question) -> dict[str, float]:
    """Return the bytes of a text's cache and, of retrieval, the share of its keys that its answer's queries read.

    The controls have no such cache: they keep keys that nothing reads.
    """
    values, length = {}, question.ids.shape[1]
    if isinstance(spec, int):
        return values
    if spec is not None and spec.mechanism == "retrieval":
        values["share_read"] = read_share(model, question.ids.to(model.device), question.answer)
    if spec is None or spec.num_blocks != 0:
        sizes = cache_bytes(model)
        values["cache_bytes"] = sizes["growing"] * length // TOKENS + sizes["constant"]
    return values


def figures(results, folder: Path) -> None:
    """Draw a heat map of each task that hides something, and perplexity by length."""
    for task in RETRIEVAL_TASKS:
        if rows := [row for row in results.rows if row["task"] == task]:
            count = rows[0]["samples"]
            save_figure(retrieval_map(rows, f"{task}: exact answers (%) of {count} texts", by="student"), folder / task)
    if rows := [row for row in results.rows if row["task"] == "perplexity"]:
        save_figure(perplexity_curves(rows), folder / "perplexity")


@styled
def perplexity_curves(rows: list[dict]):
    """Draw the perplexity of the same last tokens against the length of the text that they end, by student."""
    figure = new_figure(5.5, 3.5)
    axes = figure.subplots()
    for number, student in enumerate(dict.fromkeys(row["student"] for row in rows)):
        own = sorted((row["length"], row["perplexity"]) for row in rows if row["student"] == student)
        colour = (INK, *COLOURS)[number % (len(COLOURS) + 1)]
        axes.plot(*zip(*own, strict=True), marker=".", color=colour, label=student)
    axes.set(xscale="log", xlabel="tokens of the text", ylabel="perplexity of its last tokens")
    lengths = sorted({row["length"] for row in rows})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure
