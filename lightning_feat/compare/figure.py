"""One figure: paired differences as points with their intervals, and the curves with bands."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_feat.compare.effects import Effect, Question
from lightning_feat.compare.records import Curve, Record, split_metric
from lightning_feat.compare.statistics import mean_of, paired_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design", 2008: distinct for all kinds of colour vision. The base is grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BASE_COLOUR = "#6b6b6b"
WIDTH_INCHES = 6.5  # as wide as the text of a letter-sized page with one-inch margins
DOTS_PER_INCH = 200


def save_figure(records: Sequence[Record], effects: Sequence[Effect], question: Question, stem: Path) -> list[Path]:
    """As ``stem.png`` and ``stem.pdf``.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    figure = draw(records, effects, question)
    paths = [stem.with_suffix(ending) for ending in (".png", ".pdf")]
    for path in paths:
        figure.savefig(path, dpi=DOTS_PER_INCH)
    return paths


def draw(records: Sequence[Record], effects: Sequence[Effect], question: Question) -> "Figure":
    """A row for each metric: differences on the left, curves on the right."""
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(effect.arm for effect in effects))
    colours = {arm: COLOURS[number % len(COLOURS)] for number, arm in enumerate(arms)} | {question.base: BASE_COLOUR}
    height = max(2.1, 1.0 + 0.42 * len(arms))
    # Not by pyplot: that would choose a window system, and keep the figure.
    figure = Figure(figsize=(WIDTH_INCHES, height * len(question.metrics) + 0.2), layout="constrained")
    rows = figure.subplots(len(question.metrics), 2, squeeze=False, width_ratios=[1.0, 1.15])
    for metric, (left, right) in zip(question.metrics, rows, strict=True):
        shown = [effect for effect in effects if effect.metric == metric]
        draw_differences(left, shown, colours, question)
        draw_curves(right, records, metric, colours, shown[0])
    return figure


def draw_differences(axes: "Axes", effects: Sequence[Effect], colours: dict[str, str], question: Question) -> None:
    """A line for each arm: small points are seeds, the large one is their mean, the bar its interval."""
    axes.axvline(0, color="#999999", linewidth=0.8, zorder=0)
    for place, effect in enumerate(effects):
        colour, factor = colours[effect.arm], effect.factor
        seeds = [difference * factor for difference in effect.differences]
        axes.plot(seeds, [place + 0.2] * len(seeds), "o", color=colour, alpha=0.4, markersize=3, markeredgewidth=0)
        if math.isnan(effect.difference):
            continue
        if effect.interval:
            axes.plot([end * factor for end in effect.interval], [place, place], color=colour, linewidth=1.8)
        axes.plot(effect.difference * factor, place, "o", color=colour, markersize=6)
    axes.set_yticks(range(len(effects)), [effect.arm for effect in effects])
    axes.set_ylim(len(effects) - 0.45, -0.6)
    unit = " (points)" if effects[0].is_share else ""
    name = effects[0].metric
    axes.set_xlabel(f"{name}, difference to {question.base}{unit}", fontsize=8)
    _plain(axes)


def draw_curves(axes: "Axes", records: Sequence[Record], metric: str, colours: dict[str, str], effect: Effect) -> None:
    """The mean of each arm over its seeds, with a band of pointwise 95 % intervals of that mean."""
    from matplotlib.ticker import MaxNLocator

    name, factor = split_metric(metric)[0], effect.factor
    for arm in [effect.base, *(arm for arm in colours if arm != effect.base)]:
        runs = [record for record in records if record.arm == arm and record.finished]
        points = _band([record.curves[name] for record in runs if name in record.curves])
        if not points:
            continue
        x = [point[0] for point in points]
        axes.plot(
            x,
            [point[1] * factor for point in points],
            color=colours[arm],
            linewidth=1.4,
            label=arm,
            marker="o" if len(points) == 1 else None,
            markersize=4,
        )
        low, high = ([_clipped(point[i], effect.bounds) * factor for point in points] for i in (2, 3))
        axes.fill_between(x, low, high, color=colours[arm], alpha=0.18, linewidth=0)
    axes.set_xlabel("epoch", fontsize=8)
    axes.set_ylabel(name + (" (%)" if effect.is_share else ""), fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    _plain(axes)
    if axes.lines:
        axes.legend(frameon=False, fontsize=7.5, handlelength=1.4)


def _band(curves: Sequence[Curve]) -> list[tuple[float, float, float, float]]:
    """Epoch, mean, and ends of the interval, where all runs have a finite value."""
    tables = [dict(curve) for curve in curves]
    if not tables:
        return []
    common = sorted(set.intersection(*(set(table) for table in tables)))
    points = []
    for x in common:
        values = [table[x] for table in tables]
        if all(map(math.isfinite, values)):
            mean = mean_of(values)
            low, high = paired_interval(values) or (mean, mean)
            points.append((x, mean, low, high))
    return points


def _clipped(value: float, bounds: tuple[float, float] | None) -> float:
    return value if bounds is None else min(max(value, bounds[0]), bounds[1])


def _plain(axes: "Axes") -> None:
    axes.tick_params(labelsize=7.5)
    axes.spines[["top", "right"]].set_visible(False)
