"""The figures of an analysis: matplotlib figures that stay readable with 12 layers of 12 heads and long texts.

Colours are safe for colour-blind readers: cividis for amounts, Okabe and Ito's palette for kinds. All functions return
a `matplotlib.figure.Figure`; `figure_style.save_figure` writes it as SVG and PNG.
"""

import re

import numpy as np

from ..figure_style import COLOURS, INK, new_figure, styled
from ..head_patterns import MIXED, PATTERNS

PATTERN_COLOURS = dict(zip((*PATTERNS, MIXED), (*COLOURS[:5], COLOURS[6], "#999999")))
_LETTERS = {"previous token": "P", "first token": "F", "diagonal": "D", "block": "B", "separator": "S"}
_LETTERS |= {"uniform": "U", MIXED: "·"}
# With more tokens on an axis, only every second, third, ... is labelled.
_MAX_LABELS = 64
# Nats below which a divergence is drawn as this, on a logarithmic axis.
_LEAST_DIVERGENCE = 1e-6
_TOKEN_LENGTH = 14


def short_names(modules: list[str]) -> list[str]:
    """Shorten module names to "3", or "dec 3 cross" where there are several kinds, if they stay distinct."""
    number_matches = [re.search(r"\d+", name) for name in modules]
    numbers = [match[0] if match else name for match, name in zip(number_matches, modules)]
    sides = [next((side[:3] for side in ("encoder", "decoder") if name.startswith(side)), "") for name in modules]
    crosses = [any(mark in name.lower() for mark in ("cross", "encdec", "encoder_attn")) for name in modules]
    full_names = [" ".join(filter(None, (s, n, "cross" * c))) for s, n, c in zip(sides, numbers, crosses)]
    return next((names for names in (numbers, full_names) if len(set(names)) == len(names)), list(modules))


def _tokens(tokens) -> list[str]:
    return [token if len(token) <= _TOKEN_LENGTH else token[: _TOKEN_LENGTH - 1] + "…" for token in tokens]


