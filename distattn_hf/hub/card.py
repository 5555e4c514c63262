"""Build the model card: card_template.md, filled from the checkpoint's report and scorecard only."""

import hashlib
import math
import re
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from statistics import fmean

import jinja2
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from ..conversion.report import ConversionReport
from .base import BaseModel, add_noted, find_base_model, license_metadata
from .folder import ConvertedFolder, read_folder, read_results
from .measured import Measured

# Rows of the scorecard that may be the checkpoint in the folder, the last step first.
_STEPS = ("task", "distillation", "transfer", "calibrated", "plain")
_ROW_LABELS = {
    "teacher": "base model, as published",
    "teacher_finetuned": "base model, trained on the same data",
    "plain": "new attention put in, nothing fitted (control)",
    "calibrated": "fitted head by head, no training",
    "transfer": "attention transfer",
    "distillation": "distillation",
    "task": "training on the task",
    "window_only": "sinks and window alone (control)",
    "no_attention": "no attention at all (control)",
}
_COUNTS = {"trained_parameters": "trained parameters", "tokens": "training tokens", "seconds": "seconds"}
_SIGNATURE = re.compile(r"\n\n<!-- Card by distattn_hf, ([0-9a-f]{16}): .*-->\n\Z")
_SIGNATURE_TEXT = "\n\n<!-- Card by distattn_hf, {}: the next push replaces it unless it has been edited. -->\n"


