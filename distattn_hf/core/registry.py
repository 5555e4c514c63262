"""Register and look up things by name, with errors that list what exists."""

from collections.abc import Iterator


class Registry:
    """A case-insensitive table of objects by name, with aliases.

    Args:
        kind: what the entries are, in the singular; it appears in error messages ("unknown metric 'l7'").
    """

    def __init__(self, kind: str):
        self.kind = kind
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
            raise ValueError(f"unknown {self.kind} {name!r}; expected one of {self.describe()}")
        return key

    def get(self, name: str):
        """Return the entry registered under `name` or an alias of it."""
        return self._entries[self.canonical(name)]

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
