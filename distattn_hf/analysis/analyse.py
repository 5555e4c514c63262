"""Analyse a checkpoint: check all inputs, then measure, draw and write the results to one folder."""

import json
import platform
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch
import transformers

from ..conversion.report_of_model import current_report
from ..core.modeling_converted import DistAttnModelMixin
from ..data.datasets import check_tokenizers
from ..data.tasks import text_task_of
from ..evaluation.scorecard import Scorecard
from ..storage.folders import staging_folder
from ..storage.models import load_checkpoint
from ..storage.pooling import read_pooling
from .comparison import Comparison, compare
from .export import attention_maps
from .figure_style import require_matplotlib, save_figure
from .importance import HeadImportance, ablation_importance, gradient_attribution, gradient_importance
from .intervention import resolve_heads
from .report.page import build_sections, render
from .report.parts import Example
from .rollout import attention_rollout
from .samples import AnalysisOptions, TextLoss, check_texts, make_batches, token_texts
from .statistics import AttentionStatistics, measure
from .watch import attention_modules

RESULTS = "analysis.json"
# Number of heads shown with their tokens by default.
_SHOWN_HEADS = 3


@dataclass(frozen=True)
class AnalyseOptions(AnalysisOptions):
    """`AnalysisOptions`, and: whether to measure the importance of heads and on how many tokens, how many tokens of the
    first text the maps show, and which heads they show large, as {layer number or module name: [head, ...]}; None: the
    most important or most changed ones."""

    importance: bool = True
    importance_tokens: int = 2048
    map_tokens: int = 40
    heads: dict | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("importance_tokens", "map_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


@dataclass
class Analysis:
    """The results of an analysis; `to_dict` is the content of analysis.json.

    importance: by kind, empty if it was not measured; conversion and scorecard: as saved with the checkpoint;
    attribution and rollout: of the first text's tokens; notes: what could not be measured, and why.
    """

    model: str
    architecture: str
    statistics: AttentionStatistics
    teacher: str | None = None
    teacher_statistics: AttentionStatistics | None = None
    comparison: Comparison | None = None
    importance: dict[str, HeadImportance] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)
    attribution: list[float] | None = None
    rollout: list[float] | None = None
    conversion: dict | None = None
    scorecard: dict | None = None
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Summarise the analysis in a few lines for a terminal."""
        numbers = self.statistics
        lines = [
            f"{self.architecture}: {len(numbers.heads)} heads in {len(numbers.modules)} modules, over "
            f"{numbers.num_tokens:,} tokens of {numbers.num_texts:,} texts",
            "patterns: " + ", ".join(f"{count} {name}" for name, count in numbers.pattern_counts().items()),
            f"collapsed heads: {sum(head.collapsed for head in numbers.heads)}",
        ]
        if self.comparison is not None:
            heads = self.comparison.heads
            lines.append(
                f"from the teacher: KL {fmean(h.divergence for h in heads):.4f} nats per query, correlation "
                f"{fmean(h.correlation for h in heads):.3f}"
            )
        for kind, importance in self.importance.items():
            module, head, score = importance.ranking()[0]
            lines.append(f"most important by {kind}: {module} head {head} ({score:.4f} nats)")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict:
        """Return a JSON-serialisable dict; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "Analysis":
        """Restore the analysis from `to_dict`."""

        def read(kind, name):
            return None if data.get(name) is None else kind.from_dict(data[name])

        importance = {kind: HeadImportance.from_dict(values) for kind, values in data["importance"].items()}
        return cls(**{
            **data, "statistics": read(AttentionStatistics, "statistics"), "importance": importance,
            "teacher_statistics": read(AttentionStatistics, "teacher_statistics"),
            "comparison": read(Comparison, "comparison"),
        })  # fmt: skip


