"""Style of the figures of an analysis, and how to save them or inline them in a page."""

import html
import io
import re
from functools import wraps
from pathlib import Path

# Colour of text and lines, which `inline_svg` replaces by the page's own.
INK = "#010203"
_RC = {
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.facecolor": "none", "figure.facecolor": "none", "font.size": 9, "axes.titlesize": 10,
    "svg.fonttype": "path", "svg.hashsalt": "distattn", "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
# Okabe and Ito (2008) without black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")


def require_matplotlib() -> None:
    """Raise `ValueError` with the install command if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("figures need matplotlib: pip install 'distattn_hf[viz]'") from None


def styled(function):
    """Decorate a drawing function to use this file's style instead of the user's."""

    @wraps(function)
    def draw(*args, **kwargs):
        require_matplotlib()
        import matplotlib

        with matplotlib.rc_context(_RC):
            return function(*args, **kwargs)

    return draw


def new_figure(width: float, height: float):
    """Return an empty figure, size in inches, that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure, stem: str | Path) -> list[Path]:
    """Write stem.svg and stem.png on a white background; returns both paths."""
    import matplotlib

    stem = Path(stem)
    paths = [stem.parent / f"{stem.name}{suffix}" for suffix in (".svg", ".png")]
    with matplotlib.rc_context(_RC):
        for path in paths:
            options = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 150}
            figure.savefig(path, facecolor="white", **options)
    return paths


def inline_svg(figure, label: str) -> str:
    """Return the figure as an <svg> element for HTML: transparent, in the page's text colour, without URLs."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(_RC):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace(INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label, quote=True)}"', 1).strip()
