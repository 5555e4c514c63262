"""Which files of a checkpoint's folder go where: into a conversion of it, or to the Hub. Needs no torch."""

import hashlib
import json
import os
from fnmatch import fnmatchcase
from pathlib import Path

CARD_NAME = "README.md"
# Names the modules of a sentence-transformers model, of which some have folders of their own.
MODULES = "modules.json"

# Pickles can run code when they are opened.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_LEAVINGS = ("*.lock", "*.tmp", "*.pyc")
_OF_TRAINING = ("__pycache__", "checkpoint-*", "runs", "logs")

# Depends on the attention, belongs to a training, or describes the source and nothing else.
_OF_THE_ATTENTION = (
    *_PICKLES, *_LEAVINGS, "*.safetensors", "*.h5", "*.msgpack", "*.gguf", "*.ot", "*.index.json",
    "*.onnx", "*.onnx_data", "*.xml", "*.tflite", "*.mlmodel", "*.mlpackage",
    "config.json", "adapter_config.json", "*.py", "trainer_state.json", "distattn_*", "*.log", CARD_NAME,
)  # fmt: skip
_FOLDERS_OF_THE_ATTENTION = (
    *_OF_TRAINING, "onnx", "openvino", "coreml", "tflite", "tf", "flax", "eval", "original", "*.mlpackage",
)  # fmt: skip

# Weights in a form for which an upload is refused, not just left out.
PICKLED_WEIGHTS = ("*model*.bin", "*model*.pt", "*model*.pth", "*model*.ckpt", "tf_model.h5", "*.msgpack")

# Files of a checkpoint's own folder that its numbers depend on, beside the folders of its modules.
_SETTINGS = ("*config.json",)
_MEASURED = (
    "*.safetensors", "config.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "added_tokens.json",
    "special_tokens_map.json", "chat_template*", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", MODULES, "sentence_bert_config.json",
)  # fmt: skip
# Who wrote a config, where and in which precision; evaluation loads in float32.
_NOT_MEASURED = ("transformers_version", "_name_or_path", "auto_map", "dtype", "torch_dtype")


def matches(name: str, patterns) -> bool:
    """Return whether a name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_hidden(name: str) -> bool:
    """Return whether a file, or a folder on the way to it, has a name that begins with a dot."""
    return any(part.startswith(".") for part in Path(name).parts)


def goes_along(name: str) -> bool:
    """Return whether a file belongs to a conversion of the model, too: it does not depend on the attention."""
    return not _is_in(name, _FOLDERS_OF_THE_ATTENTION) and not matches(Path(name).name, _OF_THE_ATTENTION)


def goes_to_the_hub(name: str) -> bool:
    """Return whether a file of a converted checkpoint is uploaded: no pickle and no training state."""
    return not (is_hidden(name) or _is_in(name, _OF_TRAINING) or matches(Path(name).name, (*_PICKLES, *_LEAVINGS)))


def _is_in(name: str, folders) -> bool:
    return any(matches(part, folders) for part in Path(name).parts[:-1])


def list_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the names of a folder's files, relative to it, and {name: why} of its links that are not followed.

    Links are followed to what lies in the folder itself, and to the Hub's cache, where the files of a snapshot are
    links. What any other link shows was never part of the checkpoint, and is nothing to copy or publish.
    """
    root = Path(os.path.realpath(folder))
    files, not_followed = [], {}

    def visit(place: Path, above: frozenset[Path]) -> None:
        for entry in sorted(place.iterdir()):
            # Not `Path.resolve`, which raises for a link to itself.
            name, target = entry.relative_to(folder).as_posix(), Path(os.path.realpath(entry))
            if not target.exists():
                not_followed[name] = "a link to nothing"
            elif not (target.is_relative_to(root) or (target.is_file() and _is_blob(target))):
                not_followed[name] = "a link out of the folder"
            elif target in above:
                not_followed[name] = "a link to a folder that it is in"
            elif target.is_dir():
                visit(entry, above | {target})
            elif target.is_file():
                files.append(name)

    visit(folder, frozenset({root}))
    return sorted(files), not_followed


def _is_blob(target: Path) -> bool:
    """Return whether a file lies where the Hub's cache keeps the contents of a repository's files."""
    return target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")


def checkpoint_digest(folder: str | Path) -> str | None:
    """Return SHA-256 of what a folder's model computes from: weights (safetensors), config, and the files of tokenizer,
    generation, processor and pooling. None where there is no such folder: of a name on the Hub, or of weights in
    another form.

    Of JSON its content counts, but for what changes no measured number (`_NOT_MEASURED`).
    """
    folder = Path(folder)
    if not any(folder.glob("*.safetensors")) or not (folder / "config.json").is_file():
        return None
    names = list_files(folder)[0]
    modules = json.loads((folder / MODULES).read_text(encoding="utf-8")) if MODULES in names else ()
    folders = [Path(entry["path"]) for entry in modules if entry.get("path")]
    found = hashlib.sha256()
    for name in names:
        if Path(name).parent not in folders and not ("/" not in name and matches(name, _MEASURED)):
            continue
        with (folder / name).open("rb") as opened:
            if matches(Path(name).name, _SETTINGS):
                content = {k: v for k, v in json.load(opened).items() if k not in _NOT_MEASURED}
                part = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
            else:
                part = hashlib.file_digest(opened, "sha256")
        found.update(name.encode() + part.digest())
    return found.hexdigest()