def parse_heads(texts) -> dict | None:
    """Parse "layer:head" strings, such as "3:5", to {layer: [head, ...]}; None if there are none.

    Raises `ValueError` for anything else.
    """
    heads: dict[int, list[int]] = {}
    for text in texts or ():
        layer, _, head = text.partition(":")
        if not (layer.isdecimal() and head.isdecimal()):
            raise ValueError(f"heads must be layer:head with two numbers, such as 3:5, got {text!r}")
        heads.setdefault(int(layer), []).append(int(head))
    return heads or None


def analyse(
    path: str | Path,
    texts,
    out: str | Path,
    *,
    against: str | Path | None = None,
    options: AnalyseOptions | None = None,
    overwrite: bool = False,
) -> Analysis:
    """Analyse a checkpoint on texts and write report.html, analysis.json, heads.csv and figures/ to the folder `out`.

    path, against: as in `load_checkpoint`; against: a teacher to compare with.

    Raises `ValueError`, before anything is measured: empty text, an output folder that cannot be written or is not
    empty, a head that does not exist, a model without a tokenizer or attention weights, a teacher with another
    tokenizer; `OSError` for a checkpoint that does not exist.
    """
    options = options or AnalyseOptions()
    texts = check_texts(texts)
    require_matplotlib()
    with staging_folder(out, overwrite, marker=RESULTS) as folder:
        model, tokenizer = load_checkpoint(path)
        teacher = None
        if against is not None:
            teacher, teacher_tokenizer = load_checkpoint(against)
            if teacher_tokenizer is not None and tokenizer is not None:
                check_tokenizers(model, tokenizer, teacher_tokenizer)
        if options.importance and _is_encoder(model):
            options = replace(options, pooling=read_pooling(path))
        names = str(path), None if against is None else str(against)
        analysis, example = analyse_models(model, tokenizer, texts, teacher=teacher, options=options, names=names)
        card = Scorecard.load(path) if Path(path).is_dir() else None
        analysis.scorecard = None if card is None else card.to_dict()
        write_analysis(analysis, example, folder)
    return analysis


def _is_encoder(model) -> bool:
    try:
        return text_task_of(model) == "embedding"
    except ValueError:
        # It has no loss, which `_measure_importance` notes.
        return False


def analyse_models(
    model, tokenizer, texts, *, teacher=None, options: AnalyseOptions | None = None, names=(None, None)
) -> tuple[Analysis, Example]:
    """Analyse models in memory; returns the analysis and the maps of the first text, which only the figures hold.

    names: of the model and its teacher in the report. Raises `ValueError` as `analyse`.
    """
    options = options or AnalyseOptions()
    shown_heads = {} if options.heads is None else resolve_heads(model, options.heads)
    if tokenizer is not None:
        for checked in (model, teacher):
            if checked is not None:
                check_tokenizers(checked, tokenizer)
    batches = make_batches(model, tokenizer, texts, options)
    first_batch = make_batches(model, tokenizer, texts[:1], AnalysisOptions(max_length=options.map_tokens))[0]
    # The cheapest run comes first, since it refuses a model without attention weights.
    maps = attention_maps(model, first_batch)
    progress = options.progress
    name, teacher_name = (label or (m and type(m).__name__) for label, m in zip(names, (model, teacher)))
    analysis = Analysis(name, type(model).__name__, measure(model, batches, tokenizer, progress=progress), teacher_name)
    if not any(head.rows for head in analysis.statistics.heads):
        raise ValueError(
            "no query of these texts saw two tokens or more, so there is nothing to say about the attention: texts or "
            "max_length are too short, or the weights are not finite"
        )
    analysis.versions = {"python": platform.python_version(), "torch": torch.__version__}
    analysis.versions["transformers"] = transformers.__version__
    analysis.tokens = token_texts(tokenizer, first_batch["input_ids"][0].tolist())
    if isinstance(model, DistAttnModelMixin):
        analysis.conversion = current_report(model).to_dict()
    teacher_maps = {}
    if teacher is not None:
        analysis.teacher_statistics = measure(teacher, batches, tokenizer, progress=progress)
        analysis.comparison = compare(model, teacher, batches, progress=progress)
        teacher_maps = attention_maps(teacher, first_batch)
    if options.importance:
        _measure_importance(analysis, model, tokenizer, texts, options)
    else:
        analysis.notes.append("Importance of heads was not asked for.")
    rollout = _look_at_tokens(analysis, model, tokenizer, texts[0], first_batch, options)
    shown_heads = shown_heads or _heads_to_show(analysis)
    example = Example(maps, teacher_maps, shown_heads, rollout, _token_lists(model, tokenizer, first_batch))
    return analysis, example