def _label_axis(axis, tokens: list[str], rotation: float, size: float = 7, most: int = _MAX_LABELS) -> None:
    step = -(-len(tokens) // most)
    axis.set_ticks(range(0, len(tokens), step), _tokens(tokens)[::step], rotation=rotation, fontsize=size)
    for label in axis.get_ticklabels():
        # A "$" is a token, not the start of a formula.
        label.set_parse_math(False)


@styled
def attention_map(weights, query_tokens: list[str], key_tokens: list[str] | None = None, title: str = ""):
    """Draw a heat map of one head: weights (N, M), queries from top to bottom."""
    weights = np.asarray(weights, dtype=float)
    key_tokens = query_tokens if key_tokens is None else key_tokens
    _check_tokens(weights, query_tokens, key_tokens)
    side = [min(10.0, max(2.0, 0.155 * count)) for count in weights.shape]
    figure = new_figure(side[1] + 1.8, side[0] + 1.3)
    axes = figure.subplots()
    image = axes.imshow(weights, cmap="cividis", vmin=0, vmax=max(weights.max(initial=0), 1e-9), aspect="auto")
    _label_axis(axes.xaxis, key_tokens, 90)
    _label_axis(axes.yaxis, query_tokens, 0)
    axes.set(xlabel="key", ylabel="query")
    axes.set_title(title, parse_math=False)
    figure.colorbar(image, ax=axes, label="weight", shrink=0.8)
    return figure


def _check_tokens(weights, query_tokens, key_tokens) -> None:
    if weights.ndim != 2 or weights.shape != (len(query_tokens), len(key_tokens)):
        raise ValueError(
            f"weights must have shape (queries, keys) = ({len(query_tokens)}, {len(key_tokens)}), got {weights.shape}"
        )


@styled
def maps_beside(teacher, student, tokens: list[str], title: str = "", key_tokens: list[str] | None = None):
    """Draw the same head of teacher and student on one scale, and student minus teacher."""
    from matplotlib.colors import TwoSlopeNorm

    maps = [np.asarray(w, dtype=float) for w in (teacher, student)]
    key_tokens = tokens if key_tokens is None else key_tokens
    for weights in maps:
        _check_tokens(weights, tokens, key_tokens)
    width, height = (min(2.75, max(1.5, 0.09 * len(names))) for names in (key_tokens, tokens))
    figure = new_figure(3 * width + 2.0, 1.45 * height + 1.3)
    axes = figure.subplots(1, 3, sharey=True)
    largest_weight = max(w.max(initial=0) for w in maps) or 1e-9
    for ax, weights, name in zip(axes, maps, ("teacher", "student")):
        image = ax.imshow(weights, cmap="cividis", vmin=0, vmax=largest_weight, aspect="auto")
        ax.set_title(name)
    figure.colorbar(image, ax=axes[:2], shrink=0.8, pad=0.01)
    difference = maps[1] - maps[0]
    largest = float(np.abs(difference).max(initial=0)) or 1e-9
    norm = TwoSlopeNorm(0, -largest, largest)
    image = axes[2].imshow(difference, cmap="PuOr", norm=norm, aspect="auto")
    figure.colorbar(image, ax=axes[2], shrink=0.8, pad=0.02)
    axes[2].set_title("student − teacher")
    for ax in axes:
        _label_axis(ax.xaxis, key_tokens, 90, 5.5, 30)
    _label_axis(axes[0].yaxis, tokens, 0, 5.5)
    figure.suptitle(title, parse_math=False)
    return figure


@styled
def head_maps(maps: dict, title: str = ""):
    """Draw small heat maps of all heads: {module: (H, N, M)}, one row per module, each map on its own scale."""
    if not maps:
        raise ValueError("maps is empty: give {module: weights (heads, queries, keys)}")
    names, count = list(maps), max(len(w) for w in maps.values())
    cell = 0.78 if count > 8 else 1.1
    figure = new_figure(cell * count + 1.1, cell * len(names) + 0.8)
    axes = figure.subplots(len(names), count, squeeze=False)
    for line, (row, label, name) in enumerate(zip(axes, short_names(names), names)):
        for head, ax in enumerate(row):
            ax.set(xticks=[], yticks=[])
            for side in ax.spines.values():
                side.set_linewidth(0.4)
            if head >= len(maps[name]):
                ax.set_visible(False)
                continue
            ax.imshow(np.asarray(maps[name][head], dtype=float), cmap="cividis", vmin=0, aspect="auto")
            if line == 0:
                ax.set_title(str(head), fontsize=8)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.supxlabel("above: head; left: module", fontsize=8)
    figure.suptitle(title, parse_math=False)
    return figure


@styled
def number_grid(grid, modules: list[str], label: str, *, diverging: bool = False, column: str = "head"):
    """Draw numbers as colours with labels: one row per module, one column per head, or per `column` (from 1); NaN stays
    empty."""
    from matplotlib.colors import TwoSlopeNorm

    values = np.asarray(grid, dtype=float)
    rows, columns = values.shape
    figure = new_figure(0.52 * columns + 2.0, 0.32 * rows + 1.1)
    axes = figure.subplots()
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    high = max(high, low + 1e-12)
    scale = {"vmin": low, "vmax": high}
    if diverging:
        largest = max(abs(low), abs(high), 1e-12)
        scale = {"norm": TwoSlopeNorm(0, -largest, largest)}
    image = axes.imshow(values, cmap="PuOr" if diverging else "cividis", aspect="auto", **scale)
    for (row, place), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.to_rgba(value)
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            colour = "#FFFFFF" if dark else "#000000"
            axes.text(place, row, _number(value), ha="center", va="center", fontsize=6.5, color=colour)
    _grid_axes(axes, short_names(modules), columns, column)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def _number(value: float) -> str:
    """Format a number in at most four characters plus sign, to fit a cell."""
    size = abs(value)
    if size >= 100 or size == 0:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.01 else f"{value:.0e}".replace("e-0", "e-")


def _grid_axes(axes, names: list[str], columns: int, column: str = "head") -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    first = 0 if column == "head" else 1
    axes.set_xticks(range(columns), range(first, columns + first), fontsize=8)
    axes.set(xlabel=column, ylabel="module")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


@styled
def pattern_grid(statistics):
    """Draw the dominant pattern of every head, as colour and letter; stronger ones are more opaque."""
    from matplotlib.patches import Patch, Rectangle

    modules = statistics.modules
    columns = max(len(statistics.of(name)) for name in modules)
    figure = new_figure(0.42 * columns + 3.0, max(2.3, 0.32 * len(modules) + 1.0))
    axes = figure.subplots()
    for row, name in enumerate(modules):
        for head in statistics.of(name):
            box = (head.head - 0.5, row - 0.5)
            alpha = 0.25 + 0.75 * min(1.0, head.strength)
            colour = PATTERN_COLOURS[head.pattern]
            axes.add_patch(Rectangle(box, 1, 1, facecolor="#FFFFFF", linewidth=0))
            axes.add_patch(Rectangle(box, 1, 1, facecolor=colour, alpha=alpha, linewidth=0))
            letter = _LETTERS[head.pattern]
            axes.text(head.head, row, letter, ha="center", va="center", fontsize=8, color="#000000")
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(len(modules) - 0.5, -0.5))
    _grid_axes(axes, short_names(modules), columns)
    present = {head.pattern for head in statistics.heads}
    handles = [Patch(color=c, label=f"{_LETTERS[n]}  {n}") for n, c in PATTERN_COLOURS.items() if n in present]
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    return figure


