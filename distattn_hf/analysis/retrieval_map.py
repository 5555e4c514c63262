"""Draw what models found in long texts, by length and depth."""

import numpy as np

from .figure_style import new_figure, styled


@styled
def retrieval_map(rows: list[dict], title: str = "", by: str = "model"):
    """Draw the share of exact answers as a heat map, length by depth, for each model.

    rows: {by: name, "length", "depth", "exact"}; a cell that no row has stays empty. Raises `ValueError` without rows.
    """
    if not rows:
        raise ValueError("rows is empty: there is nothing to draw")
    names = list(dict.fromkeys(row[by] for row in rows))
    lengths, depths = (sorted({row[key] for row in rows}) for key in ("length", "depth"))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    width, height = 0.55 * len(lengths) + 1.2, 0.32 * len(depths) + 1.0
    figure = new_figure(columns * width + 0.9, lines * height + 0.3)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.flat, names):
        shares = np.full((len(depths), len(lengths)), np.nan)
        for row in (row for row in rows if row[by] == name):
            shares[depths.index(row["depth"]), lengths.index(row["length"])] = row["exact"]
        image = ax.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (line, column), share in np.ndenumerate(shares):
            if not np.isnan(share):
                ax.text(column, line, f"{100 * share:.0f}", ha="center", va="center", fontsize=7,
                        color="white" if share < 0.6 else "black")  # fmt: skip
        ax.set_title(name, parse_math=False)
        ax.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right")
        ax.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    figure.supxlabel("tokens of the text", fontsize=9)
    figure.supylabel("depth of what is hidden", fontsize=9)
    figure.colorbar(image, ax=axes, label="exact answers", shrink=0.8)
    figure.suptitle(title, parse_math=False)
    return figure
