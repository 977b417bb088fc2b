"""Neural collapse at one moment, as a figure: angles of the class means, spectra of the scatter, and the way there."""

import math
from typing import TYPE_CHECKING, Any

from lightning_feat.callbacks.reports.curves import WIDTH_INCHES, Panel, Points, draw_panel
from lightning_feat.callbacks.reports.figures import COLOURS
from lightning_feat.functional.neural_collapse import CollapsePicture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = {
    "NC1 pseudo-inverse / K": "nc1_pinv_over_k",
    "NC1 quotient of traces": "nc1_quotient",
    "NC2 means to simplex": "nc2_etf_error",
    "NC3 head to means": "nc3",
    "NC4 nearest mean differs": "nc4_mismatch",
}
_DECADES = 12  # what lies further below the largest eigenvalue is rounding, and would take up the axis


def draw_collapse(picture: CollapsePicture, points: Points, title: str = "") -> "Figure":
    """A figure of three panels: cosines of the class means, spectra of the scatter, ``CURVES`` over the epochs.

    Args:
        picture: what to show of this moment.
        points: ``(epochs completed, value)`` by the name of the measure.
        title: of the whole, in small letters.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Not by pyplot: that would choose a window system, and keep the figure.
    figure = Figure(figsize=(WIDTH_INCHES, 5.2), layout="constrained")
    upper, lower = (*figure.subfigures(2, 1, squeeze=False, height_ratios=[1.5, 1])[:, 0],)  # each with its margins
    left, right = upper.subplots(1, 2, width_ratios=[1.2, 1])
    _draw_cosines(picture, left)
    _draw_spectra(picture, right)
    curves = lower.subplots()
    seen = {name: values for name, values in points.items() if any(value > 0 for _, value in values)}
    shown = {text: name for text, name in CURVES.items() if name in seen}
    if shown:
        draw_panel(Panel(shown, "measure (0: collapsed)", log_scale=True), seen, curves)
    curves.set_xlabel("epochs completed", fontsize=9)
    last = max((epochs for values in points.values() for epochs, _ in values), default=0.0)
    curves.set_xlim(0, 1.02 * max(last, 2.0))
    curves.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    if title:
        upper.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure


def _draw_cosines(picture: CollapsePicture, axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    simplex = picture.simplex_cosine
    middle = 0.0 if simplex is None else simplex
    # White is the simplex: what differs from it shows as a colour, on either side by the same scale.
    image = axes.imshow(picture.cosines.cpu().numpy(), cmap="RdBu_r", vmin=2 * middle - 1, vmax=1)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85)
    bar.ax.set_ylim(-1, 1)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("cosine of centred class means", fontsize=8)
    if simplex is not None:
        bar.ax.axhline(simplex, color="black", linewidth=1.2)
        arrow = {"arrowstyle": "-|>", "linewidth": 0.8, "color": "black", "shrinkA": 0, "shrinkB": 0}
        bar.ax.annotate(
            f"simplex\n{simplex:.3g}",
            xy=(0, simplex),
            xytext=(-1.0, simplex),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom" if simplex < -0.9 else "center",
            fontsize=7,
            arrowprops=arrow,
        )
    shown = len(picture.classes)
    if shown <= 20:
        labels = [str(int(index)) for index in picture.classes]
        axes.set_xticks(range(shown), labels)
        axes.set_yticks(range(shown), labels)
    elif shown < picture.num_classes or int(picture.classes[-1]) != shown - 1:
        axes.set_xticks([])
        axes.set_yticks([])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.tick_params(labelsize=7)
    axes.set_xlabel(
        "class" if shown == picture.num_classes else f"{shown} of {picture.num_classes} classes", fontsize=8
    )
    axes.set_ylabel("class", fontsize=8)


def _draw_spectra(picture: CollapsePicture, axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    found, most = len(picture.between), max(picture.num_classes - 1, 0)
    directions = f"{found} = K - 1" if found == most else f"{found} of K - 1 = {most}"
    lines: list[tuple[str, list[float], dict[str, Any]]] = [
        (
            f"between classes: {directions}",
            picture.between.tolist(),
            {"marker": "o", "linestyle": ":", "linewidth": 0.8},
        )
    ]
    if picture.within is None:
        lines.append((f"within classes: not measured (D = {picture.num_features})", [], {"linestyle": ""}))
    else:
        lines.append(("within classes", picture.within.tolist(), {"linewidth": 1.3}))
    largest = max((value for _, values, _ in lines for value in values if math.isfinite(value)), default=0.0)
    lowest = largest * 10.0**-_DECADES
    for number, (label, values, style) in enumerate(lines):
        drawn = [value if value > lowest else math.nan for value in values]
        axes.plot(range(1, len(drawn) + 1), drawn, color=COLOURS[number], markersize=3, label=label, **style)
    shown = [value for _, values, _ in lines for value in values if value > lowest]
    if shown:
        axes.set_yscale("log")
        if max(shown) < 100 * min(shown):  # powers of ten alone would be one or none
            axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
    if max(len(values) for _, values, _ in lines) > 20:
        axes.set_xscale("log")  # a few directions between, and hundreds within, all to be seen
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel("direction, by size", fontsize=8)
    axes.set_ylabel("eigenvalue of the scatter", fontsize=8)
    axes.tick_params(labelsize=7, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), borderaxespad=0, frameon=False, fontsize=7)
