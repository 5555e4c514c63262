"""How attention by distance looks beside attention by dot product (phase 2 of the research plan).

One checkpoint, converted plain (no fit) and calibrated, by several metrics: entropy, sparsity and locality of its
heads, and how near outputs and maps are to the teacher's. The plan expects Euclidean attention to be more local. Both
models read the same text, each on its own hidden states, so that a plain conversion, which ruins the model, also looks
at other states. Models trained from scratch with one attention each (`folders`) have no teacher to compare with.
"""

from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

from ..analysis.comparison import compare
from ..analysis.figure_style import COLOURS, new_figure, save_figure, styled
from ..analysis.samples import AnalysisOptions, make_batches
from ..analysis.statistics import measure
from ..conversion.calibrate import CalibrationOptions
from ..conversion.convert import convert
from ..core.attention_spec import AttentionSpec
from ..data.sources import calibration_and_held_out
from ..evaluation.score import EvaluationOptions, evaluate_model
from ..storage.models import load_checkpoint

INITS = ("plain", "calibrated")
# Texts that calibrate, at most.
_CALIBRATION = 200
_NUMBERS = ("entropy", "sparsity", "maximum", "distance")
AXES = ("metrics", "inits", "folders")


@dataclass(frozen=True)
class Options:
    """checkpoint: a name or folder of a causal model, the teacher, which is the row "dot". metrics: of its conversions,
    by each of inits: plain, calibrated. folders: of further models, measured by themselves.

    data: as `distattn evaluate` takes it; "news" has a part of its own for calibration, and of other sources the last
    tenth is measured and the rest calibrates. max_length, max_tokens: measured. calibration_tokens, calibration_steps:
    of the fits; null: as in `convert`.
    """

    checkpoint: str = "smollm2-135m"
    metrics: tuple[str, ...] = ("l2", "sqeuclidean", "l1", "cosine")
    inits: tuple[str, ...] = INITS
    folders: tuple[str, ...] = ()
    data: str = "news"
    max_length: int = 256
    max_tokens: int = 1024
    calibration_tokens: int = 8192
    calibration_steps: int | None = None

    def __post_init__(self):
        for init in self.inits:
            if init not in INITS:
                raise ValueError(f"inits must be among {', '.join(INITS)}, got {init!r}")
        for name in ("max_length", "max_tokens", "calibration_tokens"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be >= 2, got {getattr(self, name)!r}")
        for metric in self.metrics:
            AttentionSpec(metric)


QUICK = {"metrics": ("l2",), "max_length": 32, "max_tokens": 64, "calibration_tokens": 256, "calibration_steps": 8}


def run(options: Options, results) -> None:
    """Measure a row for the teacher, each conversion of it, and each folder."""
    results.row({"attention": "dot", "init": "teacher"}, lambda: _measure(options, *_teacher(options.checkpoint)))
    for metric in options.metrics:
        for init in options.inits:
            results.row({"attention": metric, "init": init}, lambda m=metric, i=init: _converted(options, m, i))
    for folder in options.folders:
        results.row({"attention": folder, "init": "scratch"}, lambda f=folder: _measure(options, *load_checkpoint(f)))


@lru_cache(maxsize=1)
def _teacher(checkpoint: str):
    return load_checkpoint(checkpoint)


def _converted(options: Options, metric: str, init: str) -> dict:
    teacher, tokenizer = _teacher(options.checkpoint)
    steps = {} if options.calibration_steps is None else {"steps": options.calibration_steps}
    fit = {
        "calibration": calibration_and_held_out(options.data)[0][:_CALIBRATION],
        "tokenizer": tokenizer,
        "options": CalibrationOptions(max_tokens=options.calibration_tokens, progress=False, **steps),
    }
    student = convert(teacher, AttentionSpec(metric), init=init, **(fit if init == "calibrated" else {}))
    return _measure(options, student, tokenizer, teacher)


def _measure(options: Options, model, tokenizer, teacher=None) -> dict:
    """Return means over heads, each layer's mean distance, perplexity, and how near the teacher a student is."""
    texts = calibration_and_held_out(options.data)[1]
    sizes = {"max_length": options.max_length, "max_tokens": options.max_tokens}
    batches = make_batches(model, tokenizer, texts, AnalysisOptions(**sizes))
    statistics = measure(model, batches, tokenizer)
    values = {name: fmean(getattr(head, name) for head in statistics.heads) for name in _NUMBERS}
    values["collapsed_heads"] = fmean(float(head.collapsed) for head in statistics.heads)
    values["distance_by_layer"] = [
        round(fmean(head.distance for head in statistics.of(module)), 3) for module in statistics.modules
    ]
    values["pattern_counts"] = statistics.pattern_counts()
    values["perplexity"] = evaluate_model(model, tokenizer, texts, options=EvaluationOptions(progress=False, **sizes))[
        "perplexity"
    ]
    near = None if teacher is None else compare(model, teacher, batches)
    values["output_cosine"] = None if near is None else fmean(near.output_cosine.values())
    for name in ("correlation", "divergence"):
        values[name] = None if near is None else fmean(getattr(head, name) for head in near.heads)
    return values


@styled
def figures(results, folder) -> list:
    """Draw each layer's mean attended distance, a line for each attention and init."""
    figure = new_figure(6, 4)
    axes = figure.subplots()
    attentions = list(dict.fromkeys(row["attention"] for row in results.rows))
    colours = dict(zip(attentions, ("#000000", *COLOURS) * len(attentions)))
    for row in results.rows:
        style = "--" if row["init"] == "plain" else "-"
        axes.plot(
            row["distance_by_layer"], style, color=colours[row["attention"]], label=f"{row['attention']}, {row['init']}"
        )
    axes.set(xlabel="layer", ylabel="mean attended distance (tokens)", ylim=(0, None))
    axes.legend(frameon=False, fontsize=7)
    return save_figure(figure, folder / "patterns")
