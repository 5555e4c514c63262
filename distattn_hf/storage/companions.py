"""Files beside a checkpoint's weights: those that do not depend on the attention, such as the pooling of a
sentence-transformers model, are copied with a conversion, and the source's licence is noted. Needs no torch.
"""

import json
import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, metadata_load, snapshot_download
from huggingface_hub.errors import HTTPError

from ..connection import hub_in_reach
from .embedded import EMBEDDED
from .files import CARD_NAME, MODULES, goes_along, is_hidden, list_files

LICENSE_FIELDS = ("license", "license_name", "license_link")

# The first lines of a LICENSE file -> the licence's identifier.
_LICENSES = (
    (r"Apache License\s+Version 2\.0", "apache-2.0"),
    (r"\bMIT License\b|Permission is hereby granted, free of charge, to any person obtaining a copy", "mit"),
)


class Source:
    """The files of a checkpoint's source: a folder, an embedded checkpoint or a Hub name.

    names: of its files; links: {name: why} of the links that are not followed (see `list_files`); note: what cannot be
    known of them. Where the Hub cannot be asked, names are what the cache holds.
    """

    def __init__(self, source: str | Path):
        self.name, self.note, self._revision, self.links = str(source), None, None, {}
        self.is_local = Path(source).is_dir()
        self.folder = self._find_folder()
        if self.folder is not None:
            self.names, self.links = list_files(self.folder)
        elif self._revision is None:
            self.names = []

    def _find_folder(self) -> Path | None:
        if self.name in EMBEDDED:
            checkpoint = EMBEDDED[self.name]
            return checkpoint.folder() / checkpoint.files if checkpoint.files else None
        if self.is_local:
            return Path(self.name)
        try:
            if constants.HF_HUB_OFFLINE or not hub_in_reach():
                raise OSError("offline")
            info = HfApi().model_info(self.name)
        except (HTTPError, OSError):
            self.note = f"whatever {self.name} has on the Hub beyond the cache: it could not be asked"
            try:
                return Path(snapshot_download(self.name, local_files_only=True))
            except OSError:
                return None
        self._revision, self.names = info.sha, sorted(file.rfilename for file in info.siblings or ())
        return None

    def path(self, name: str) -> Path:
        """Return where one of `names` is on this machine, downloaded if need be."""
        if self.folder is not None:
            return self.folder / name
        return Path(hf_hub_download(self.name, name, revision=self._revision))


def copy_companions(source: Source, target: Path) -> list[str]:
    """Copy into `target` every file of a checkpoint's source that does not depend on the attention and is not there.

    The folders that `modules.json` names (sentence-transformers) are copied whole, weights included. Returns the names
    left behind, but for those that `target` has under the same name.
    """
    module_folders = _module_folders(source.path(MODULES)) if MODULES in source.names else ()
    left_out = [source.note] if source.note else []
    links = {name: why for name, why in source.links.items() if not (is_hidden(name) or (target / name).exists())}
    left_out += [f"{name} ({why})" for name, why in links.items()]
    for name in source.names:
        target_file = target / name
        if target_file.exists() or is_hidden(name):
            continue
        if any(Path(folder) in Path(name).parents for folder in module_folders) or goes_along(name):
            target_file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path(name), target_file)
        else:
            left_out.append(name)
    return left_out


def _module_folders(modules: Path) -> tuple[str, ...]:
    """Return the folders of a sentence-transformers model's modules, but for the transformer itself."""
    entries = json.loads(Path(modules).read_text(encoding="utf-8"))
    return tuple(entry["path"] for entry in entries if entry.get("path"))


# ------------------------------------------------------------------------------------------------- its licence


def describe_source(source: Source) -> dict:
    """Return what a conversion notes of its source: "name" (of a folder without its parents), licence and language as
    far as its README.md or else its LICENSE file says them, and "from", which file that was.
    """
    name = source.folder.resolve().name if source.is_local else source.name
    return {"name": name, **_metadata(source)}


def _metadata(source: Source) -> dict:
    # Not ModelCard.load, which warns of a card without metadata.
    found = metadata_load(source.path(CARD_NAME)) if CARD_NAME in source.names else None
    if "license" in (metadata := card_metadata(found or {})):
        return {**metadata, "from": CARD_NAME}
    for name in source.names:
        if fnmatchcase(name, "LICEN[SC]E*"):
            text = source.path(name).read_text(encoding="utf-8", errors="replace")
            known = next((license for pattern, license in _LICENSES if re.search(pattern, text[:2000])), None)
            return {**({"license": known} if known else {"license": "other", "license_link": name}), "from": name}
    return {}


def card_metadata(data: dict) -> dict:
    """Return what a card's front matter says of licence and language."""
    return {name: data[name] for name in (*LICENSE_FIELDS, "language") if data.get(name)}
