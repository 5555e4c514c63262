"""The figures of `distattn benchmark`: time and memory against length, both axes logarithmic."""

import io
from pathlib import Path

from ..storage.folders import write_atomically

# Okabe and Ito's palette, safe for colour-blind readers; black is PyTorch's attention.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_MARKERS = "osD^vP*X<>"
_NAIVE = "dotted: naive\n(cdist + softmax)"
_TITLES = {"forward": "forward", "forward_backward": "forward + backward", "decode": "decode, one query"}


def require_matplotlib() -> None:
    """Raise `ValueError` with the install command if matplotlib is missing, before hours of measurements."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("the plot needs matplotlib: pip install 'distattn_hf[viz]', or pass --no-plot") from None


def plot_results(report: dict, folder: Path) -> list[Path]:
    """Draw one figure per dtype, head size, causality and backend asked for, as PNG and SVG; returns the files.

    Decode is the same with and without causality and appears in both.
    """
    measured = [r for r in report["results"] if r["status"] == "ok"]
    keys = [(r["dtype"], r["head_size"], r["causal"], r["backend"]) for r in measured if r["pass"] != "decode"]
    keys = keys or [(r["dtype"], r["head_size"], r["causal"], r["backend"]) for r in measured]
    paths = []
    for dtype, size, causal, backend in dict.fromkeys(keys):
        selected = [
            r
            for r in measured
            if (r["dtype"], r["head_size"], r["backend"]) == (dtype, size, backend)
            and (r["causal"] == causal or r["pass"] == "decode")
        ]
        title = f"{report['provenance']['device']}, {dtype}, d={size}, {'causal' if causal else 'not causal'}"
        stem = f"benchmark-{dtype}-d{size}-{'causal' if causal else 'full'}-{backend}"
        paths += _draw(selected, title, folder / stem)
    return paths


def _draw(results: list[dict], title: str, stem: Path) -> list[Path]:
    """Draw a row of panels per pass: time on the left, memory on the right if it was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullLocator

    passes = list(dict.fromkeys(r["pass"] for r in results))
    metrics = list(dict.fromkeys(r["label"] for r in results))
    quantities = [("seconds a call", _seconds)]
    if any(_memory(r, "ours") is not None for r in results):
        quantities.append(("peak memory in MB", _memory))
    figure = Figure(figsize=(1.5 + 4.6 * len(quantities), 0.9 + 3.3 * len(passes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(passes), len(quantities), squeeze=False)
    labels = {}
    for row, name in enumerate(passes):
        pass_results = [r for r in results if r["pass"] == name]
        lengths = sorted({r["length"] for r in pass_results})
        for column, (unit, read) in enumerate(quantities):
            panel = axes[row, column]
            panel.set(xscale="log", yscale="log", title=_TITLES[name], ylabel=unit)
            panel.set_xlabel("keys" if name == "decode" else "length N")
            panel.set_xticks(lengths, [str(n) for n in lengths])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.grid(alpha=0.25)
            for label, points, style in _lines(pass_results, metrics, read):
                (line,) = panel.plot(*zip(*points), **style)
                if label is not None:
                    labels.setdefault(label, line)
                elif _NAIVE not in labels:
                    labels[_NAIVE] = Line2D([], [], color="grey", linestyle=":")
    if _NAIVE in labels:
        labels[_NAIVE] = labels.pop(_NAIVE)  # last
    figure.suptitle(title, fontsize=10)
    figure.legend(labels.values(), labels.keys(), loc="outside right upper", fontsize=8, frameon=False)
    paths = []
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=150)
        paths.append(stem.with_name(f"{stem.name}.{kind}"))
        write_atomically(paths[-1], buffer.getvalue())
    return paths


def _lines(results: list[dict], metrics: list[str], read):
    """Yield (label, [(length, value), ...], style) of PyTorch's attention, each metric, its naive form (no label)."""
    sdpa = {}
    for result in results:
        if (value := read(result, "sdpa")) is not None:
            sdpa.setdefault(result["length"], []).append(value)
    if sdpa:
        points = [(n, sorted(values)[len(values) // 2]) for n, values in sorted(sdpa.items())]
        yield "PyTorch SDPA", points, {"color": "black", "linewidth": 2.2, "marker": "."}
    for index, metric in enumerate(metrics):
        style = {"color": _COLOURS[index % len(_COLOURS)], "markersize": 5, "linewidth": 1.3}
        metric_results = sorted((r for r in results if r["label"] == metric), key=lambda r: r["length"])
        for competitor, label, marker_style in (
            ("ours", metric, {"marker": _MARKERS[index % len(_MARKERS)]}),
            ("naive", None, {"linestyle": ":", "marker": ".", "markersize": 3}),
        ):
            points = [(r["length"], value) for r in metric_results if (value := read(r, competitor)) is not None]
            if points:
                yield label, points, {**style, **marker_style}


def _seconds(result: dict, who: str) -> float | None:
    if who == "naive":
        return result["naive"].get("seconds", {}).get("median")
    return None if result[who] is None else result[who]["median"]


def _memory(result: dict, who: str) -> float | None:
    """Return megabytes; None if not measured, and for 0, which a logarithmic axis cannot show."""
    value = result["memory"].get(who)
    return value if isinstance(value, float) and value > 0 else None
