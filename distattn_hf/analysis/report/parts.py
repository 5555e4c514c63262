"""Building blocks of an analysis report: paragraphs, figures with captions, tables."""

import math
from dataclasses import dataclass, field


@dataclass
class Drawing:
    """A matplotlib figure, the stem of its file name, and a caption."""

    name: str
    figure: object
    caption: str


@dataclass
class Section:
    """A heading, paragraphs, figures, and a table, header first; all in plain text."""

    title: str
    words: list[str] = field(default_factory=list)
    figures: list[Drawing] = field(default_factory=list)
    table: list[list[str]] = field(default_factory=list)


@dataclass
class Example:
    """Maps of the first text: {module: {"weights" (H, N, M), "kind", "layer"}} of model and teacher, heads to show
    large, the rollout (N, N), and tokens by part ("encoder", and "decoder" if there is one)."""

    maps: dict
    teacher_maps: dict
    shown: dict[str, list[int]]
    rollout: object
    tokens: dict[str, list[str]]

    def tokens_of(self, module: str) -> tuple[list[str], list[str]]:
        """Return (query tokens, key tokens) of a module."""
        source = self.tokens["encoder"]
        target = self.tokens.get("decoder", source)
        if self.maps[module]["kind"] == "cross":
            return target, source
        tokens = target if "decoder" in module else source
        return tokens, tokens


def number(value: float) -> str:
    """Format a number with three significant digits."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def plural(count: int, word: str) -> str:
    """Format a count with its noun: "1 head", "3 heads"."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def place(names: dict[str, str], module: str, head: int) -> str:
    """Return the name of a head in the text; names: short names of the modules."""
    return f"module {names[module]} head {head}"


def listed(parts: list[str], most: int = 6) -> str:
    """Join the parts to "a, b and 3 more"."""
    parts = parts if len(parts) <= most else [*parts[:most], f"{len(parts) - most} more"]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
