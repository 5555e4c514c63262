"""Register and look up things by name, with errors that list what exists."""

from collections.abc import Iterable, Iterator
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps

from transformers.utils import logging

logger = logging.get_logger(__name__)

# Words of papers and other libraries for fields of specs; layers take them as they are (layers/names.py).
_OTHER_WORDS = {
    "distance_type": "metric", "distance": "metric", "lambda_param": "lam", "lambda_": "lam", "temperature": "lam",
    "p_norm": "p", "use_learnable_lambda": "learnable_lambda", "epsilon": "softening", "eps": "softening",
}  # fmt: skip
# Words that no field has, and what does what they say.
_ELSEWHERE = {
    **dict.fromkeys(
        ("sparsity_ratio", "keep_ratio", "topk", "top_k"),
        "mechanism 'retrieval' reads the num_blocks best blocks of block_size keys, or those with min_weight",
    ),
    "decay": "a conversion keeps the teacher's positions; native models have positional_encoding='decay'",
    "project_dim": "distances of projected points were off by 12% (model_cards/research_plan.md), so there is none",
}

# What an `AttentionSpec` may have in place of exact attention by a metric.
MECHANISMS = ("distance", "nystrom", "retrieval")

# Registries by kind.
_TABLES: dict[str, "Registry"] = {}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean a, b? " for the known names like `name`, or ""."""
    matches = get_close_matches(str(name).lower(), list(known), n=3, cutoff=0.65)
    return f"did you mean {', '.join(matches)}? " if matches else ""


def mechanism_hint(name: str) -> str:
    """Return "; retrieval is a mechanism: ..." where a metric is asked for by a mechanism's name, or one like it."""
    found = get_close_matches(str(name).lower(), MECHANISMS[1:], n=1, cutoff=0.65)
    if not found:
        return ""
    meant = "" if found[0] == str(name).lower() else f"did you mean {found[0]}? "
    return f"; {meant}{found[0]} is a mechanism: convert(model, {found[0]!r}) or AttentionSpec(mechanism={found[0]!r})"


def warn_unless_known(kind: str, name: str) -> None:
    """Warn of a name that no registry of `kind` has, if it has one like it; what is not imported yet knows no names."""
    table = _TABLES.get(kind)
    if table is not None and name not in table and (hint := nearest(name, table.names())):
        logger.warning(f"{kind} {name!r} is not known (yet); {hint}")


def with_known_fields(kind: type) -> type:
    """Let a dataclass refuse keywords that are no fields with the nearest names (class decorator)."""
    made, names = kind.__init__, [field.name for field in fields(kind)]

    @wraps(made)
    def __init__(self, *args, **given):
        for name in given:
            if name not in names:
                if name in _ELSEWHERE:
                    raise ValueError(f"{kind.__name__} has no field {name!r}: {_ELSEWHERE[name]}")
                own = _OTHER_WORDS.get(name)
                hint = f"did you mean {own}? " if own in names else nearest(name, names)
                raise ValueError(f"{kind.__name__} has no field {name!r}; {hint}its fields are {', '.join(names)}")
        made(self, *args, **given)

    kind.__init__ = __init__
    return kind


class Registry:
    """A case-insensitive table of objects by name, with aliases.

    Args:
        kind: what the entries are, in the singular; it appears in error messages ("unknown metric 'l7'").
    """

    def __init__(self, kind: str):
        self.kind = kind
        _TABLES[kind] = self
        self._entries: dict[str, object] = {}
        self._aliases: dict[str, str] = {}

    def register(self, name: str, entry: object, *, aliases: tuple[str, ...] = (), overwrite: bool = False) -> object:
        """Add `entry` under `name` and `aliases`; raises `ValueError` for a taken name unless `overwrite`."""
        names = [name.lower(), *(alias.lower() for alias in aliases)]
        taken_names = [n for n in names if n in self._entries or n in self._aliases]
        if taken_names and not overwrite:
            raise ValueError(f"{self.kind} {taken_names[0]!r} is already registered; pass overwrite=True to replace it")
        for taken_name in taken_names:
            self._aliases.pop(taken_name, None)
        self._entries[names[0]] = entry
        self._aliases.update(dict.fromkeys(names[1:], names[0]))
        return entry

    def canonical(self, name: str) -> str:
        """Return the canonical name for `name` or one of its aliases; raises `ValueError` listing the known ones."""
        if not isinstance(name, str):
            raise ValueError(f"{self.kind} must be a name (str), got {name!r}; expected one of {self.describe()}")
        key = name.lower()
        key = self._aliases.get(key, key)
        if key not in self._entries:
            hint = nearest(key, self.names())
            raise ValueError(f"unknown {self.kind} {name!r}; {hint}expected one of {self.describe()}")
        return key

    def get(self, name: str):
        """Return the entry registered under `name` or an alias of it."""
        return self._entries[self.canonical(name)]

    def names(self) -> list[str]:
        """Return all names, aliases among them."""
        return [*self._entries, *self._aliases]

    def describe(self) -> str:
        """Return the names with their aliases, for error messages and help texts."""
        parts = []
        for name in self._entries:
            aliases = [alias for alias, target in self._aliases.items() if target == name]
            parts.append(f"{name} ({', '.join(aliases)})" if aliases else name)
        return ", ".join(parts)

    def __contains__(self, name: str) -> bool:
        return isinstance(name, str) and (name.lower() in self._entries or name.lower() in self._aliases)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