def build_card(
    path: str | Path,
    repo: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    results: str | Path | list[str | Path] | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> ModelCard:
    """Build the model card of a converted checkpoint folder, for the repository `repo` ("owner/name").

    Args:
        license: the licence's identifier on the Hub; None takes the base model's, or that recorded at the conversion.
        base_model: a Hub name, a folder (its README.md is read), or an embedded checkpoint; None takes the teacher of
            the scorecard or the report, where that is known to be one of these.
        results: JSON files: what `distattn evaluate FOLDER --out` wrote, or the owner's own (see `read_results`).
        token, endpoint: for looking the base model up, as in `push`.

    Raises:
        ValueError: as `read_folder`; the licence is neither given nor known from the base model.
    """
    validate_repo_id(repo)
    folder = read_folder(path)
    scorecard = folder.scorecard or {}
    teacher = scorecard.get("teacher") or (folder.report and folder.report.base_model)
    owner_results, measured = read_results(results or [], folder.path)
    base = find_base_model(base_model, teacher, HfApi(endpoint=endpoint, token=token))
    if folder.report:
        add_noted(base, folder.report.source, folder.files)
    if license is not None:
        base.metadata = {k: v for k, v in base.metadata.items() if k == "language"} | license_metadata(license)
    elif "license" not in base.metadata:
        raise ValueError(
            f"license must be given, such as 'apache-2.0': the base model's is not known ({base.source}); or name the "
            "base model with base_model"
        )
    data = _metadata(folder, repo, base, measured)
    # Not ModelCard.from_template, which silently renders undefined names as empty.
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(read_template())
    return sign(
        ModelCard(template.render(card_data=data.to_yaml(), **contents(folder, repo, base, owner_results, measured)))
    )


def read_template() -> str:
    """Return the text of card_template.md, which is part of the package."""
    return files(__package__).joinpath("card_template.md").read_text(encoding="utf-8")


def sign(card: ModelCard) -> ModelCard:
    """Append a line with a digest of the card, by which `is_unedited` recognises it."""
    card.text += _SIGNATURE_TEXT.format(_digest(str(card)))
    return card


def is_unedited(text: str) -> bool:
    """Return whether a README.md is as a program wrote it, unedited: `build_card`, or transformers' push_to_hub."""
    if signature := _SIGNATURE.search(text):
        return signature.group(1) == _digest(text[: signature.start()])
    card = ModelCard(text, ignore_metadata_errors=True)
    # From transformers.utils.hub.create_and_tag_model_card.
    sentence = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    generated = ModelCard.from_template(ModelCardData(library_name="transformers"), model_description=sentence)
    return card.text.strip() == generated.text.strip()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------- front matter


def _metadata(folder: ConvertedFolder, repo: str, base: BaseModel, measured: list[Measured]) -> ModelCardData:
    results = _results(folder)
    metrics = [folder.scorecard["metric"]] if results else []
    for part in measured:
        results += part.index(folder.pipeline_tag or "text-generation", _public(part.data))
        metrics += [metric for _, metric, _ in part.results]
    scorecard = folder.scorecard or {}
    train = (scorecard.get("data") or {}).get("train")
    fields = {
        "library_name": "sentence-transformers" if folder.is_sentence_transformer else "transformers",
        "base_model": base.hub_name,
        "pipeline_tag": folder.pipeline_tag,
        "tags": [*_library_tags(folder), "distattn", *_attention_tags(folder.config)],
        "datasets": [train] if train and _is_hub_name(train) else None,
        "metrics": list(dict.fromkeys(metrics)) or None,
        "model_name": repo.partition("/")[2] if results else None,
        "eval_results": results or None,
        **base.metadata,
    }
    return ModelCardData(**{name: value for name, value in fields.items() if value is not None})


def _library_tags(folder: ConvertedFolder) -> list[str]:
    return ["sentence-transformers", "feature-extraction"] if folder.is_sentence_transformer else []


def _attention_tags(config: dict) -> list[str]:
    specs = config["distattn"]["specs"]
    mechanisms = [f"{s.get('mechanism') or 'distance'}-attention" for s in specs]
    # Of the teacher's own logits no metric is worth a tag.
    metrics = [s["metric"] for s in specs if not (s.get("mechanism") == "retrieval" and s.get("lift"))]
    return [*dict.fromkeys(mechanisms), *dict.fromkeys(metrics)]


def _is_hub_name(name: str) -> bool:
    """Return whether a data set's name can only be the Hub's: owner/name, no file suffix, no such local path."""
    return bool(re.fullmatch(r"[\w-]+/[\w.-]+", name)) and not Path(name).suffix and not Path(name).exists()


def _public(name: str) -> str:
    """Return a data set's name without local folders."""
    return name if _is_hub_name(name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def own_row(scorecard: dict | None) -> dict | None:
    """Return the row of the folder's checkpoint: the one that the scorecard names as `checkpoint`, or its last step."""
    rows = {row["name"]: row for row in (scorecard or {}).get("rows", ())}
    return next((rows[name] for name in ((scorecard or {}).get("checkpoint"), *_STEPS) if name in rows), None)


def _results(folder: ConvertedFolder) -> list[EvalResult]:
    """Return the model index: this checkpoint's own finite metrics from the scorecard."""
    row, scorecard = own_row(folder.scorecard), folder.scorecard
    evaluated_on = ((scorecard or {}).get("data") or {}).get("eval")
    if row is None or not evaluated_on:
        return []
    name = _public(evaluated_on)
    metrics = row.get("metrics") or {scorecard["metric"]: row["score"]}
    return [
        EvalResult(
            task_type=folder.pipeline_tag or scorecard["task"],
            dataset_type=evaluated_on if _is_hub_name(evaluated_on) else "custom",
            dataset_name=name,
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=value,
        )
        for metric, value in metrics.items()
        if math.isfinite(value)
    ]


# ------------------------------------------------------------------------------------------------- text


def contents(
    folder: ConvertedFolder, repo: str, base: BaseModel, results: list[dict] = (), measured: list[Measured] = ()
) -> dict:
    """Return the values of the template; each is None or empty where nothing was measured."""
    block, report, scorecard = folder.config["distattn"], folder.report, folder.scorecard
    row, data = own_row(scorecard), (scorecard or {}).get("data") or {}
    return {
        "repo": repo,
        "name": repo.partition("/")[2],
        "base_link": f"[{base.hub_name}](https://huggingface.co/{base.hub_name})" if base.hub_name else base.shown_name,
        "architecture": folder.architecture,
        "attention": _attention_text(folder.config),
        "init": block.get("init"),
        "exact": _is_exact(folder),
        "unfitted": _is_unfitted(folder),
        "lifted": any(spec.get("lift") for spec in block["specs"]),
        "retrieves": "retrieval-attention" in _attention_tags(folder.config),
        "caught": report.mean_caught if report else None,
        "options_changed": bool(report) and report.options_changed,
        "auto_class": folder.auto_class,
        "preparation": folder.preparation,
        "is_sentence_transformer": folder.is_sentence_transformer,
        "package": _package_link(),
        "owners_table": _owners_table(results),
        "measured": [(f"{part.caption}, on {_public(part.data)}", _table(part.head, part.rows)) for part in measured],
        "report": report,
        "exact_heads": _exact_heads(report),
        "changed_since": bool(report) and report.changed_since,
        "trained": bool(row) and row["name"] in ("transfer", "distillation", "task"),
        "loss_table": _loss_table(report) if report else None,
        "warnings": report.warnings if report else [],
        "metric": (scorecard or {}).get("metric"),
        "greater_is_better": (scorecard or {}).get("greater_is_better"),
        "train": _public(data["train"]) if data.get("train") else None,
        "eval": _public(data["eval"]) if data.get("eval") else None,
        "score_table": _score_table(scorecard) if scorecard else None,
        "row": {k: row.get(k) for k in _COUNTS} if row else None,
        "row_label": _ROW_LABELS.get(row["name"], row["name"]) if row else None,
        "nystrom": "nystrom-attention" in _attention_tags(folder.config),
    }


def _attention_text(config: dict) -> str:
    """Describe the kinds of attention in words, with their parameters."""
    parts = []
    groups = [group for entry in (config["distattn"].get("modules") or {}).values() for group in entry["groups"]]
    for number, spec in enumerate(config["distattn"]["specs"]):
        if spec.get("mechanism") == "nystrom":
            sizes = [f"{spec[k]} {label}" for k, label in (
                ("num_landmarks", "landmarks"), ("window_size", "tokens of window"), ("num_sinks", "sinks"),
                ("exact_below", "first tokens attended exactly"),
            ) if spec.get(k)]  # fmt: skip
            parts.append("linear-time Nyström attention" + (f" ({', '.join(sizes)})" if sizes else ""))
            if beyond := sum(len(g["heads"]) for g in groups if g["spec"] == number and g.get("beyond")):
                parts.append(f"in {beyond} heads {_retrieval_text(spec)}")
        elif spec.get("mechanism") == "retrieval":
            parts.append(_retrieval_text(spec))
        else:
            order = f" (p={spec['p']:g})" if spec.get("p") is not None else ""
            softened = {None: "", 0: "", "fit": " softened (one fitted ε a head)"}
            dial = softened.get(spec.get("softening"), f" softened (ε = {spec.get('softening')})")
            parts.append(f"{spec['metric']}{order} distance attention{dial}")
    return " and ".join(dict.fromkeys(parts))


def _retrieval_text(spec: dict) -> str:
    own = "" if spec.get("lift") or spec["mechanism"] == "nystrom" else f" by the {spec['metric']} distance"
    beyond = ", of each other block one key that stands for it" if spec.get("far_field") else ""
    alike = " alike keys" if spec.get("cluster_keys") else ""
    others = spec["num_blocks"] * spec["block_size"]
    if least := spec.get("min_weight"):
        others = f"at most {others:,} others, whose weight is at least {least:g},"
    else:
        others = f"{others:,} others"
    return (
        f"retrieval attention{own} (each query reads the last {spec['window_size']} tokens, the first "
        f"{spec['num_sinks']}, and {others} in blocks of {spec['block_size']}{alike}{beyond})"
    )


def _package_link() -> str:
    """Return the package's name, as a link if its metadata has an address."""
    try:
        package_metadata = metadata.metadata("distattn_hf")
    except metadata.PackageNotFoundError:
        return "`distattn_hf`"
    urls = [url.partition(",")[2].strip() for url in package_metadata.get_all("Project-URL") or ()]
    address = next((url for url in [package_metadata.get("Home-page"), *urls] if url and "://" in url), None)
    return f"[`distattn_hf`]({address})" if address else "`distattn_hf`"


def _owners_table(results: list[dict]) -> str | None:
    """Format the owner's results as given, without the columns that no entry has; None for no results."""
    columns = [name for name in ("base", "note") if any(entry.get(name) is not None for entry in results)]
    rows = []
    for entry in results:
        cells = [entry["dataset"], entry["metric"], f"{entry['value']:.6g}"]
        for name in columns:
            value = entry.get(name)
            cells.append("-" if value is None else value if name == "note" else f"{value:.6g}")
        rows.append([" ".join(cell.replace("|", "\\|").split()) for cell in cells])
    head = ["dataset", "metric", "this model", *("base model" if name == "base" else name for name in columns)]
    return _table(head, rows) if rows else None


def _is_exact(folder: ConvertedFolder) -> bool:
    """Return whether all heads were the teacher's by construction; without a report, as `init` says."""
    if folder.report and folder.report.groups:
        return all(group.exact for group in folder.report.groups)
    init = folder.config["distattn"].get("init")
    return init == "exact" and "retrieval-attention" not in _attention_tags(folder.config)


def _is_unfitted(folder: ConvertedFolder) -> bool:
    """Return whether there are heads of a metric that nothing was fitted to."""
    if folder.report and folder.report.groups:
        return folder.report.heads_by_loss["unfitted"] > 0
    return folder.config["distattn"].get("init") == "plain"


def _exact_heads(report: ConversionReport | None) -> int:
    return sum(len(heads) for heads in report.exact_heads.values()) if report else 0


def _loss_table(report: ConversionReport) -> str | None:
    """Format one line per group of heads, means over its heads, without the columns that were not measured."""
    columns = {
        "λ": "lam",
        "α": "alpha",
        "ε": "softening",
        "ε/median": "softening_ratio",
        "KL unfitted": "divergence_before",
        "KL of the plain distance": "divergence_plain",
        "KL fitted": "divergence_after",
        "output off, sinks and window alone": "window_error",
        "output off": "output_error",
        "weight caught": "caught",
    }
    if not report.softening_ratios:
        columns = {k: v for k, v in columns.items() if v not in ("softening_ratio", "divergence_plain")}
    columns = {k: v for k, v in columns.items() if any(getattr(group, v) is not None for group in report.groups)}
    rows = []
    for group in report.groups:
        cells = [f"`{group.module}`", group.attention, str(len(group.heads))]
        values = [getattr(group, field) for field in columns.values()]
        rows.append(cells + ["-" if v is None else f"{fmean(v):.4g}" for v in values])
    return _table(["module", "attention", "heads", *columns], rows) if rows else None


def _score_table(scorecard: dict) -> str:
    counts = {k: v for k, v in _COUNTS.items() if any(row.get(k) for row in scorecard["rows"])}
    ratio = any(row.get("ratio") is not None for row in scorecard["rows"])
    length = (scorecard.get("data") or {}).get("passkey_length")
    found = [f"numbers found in texts of {length:,} tokens"] if length else []
    checkpoint_row = own_row(scorecard)
    reference = "ratio to the base model" + (" so trained" if scorecard.get("ratio_to") == "teacher_finetuned" else "")
    rows = []
    for row in scorecard["rows"]:
        label = _ROW_LABELS.get(row["name"], row["name"])
        cells = [f"**{label} (this checkpoint)**" if row is checkpoint_row else label, f"{row['score']:.4g}"]
        if ratio:
            cells.append("-" if row.get("ratio") is None else f"{row['ratio']:.3f}")
        if found:
            share = (row.get("metrics") or {}).get("passkey")
            cells.append("-" if share is None else f"{share:.0%}")
        rows.append(cells + ["-" if not row.get(k) else f"{row[k]:,.0f}" for k in counts])
    return _table(["", scorecard["metric"], *([reference] if ratio else []), *found, *counts.values()], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
