"""How the time of each method grows: exponents in the numbers of classes, features, samples and processes.

    python benchmarks/growth.py [--quick] [--figure growth.png]

Sizes that double are measured in turns; in each round a line is fitted to the logarithms (least squares), whose slope
is the exponent in that range of sizes: below what the operations would say where a fixed part weighs, as it does at
small sizes. Told are the median of the slopes and the middle half of them.
"""

import argparse
from typing import NamedTuple

import numpy as np
import processes
from subjects import SUBJECTS
from turns import Effort, Spread, add_efforts, in_turns, pick, spread_of, table, timed

from lightning_feat.callbacks.reports.figures import COLOURS, DOTS_PER_INCH

AXES = {"classes": "classes", "width": "features", "samples": "samples", "processes": "processes"}
MARKS = "osD^vP*"


class Curve(NamedTuple):
    """Seconds in each round, of each size."""

    name: str
    axis: str
    sizes: list[int]
    rounds: list[list[float]]

    def slope(self) -> Spread:
        x = np.log(self.sizes)
        return spread_of([float(np.polyfit(x, np.log(times), 1)[0]) for times in self.rounds])

    def quartiles(self) -> list[Spread]:
        return [spread_of(column) for column in zip(*self.rounds, strict=True)]


def measure(effort: Effort, device: str, seconds: float = 70.0) -> list[Curve]:
    factors = pick(effort, (0.5, 1.0, 2.0, 4.0), (0.25, 0.5, 1.0), (0.2, 0.4))
    pairs = [(subject, axis) for subject in SUBJECTS for axis in subject.grows]
    curves = []
    for subject, axis in pairs:
        sizes = subject.sizes(axis, factors)
        ways = {str(each): timed(subject.make(each, device), device) for each in sizes}
        for way in ways.values():
            way()
        taken = in_turns(ways, seconds / len(pairs), effort, most=15)
        rounds = [list(times) for times in zip(*taken.values(), strict=True)]
        curves.append(Curve(subject.name, axis, [getattr(each, axis) for each in sizes], rounds))
    if device == "cpu":
        counts = list(pick(effort, processes.COUNTS, processes.COUNTS[:2], processes.COUNTS[:2]))
        curves += [Curve(name, "processes", counts, rounds) for name, rounds in processes.measure(effort).items()]
    return curves


def told(curves: list[Curve]) -> str:
    """The table of exponents."""
    slopes = {(curve.name, curve.axis): curve for curve in curves}
    rows = []
    for name in dict.fromkeys(curve.name for curve in curves):
        cells = []
        for axis in AXES:
            curve = slopes.get((name, axis))
            cells.append(f"{_slope(curve.slope())}, {curve.sizes[0]:,} to {curve.sizes[-1]:,}" if curve else "")
        rows.append((name, *cells))
    return table(("time of", *AXES.values()), rows)


def _slope(slope: Spread) -> str:
    middle, low, high = (f"{value:.2f}" for value in (slope.middle, slope.low, slope.high))
    return middle if slope.rounds == 1 else f"{middle} ({low} to {high})"


def draw(curves: list[Curve], path: str) -> None:
    """Medians over sizes on logarithmic axes, one panel for each size; bars are the middle half."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    names = list(dict.fromkeys(curve.name for curve in curves))
    methods = [name for name in names if name not in processes.TOGETHER]
    looks = {name: (COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)], False) for i, name in enumerate(methods)}
    looks |= {name: (*looks[alone][:2], True) for name, alone in processes.TOGETHER.items() if name in names}
    figure = Figure(figsize=(10.5, 4.3))
    panels = figure.subplots(1, len(AXES), sharey=True)
    shown = {}
    for panel, (axis, title) in zip(panels, AXES.items(), strict=True):
        mine = [curve for curve in curves if curve.axis == axis]
        for curve in mine:
            colour, mark, hollow = looks[curve.name]
            quartiles = curve.quartiles()
            middle = [1000 * q.middle for q in quartiles]
            ends = np.array(
                [[1000 * (q.middle - q.low) for q in quartiles], [1000 * (q.high - q.middle) for q in quartiles]]
            )
            shown[curve.name] = panel.errorbar(
                curve.sizes,
                middle,
                yerr=ends,
                color=colour,
                marker=mark,
                markersize=4,
                markerfacecolor="white" if hollow else colour,
                linestyle="--" if hollow else "-",
                linewidth=1.4,
                elinewidth=0.8,
            )
        panel.set(xscale="log", yscale="log", xlabel=title)
        ticks = _ticks([size for curve in mine for size in curve.sizes])
        panel.set_xticks(ticks)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        panel.tick_params(labelsize=8)
        panel.grid(which="major", color="0.9", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("time (ms)")
    low, high = panels[0].get_ylim()
    for panel in panels:
        left, right = panel.get_xlim()
        for power in range(-12, 12):  # lines along which time grows as the size
            start = low * 10.0**power
            panel.plot(
                [left, right], [start, start * right / left], color="0.8", linewidth=0.6, linestyle=":", zorder=0
            )
        panel.set_xlim(left, right)
        panel.set_ylim(low, high)
    figure.legend(
        shown.values(), shown.keys(), loc="lower center", ncols=3, fontsize=8, frameon=False, handlelength=2.5
    )
    figure.tight_layout(rect=(0, 0.15, 1, 1))
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _ticks(sizes: list[int]) -> list[float]:
    """The sizes where they are few, else powers of ten, or three or four round numbers where there is but one."""
    there = sorted(set(sizes))
    if len(there) <= 4:
        return [float(size) for size in there]
    round_ones = [lead * 10.0**power for power in range(8) for lead in (1, 2, 5)]
    inside = [number for number in round_ones if there[0] <= number <= there[-1]]
    decades = [number for number in inside if np.log10(number) % 1 == 0]
    return decades if len(decades) > 1 else inside[:: 1 if len(inside) <= 4 else 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_efforts(parser)
    parser.add_argument("--figure", help="where to draw it")
    arguments = parser.parse_args()
    curves = measure("moment" if arguments.moment else "quick" if arguments.quick else "full", "cpu")
    print(told(curves))
    if arguments.figure:
        draw(curves, arguments.figure)


if __name__ == "__main__":
    main()
