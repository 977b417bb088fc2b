"""One figure: paired differences as points with their intervals, and the curves with bands where there are curves."""

import math
from collections.abc import Mapping, Sequence
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
LARGEST_RATIO = 100.0  # curves that span more are shown on a logarithmic axis


def save_figure(
    records: Sequence[Record], effects: Sequence[Effect], question: Question, titles: Mapping[str, str], stem: Path
) -> list[Path]:
    """As ``stem.png`` and ``stem.pdf``.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    names = {split_metric(metric)[0] for metric in question.metrics}
    if any(len(record.curves.get(name, ())) > 1 for record in records for name in names):
        return _saved(draw(records, effects, question), stem)
    return _saved(draw_forest({"": effects}, titles), stem)


def save_forest(
    effects: Mapping[str, Sequence[Effect]], titles: Mapping[str, str], heading: str, stem: Path
) -> list[Path]:
    """The differences under each condition, as ``stem.png`` and ``stem.pdf``.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    return _saved(draw_forest(effects, titles, heading), stem)


def _saved(figure: "Figure", stem: Path) -> list[Path]:
    paths = [stem.with_suffix(ending) for ending in (".png", ".pdf")]
    for path in paths:
        figure.savefig(path, dpi=DOTS_PER_INCH)
    return paths


def draw_forest(
    effects: Mapping[str, Sequence[Effect]], titles: Mapping[str, str], heading: str = "condition"
) -> "Figure":
    """A row for each condition, a column for each metric, in them a line for each arm: for what has no curves.

    Args:
        effects: of each condition, by its name; under ``""`` where there is one alone.
        titles: of conditions, metrics and arms, by their names.
        heading: what the conditions are, for those without a title.
    """
    from matplotlib.figure import Figure

    every = [effect for found in effects.values() for effect in found]
    arms, metrics = (list(dict.fromkeys(getattr(e, what) for e in every)) for what in ("arm", "metric"))
    colours = {arm: COLOURS[number % len(COLOURS)] for number, arm in enumerate(arms)}
    heights = [1.2 + len({effect.arm for effect in found}) for found in effects.values()]
    names = max(len(titles.get(arm, arm)) for arm in arms)
    width = min(14.0, max(WIDTH_INCHES, 0.075 * names + 1.75 * len(metrics)))
    figure = Figure(figsize=(width, 0.6 + 0.27 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(effects), len(metrics), squeeze=False, sharex="col", height_ratios=heights)
    for (condition, found), row in zip(effects.items(), grid, strict=True):
        for metric, axes in zip(metrics, row, strict=True):
            shown = [effect for effect in found if effect.metric == metric]
            _draw_lines(axes, shown, colours)
            labels = [titles.get(effect.arm, effect.arm) for effect in shown]
            axes.set_yticks(range(len(shown)), labels if axes is row[0] else [])
            axes.set_xlabel("")
            _plain(axes)
        if condition:
            name = titles.get(condition, f"{heading} {condition}")
            row[0].set_title(name, fontsize=8.5, loc="left", fontweight="bold")
    for metric, axes in zip(metrics, grid[-1], strict=True):
        shares = [effect.is_share for effect in every if effect.metric == metric]
        unit = " (points)" if all(shares) else ""
        bases = {titles.get(effect.base, effect.base) for effect in every}
        minus = f"minus {bases.pop()}" if len(bases) == 1 else "minus its base"
        axes.set_xlabel(f"{titles.get(metric, metric)}{unit},\n{minus}", fontsize=8)
    return figure


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
    _draw_lines(axes, effects, colours)
    axes.set_yticks(range(len(effects)), [effect.arm for effect in effects])
    unit = " (points)" if effects[0].is_share else ""
    name = effects[0].metric
    axes.set_xlabel(f"{name}, difference to {question.base}{unit}", fontsize=8)
    _plain(axes)


def _draw_lines(axes: "Axes", effects: Sequence[Effect], colours: dict[str, str]) -> None:
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
    axes.set_ylim(len(effects) - 0.45, -0.6)


def draw_curves(axes: "Axes", records: Sequence[Record], metric: str, colours: dict[str, str], effect: Effect) -> None:
    """The mean of each arm over its seeds, with a band of pointwise 95 % intervals of that mean."""
    from matplotlib.ticker import MaxNLocator

    name, factor = split_metric(metric)[0], effect.factor
    ends: list[float] = []
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
        ends += [point[1] * factor for point in points]
        low, high = ([_clipped(point[i], effect.bounds) * factor for point in points] for i in (2, 3))
        axes.fill_between(x, low, high, color=colours[arm], alpha=0.18, linewidth=0)
    if ends and min(ends) > 0 and max(ends) > LARGEST_RATIO * min(ends):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(ends) / 2)  # a band may reach below zero
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
