"""The shift of layers over a run, as a figure: curves, and a map of layers and epochs."""

import math
from typing import TYPE_CHECKING

from lightning_feat.callbacks.reports.curves import WIDTH_INCHES, Points
from lightning_feat.callbacks.reports.figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_CURVES = len(COLOURS)  # beyond, the map shows more than a tangle would


def draw_shifts(points: Points, title: str = "") -> "Figure":
    """A figure of two panels: the relative shift of each layer against the epochs completed, and all of them as a map.

    Args:
        points: ``(epochs completed, relative shift)`` by layer, from input to output.
        title: of the whole, in small letters.
    """
    from matplotlib.figure import Figure

    # Not by pyplot: that would choose a window system, and keep the figure.
    height = max(2.4, 0.9 + 0.16 * len(points))
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    draw_curves(points, left)
    draw_map(points, right)
    if title:
        figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure


def draw_curves(points: Points, axes: "Axes") -> None:
    """The curves; of many layers some, evenly spread, the first and the last among them."""
    from matplotlib.ticker import MaxNLocator

    names = [*points]
    if len(names) > _MOST_CURVES:
        step = (len(names) - 1) / (_MOST_CURVES - 1)
        names = [names[round(i * step)] for i in range(_MOST_CURVES)]
    for number, name in enumerate(names):
        x, y = zip(*points[name], strict=True)
        axes.plot(x, y, color=COLOURS[number], linewidth=1.3, marker="o", markersize=2.5, label=name)
    axes.set_xlabel("epochs completed", fontsize=8)
    axes.set_ylabel("relative feature shift", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), borderaxespad=0, frameon=False, fontsize=6, ncols=2)


def draw_map(points: Points, axes: "Axes", largest: float | None = None) -> None:
    """Layers from bottom to top, epochs from left to right; nan is left white."""
    from matplotlib.ticker import MaxNLocator

    epochs = sorted({x for line in points.values() for x, _ in line})
    rows = [[dict(line).get(x, math.nan) for x in epochs] for line in points.values()]
    image = axes.imshow(rows, aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=largest, interpolation="none")
    bar = axes.figure.colorbar(image, ax=axes)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("relative feature shift", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(lambda place, _: f"{epochs[int(place)]:g}" if 0 <= place < len(epochs) else "")
    if len(rows) <= 32:
        axes.set_yticks(range(len(rows)), [*points], fontsize=6)
    axes.set_xlabel("epochs completed", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.tick_params(labelsize=7, axis="x")