@styled
def layer_curves(statistics, teacher=None, names=("entropy", "maximum", "distance", "sparsity", "diversity")):
    """Draw means over heads, module by module, with the range of the heads shaded; the teacher's mean dashed."""
    labels = {
        "entropy": "entropy (nats)", "maximum": "largest weight", "distance": "attended distance (tokens)",
        "sparsity": "sparsity (0–1)", "diversity": "head diversity (nats)",
    }  # fmt: skip
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(2.9 * columns, 2.3 * rows + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, name in zip(axes, names):
        for source, style in ((statistics, {"color": COLOURS[0]}), (teacher, {"color": COLOURS[5], "ls": "--"})):
            if source is not None:
                grid, places = np.asarray(source.grid(name)), range(len(source.modules))
                if source is statistics:
                    low, high = np.nanmin(grid, axis=1), np.nanmax(grid, axis=1)
                    ax.fill_between(places, low, high, alpha=0.2, linewidth=0, color=COLOURS[0])
                label = "model" if source is statistics else "teacher"
                ax.plot(places, np.nanmean(grid, axis=1), marker="o", ms=3, label=label, **style)
        ax.set_title(labels.get(name, name))
        _module_ticks(ax, short_names(statistics.modules))
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    if teacher is not None:
        axes[0].legend(fontsize=7, frameon=False)
    return figure


def _module_ticks(axes, names: list[str]) -> None:
    step = -(-len(names) // 12)
    is_long = max(map(len, names)) > 3
    axes.set_xticks(range(0, len(names), step), names[::step], fontsize=7, rotation=90 if is_long else 0)
    axes.set_xlabel("module")


@styled
def curve(values: dict[str, list], modules: list[str], label: str):
    """Draw one line per series over the modules."""
    figure = new_figure(max(4.0, 0.3 * len(modules) + 2.0), 2.6)
    axes = figure.subplots()
    for (name, series), colour in zip(values.items(), COLOURS):
        axes.plot(range(len(modules)), series, marker="o", ms=4, color=colour, label=name)
    axes.set_ylabel(label)
    _module_ticks(axes, short_names(modules))
    if len(values) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure


@styled
def head_parameters(groups: list[dict]):
    """Draw λ and α of every head in the conversion report's groups, one column of points per module."""
    from matplotlib.ticker import LogLocator, NullFormatter

    kinds = [k for k in ("lam", "alpha") if any(g.get(k) for g in groups)]
    if not kinds:
        raise ValueError("groups hold neither λ nor α")
    modules = list(dict.fromkeys(group["module"] for group in groups))
    figure = new_figure(max(4.0, 0.35 * len(modules) + 1.6) * len(kinds), 3.0)
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    for ax, kind in zip(axes, kinds):
        for group in groups:
            values = group.get(kind) or []
            spread = np.linspace(-0.25, 0.25, len(values)) if len(values) > 1 else [0.0] * len(values)
            place = modules.index(group["module"])
            ax.plot(place + np.asarray(spread), values, "o", ms=3.5, alpha=0.8, color=COLOURS[0])
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_title({"lam": "λ per head", "alpha": "α per head (1: the distance as it is)"}[kind])
        if kind == "alpha":
            ax.axhline(1.0, color=INK, linewidth=0.6, linestyle=":")
        _module_ticks(ax, short_names(modules))
    return figure


@styled
def softening_dial(groups: list[dict]):
    """Draw the divergence of every head against its ε/median: from the plain distance, at 0, to what was fitted."""
    figure = new_figure(5.0, 3.4)
    ax = figure.subplots()
    # Linear up to a hundredth of the median: the plain distance, at 0, has a place on the axis.
    ax.set_xscale("symlog", linthresh=0.01)
    ax.set_yscale("log")
    for group in groups:
        ends = (group.get(name) for name in ("softening_ratio", "divergence_plain", "divergence_after"))
        for ratio, plain, fitted in zip(*(values or () for values in ends)):
            points = np.maximum([plain, fitted], _LEAST_DIVERGENCE)
            ax.plot([0, ratio], points, "-", linewidth=0.5, alpha=0.4, color=COLOURS[0])
            ax.plot([0], points[:1], "o", ms=3.5, alpha=0.8, color=COLOURS[1])
            ax.plot([ratio], points[1:], "o", ms=3.5, alpha=0.8, color=COLOURS[0])
    ax.set_xlim(left=-0.002)
    ax.set_xlabel("ε in medians of the head's distances (0: the plain distance)")
    ax.set_ylabel("KL from the teacher, nats per query")
    return figure


@styled
def token_bars(values, tokens: list[str], label: str):
    """Draw one signed number per token, as bars from top to bottom."""
    values = np.asarray(values, dtype=float)
    if values.shape != (len(tokens),):
        raise ValueError(f"values must be one a token ({len(tokens)}), got shape {values.shape}")
    figure = new_figure(5.0, min(12.0, max(1.6, 0.16 * len(tokens) + 0.8)))
    axes = figure.subplots()
    colours = [COLOURS[0] if value >= 0 else COLOURS[5] for value in values]
    axes.barh(range(len(tokens)), values, color=colours)
    axes.axvline(0, color=INK, linewidth=0.6)
    _label_axis(axes.yaxis, tokens, 0)
    axes.set(ylim=(len(tokens) - 0.5, -0.5), xlabel=label)
    return figure
