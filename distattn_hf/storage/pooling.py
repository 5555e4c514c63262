"""How a sentence-transformers model pools its tokens' states, as far as that is possible without the library."""

import json
from pathlib import Path

from transformers.utils import logging

from .companions import Source
from .files import MODULES

logger = logging.get_logger(__name__)

POOLINGS = ("mean", "cls", "max", "lasttoken")
# Files before version 6 -> what it is now. The second differs from the mean by a factor, which no cosine sees.
_MODES = {f"pooling_mode_{name}": name for name in ("lasttoken", "mean_sqrt_len_tokens")}
_MODES |= {f"pooling_mode_{name}_tokens": name for name in ("max", "mean", "weightedmean")}
_MODES["pooling_mode_cls_token"] = "cls"
_WITHOUT_EFFECT = ("Normalize", "Dropout")


def read_pooling(source: str | Path) -> str:
    """Return one of `POOLINGS`: how a checkpoint's modules.json pools embeddings; "mean" where it has none.

    source: as of `load_checkpoint`. Prompts that its files name are put before no text. Raises `ValueError`, naming
    what it is, for a module or a way of pooling that would have to be run by sentence-transformers itself.
    """
    source = Source(source)
    if MODULES not in source.names:
        if source.note is not None:
            logger.warning(f"{source.name}: the Hub could not be asked for {MODULES}, so embeddings are mean-pooled")
        return "mean"
    entries = json.loads(source.path(MODULES).read_text(encoding="utf-8"))
    kinds = [entry["type"].rpartition(".")[2] for entry in entries]
    unsupported = [kind for kind in kinds[2:] if kind not in _WITHOUT_EFFECT]
    if kinds[:2] != ["Transformer", "Pooling"] or unsupported:
        raise _cannot(source, f"has the modules {', '.join(kinds)}", "Transformer, Pooling and Normalize")
    file = Path(entries[1]["path"], "config.json").as_posix()
    if file not in source.names:
        raise ValueError(f"{source.name}: {MODULES} names a Pooling whose {file} is not there")
    modes = _modes(json.loads(source.path(file).read_text(encoding="utf-8")))
    pooling = "mean" if modes == ["mean_sqrt_len_tokens"] else modes[0]
    if len(modes) > 1 or pooling not in POOLINGS:
        raise _cannot(source, f"pools embeddings by {' and '.join(modes)}", f"one of {', '.join(POOLINGS)}")
    return pooling


def _modes(config: dict) -> list[str]:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [name for key, name in _MODES.items() if config.get(key)] or ["mean"]
    return [modes] if isinstance(modes, str) else list(modes)


def _cannot(source: Source, what: str, allowed: str) -> ValueError:
    return ValueError(
        f"{source.name} {what}; here embeddings are made by {allowed} alone. Evaluate it with sentence-transformers: "
        "SentenceTransformer(folder) runs converted models once distattn_hf is imported"
    )
