"""The run in a figure, when it ends."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_feat.callbacks.reports.figures import COLOURS, folder_for_figures, publish_figure
from lightning_feat.callbacks.reports.history import MetricHistory, select, unmatched
from lightning_feat.joints.arguments import check_fields, checked

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = dict[str, list[tuple[float, float]]]  # (epochs completed, value) of each metric

MARKERS, DASHES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", ":", "-.")
PANEL_INCHES, WIDTH_INCHES = 1.6, 6.5  # as wide as the text of a letter-sized page with one-inch margins


@dataclass
class Panel:
    """One pair of axes: which metrics, against the epochs completed.

    Args:
        metrics: patterns for metric names (``neural_collapse/nc1/*``), or the pattern for each name in the legend.
        label: of the vertical axis, with the unit.
        log_scale: logarithmic vertical axis; values that are not positive leave gaps.
        scale: factor from the logged value to the unit of the axis: 100 for a share shown in percent.
    """

    metrics: list[str] | dict[str, str]
    label: str
    log_scale: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)


class CurvePlotter(MetricHistory):
    """Draw logged metrics against the epoch into a figure when fitting ends, also early, interrupted or by an error.

    The file is put into the run's own folder (``joints.run.folder``), and the figure into every logger that shows
    images. A folder that cannot be written to is a warning. Needs matplotlib, at the start of fitting already.

    Args:
        panels: from top to bottom. ``None`` makes one for losses, one for accuracies and one for each method, by the
            first part of the metric's name, with a log axis where values span more than two decades.
        filename: relative to that folder, or absolute; its ending says the format: png, pdf or svg.

    Example:
        >>> plotter = CurvePlotter([Panel(["val/accuracy"], "validation accuracy (%)", scale=100)])
    """

    @checked
    def __init__(self, panels: list[Panel] | None = None, filename: str = "curves.png") -> None:
        super().__init__()
        if panels is not None and not panels:
            raise ValueError("panels=[]: give at least one panel, or None for panels by the names of the metrics.")
        for panel in panels or []:
            if not panel.metrics:
                raise ValueError(f"The panel {panel.label!r} has no metrics: give it at least one pattern.")
            if not math.isfinite(panel.scale) or panel.scale == 0:
                raise ValueError(f"The panel {panel.label!r} has scale={panel.scale}: give a finite factor, not zero.")
        if os.path.splitext(filename)[1] not in (".png", ".pdf", ".svg"):
            raise ValueError(f"filename={filename!r}: end it in .png, .pdf or .svg.")
        self.panels, self.filename = panels, filename
        self.folder = ""

    @property
    def state_key(self) -> str:
        return self._generate_state_key(filename=self.filename)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.folder = folder_for_figures(trainer, "CurvePlotter")

    def report(self, trainer: Trainer) -> None:
        panels = default_panels(self.points) if self.panels is None else self.panels
        for panel in panels:
            for sentence in unmatched(panel.metrics, self.points):
                rank_zero_warn(f"CurvePlotter, panel {panel.label!r}: {sentence}")
        panels = [panel for panel in panels if select(panel.metrics, self.points)]
        if not panels:
            return
        figure = draw(panels, self.points)
        if getattr(trainer, "fast_dev_run", False):  # nothing is to be left behind
            return
        publish_figure(trainer, figure, self.folder, self.filename, os.path.splitext(self.filename)[0])


def draw(panels: Sequence[Panel], points: Points) -> "Figure":
    """A figure with the panels one above the other, over one axis of epochs; each needs a metric that is there."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Not by pyplot: that would choose a window system, and keep the figure.
    figure = Figure(figsize=(WIDTH_INCHES, 0.5 + PANEL_INCHES * len(panels)), layout="constrained")
    rows: list[Axes] = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
    for panel, axes in zip(panels, rows, strict=True):
        draw_panel(panel, points, axes)
    rows[-1].set_xlabel("epoch", fontsize=9)
    rows[-1].xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    figure.align_ylabels(rows)
    return figure


def draw_panel(panel: Panel, points: Points, axes: "Axes") -> None:
    """The curves of one panel, each with a marker at its last value."""
    from matplotlib.ticker import LogLocator

    shown = select(panel.metrics, points)
    for number, (name, title) in enumerate(shown.items()):
        x = [epochs for epochs, _ in points[name]]
        y = [panel.scale * value for _, value in points[name]]
        visible = [i for i, value in enumerate(y) if math.isfinite(value) and (value > 0 or not panel.log_scale)]
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        dashes = DASHES[number // len(COLOURS) % len(DASHES)]
        # A value that is nan or below a log axis interrupts the curve: that it could not be measured is to be seen.
        drawn = [value if i in set(visible) else math.nan for i, value in enumerate(y)]
        axes.plot(
            x, drawn, linestyle=dashes, linewidth=1.3, markersize=4.5, markevery=visible[-1:], label=title, **style
        )
        if panel.log_scale and visible:
            axes.set_yscale("log")
    positive = [panel.scale * value for name in shown for _, value in points[name] if 0 < value < math.inf]
    if axes.get_yscale() == "log" and max(positive) < 100 * min(positive):  # powers of ten alone would be one or none
        axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel(panel.label, fontsize=9)
    axes.tick_params(labelsize=8, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02, y=0.08)
    if len(shown) > 1 or isinstance(panel.metrics, dict):
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False, fontsize=8)


def default_panels(points: Points) -> list[Panel]:
    """Losses, accuracies, then one panel for each first part of the other names."""
    # A metric logged by step and by epoch is there three times; the one without an ending is enough.
    names = [
        name for name in points if not re.fullmatch(r"(.+)_(step|epoch)", name) or name.rsplit("_", 1)[0] not in points
    ]
    groups: dict[str, list[str]] = {"loss": [], "accuracy": []}
    for name in names:
        parts = [part for part in name.split("/") if part not in ("train", "val", "test")]
        is_method = "/" in name and parts and parts[0] == name.split("/")[0]
        if is_method:
            groups.setdefault(parts[0], []).append(name)
        elif "loss" in name:
            groups["loss"].append(name)
        elif "acc" in name:
            groups["accuracy"].append(name)
        else:
            groups.setdefault(parts[0] if parts else name, []).append(name)
    panels = []
    for title, members in groups.items():
        values = [value for name in members for _, value in points[name]]
        wide = bool(values) and min(values) > 0 and max(values) > 100 * min(values)
        if members:
            label = members[0].replace("/", "\n") if len(members) == 1 else title.replace("_", " ")
            panels.append(Panel(members, label, log_scale=wide))
    return panels