def _token_lists(model, tokenizer, batch: dict) -> dict[str, list[str]]:
    """Return the first text's tokens: those of "encoder" (or the only part) and "decoder"."""
    lists = {"encoder": token_texts(tokenizer, batch["input_ids"][0].tolist())}
    if model.config.is_encoder_decoder:
        lists["decoder"] = token_texts(tokenizer, batch["decoder_input_ids"][0].tolist())
    return lists


def _measure_importance(found: Analysis, model, tokenizer, texts, options: AnalyseOptions) -> None:
    settings = AnalysisOptions(
        options.max_length, options.importance_tokens, options.batch_size, options.seed, pooling=options.pooling
    )
    try:
        loss = TextLoss(model, tokenizer, texts, settings)
    except ValueError as error:
        # A model without a loss is still analysed.
        found.notes.append(f"Importance of heads was not measured: {error}.")
        return
    if not attention_modules(model):
        found.notes.append("Importance of heads was not measured: the model's heads cannot be changed one by one.")
        return
    for measure_kind in (gradient_importance, ablation_importance):
        result = measure_kind(model, loss, progress=options.progress)
        found.importance[result.kind] = result


def _look_at_tokens(found: Analysis, model, tokenizer, text: str, first: dict, options: AnalyseOptions):
    rollout = attention_rollout(model, first)[0].cpu()
    # The last row for causal models, which predict the next token from it; the mean row for others.
    causal = bool((rollout.triu(1) == 0).all())
    found.rollout = (rollout[-1] if causal else rollout.mean(0)).tolist()
    try:
        found.attribution = gradient_attribution(model, tokenizer, text, max_length=options.map_tokens)["values"]
    except ValueError as error:
        found.notes.append(f"Gradient attribution was not measured: {error}.")
    return rollout


def _heads_to_show(found: Analysis) -> dict[str, list[int]]:
    """Return the heads furthest from the teacher, else the most important ones, else those of strongest pattern."""
    if found.comparison is not None:
        ranked = [(h.module, h.head) for h in sorted(found.comparison.heads, key=lambda h: -h.divergence)]
    elif "ablation" in found.importance:
        ranked = [item[:2] for item in found.importance["ablation"].ranking()]
    else:
        ranked = [(h.module, h.head) for h in sorted(found.statistics.heads, key=lambda h: -h.strength)]
    heads_by_module: dict[str, list[int]] = {}
    for module, head in ranked[:_SHOWN_HEADS]:
        heads_by_module.setdefault(module, []).append(head)
    return heads_by_module


def write_analysis(analysis: Analysis, example: Example, folder: Path) -> list[Path]:
    """Write report.html, analysis.json, heads.csv and figures/ to a folder; returns the files."""
    sections = build_sections(analysis, example)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    files = []
    for section in sections:
        for drawing in section.figures:
            files += save_figure(drawing.figure, figures / drawing.name)
    data = json.dumps(analysis.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
    for name, text in ((RESULTS, data), ("report.html", render(analysis, sections))):
        (folder / name).write_text(text, encoding="utf-8")
        files.append(folder / name)
    analysis.statistics.to_frame().to_csv(folder / "heads.csv", index=False)
    return [*files, folder / "heads.csv"]
