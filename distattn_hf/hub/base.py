"""Metadata of the base model: its name on the Hub, its licence and language, and the source of each."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

from ..storage.companions import Source, card_metadata, describe_source
from ..storage.embedded import EMBEDDED

# The names that the embedded checkpoints have on the Hub.
_HUB_NAMES = {
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}


@dataclass
class BaseModel:
    """The model that was converted; `hub_name` is None unless it is known to be on the Hub.

    metadata holds license, license_name, license_link and language as far as they are known; source is where they come
    from, or why they are unknown.
    """

    hub_name: str | None = None
    shown_name: str | None = None
    metadata: dict = field(default_factory=dict)
    source: str = "no base model was named"


def find_base_model(named: str | None, taught: str | None, api: HfApi) -> BaseModel:
    """Look the base model up: `named`, which the user gave and is trusted, or `taught`, the teacher in the checkpoint.

    Metadata comes from the README.md of a folder, the table of embedded checkpoints, or else the Hub. A teacher that is
    none of these may have been a folder on another machine, so it is not called a Hub model.
    Raises `ValueError` when the Hub has no model of the name the user gave.
    """
    name = named or taught
    if not name:
        return BaseModel()
    if Path(name).is_dir():
        return _from_folder(Path(name))
    for embedded in EMBEDDED.values():
        hub_name = _HUB_NAMES.get(embedded.name)
        if name.lower() in (embedded.name, (hub_name or "").lower()):
            metadata = license_metadata(embedded.license)
            return BaseModel(hub_name, hub_name or embedded.description, metadata, "the package's own table")
    return _from_hub(name, named is not None, api)


def _from_folder(path: Path) -> BaseModel:
    # The name of a folder on this machine is of no use to others.
    entry = describe_source(Source(path))
    if "license" not in entry:
        return BaseModel(source=f"neither README.md nor LICENSE of the base model's folder {str(path)!r} says it")
    return BaseModel(metadata=_noted_metadata(entry, ()), source=f"{entry['from']} of the folder {str(path)!r}")


def add_noted(base: BaseModel, noted: dict | None, files: list[str]) -> None:
    """Fill in the licence that the conversion recorded of its source, if the base model's is not known otherwise.

    files: of the converted folder, as possible targets of the licence link.
    """
    if noted and "license" in noted and "license" not in base.metadata:
        base.metadata = {**_noted_metadata(noted, files), **base.metadata}
        base.source = f"{noted['from']} of {noted['name']!r}, noted at the conversion"


def _noted_metadata(noted: dict, files) -> dict:
    metadata = card_metadata(noted)
    link = str(metadata.get("license_link", "://"))
    if "://" not in link and link not in files:
        del metadata["license_link"]
    if metadata.get("license") == "other" and "license_name" not in metadata:
        # The Hub asks for a name beside "other".
        metadata["license_name"] = "see-licence-of-the-base-model"
    return metadata


def _from_hub(name: str, believed: bool, api: HfApi) -> BaseModel:
    base = BaseModel(name if believed else None, name if believed else None)
    try:
        info = api.model_info(name, timeout=10)
    except (HTTPError, OSError, ValueError) as error:
        if believed and isinstance(error, RepositoryNotFoundError):
            raise ValueError(
                f"base_model={name!r} is neither a folder, nor an embedded checkpoint ({', '.join(EMBEDDED)}), nor a "
                f"model that {api.endpoint} shows you"
            ) from None
        base.source = f"{name!r} could not be looked up at {api.endpoint}: {type(error).__name__}"
        return base
    metadata = card_metadata(info.card_data.to_dict() if info.card_data else {})
    link = metadata.get("license_link")
    if link and "://" not in link:
        metadata["license_link"] = f"{api.endpoint}/{info.id}/blob/main/{link}"
    return BaseModel(info.id, info.id, metadata, f"the card of {info.id!r} on the Hub")


def license_metadata(license: str) -> dict:
    """Return front matter for a licence: its identifier, or "other" with a name where it is a phrase."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", license):
        return {"license": license.lower()}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", license.lower()).strip("-")}
