"""The spectra of layers as a figure: eigenvalues by their index, and the effective rank over a run."""

from typing import TYPE_CHECKING, TypeAlias

import torch

from lightning_feat.callbacks.reports.curves import WIDTH_INCHES, Points
from lightning_feat.callbacks.reports.figures import COLOURS
from lightning_feat.functional.spectrum import spectral_decay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Spectra: TypeAlias = list[tuple[float, list[float]]]  # epochs completed, and the eigenvalues, the largest first

_MOST_CURVES = len(COLOURS)
_MARKS = "osD^vP*"


def draw_spectra(spectra: dict[str, Spectra], ranks: Points) -> "Figure":
    """A figure of two panels: first and last spectrum of each layer, and the effective rank against the epochs.

    Args:
        spectra: by layer, from input to output.
        ranks: ``(epochs completed, effective rank)`` by layer.
    """
    from matplotlib.figure import Figure

    # Not by pyplot: that would choose a window system, and keep the figure.
    figure = Figure(figsize=(WIDTH_INCHES, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = _some([*spectra])
    _draw_eigenvalues({name: spectra[name] for name in names}, left)
    _draw_ranks({name: ranks.get(name, []) for name in names}, right)
    for letter, axes in zip("ab", (left, right), strict=True):
        axes.set_title(letter, loc="left", fontsize=9, fontweight="bold")
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _some(names: list[str]) -> list[str]:
    """Of many layers some, evenly spread, the first and the last among them."""
    if len(names) <= _MOST_CURVES:
        return names
    step = (len(names) - 1) / (_MOST_CURVES - 1)
    return [names[round(i * step)] for i in range(_MOST_CURVES)]


def _draw_eigenvalues(spectra: dict[str, Spectra], axes: "Axes") -> None:
    for number, (name, pair) in enumerate(spectra.items()):
        for epochs, line in pair:
            last = epochs == pair[-1][0]
            positive = [value for value in line if value > 0]
            index = range(1, len(positive) + 1)
            label = f"{name}, exponent {_exponent(line)}" if last else None
            style = {"linewidth": 1.4} if last else {"linewidth": 0.8, "linestyle": "--"}
            axes.plot(index, positive, color=COLOURS[number], label=label, **style)  # type: ignore[arg-type]
    shown = {epochs for pair in spectra.values() for epochs, _ in pair}
    if len(shown) > 1:
        axes.plot([], [], color="0.4", linewidth=0.8, linestyle="--", label=f"after epoch {min(shown):g}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("index of the eigenvalue", fontsize=8)
    axes.set_ylabel("eigenvalue of the covariance", fontsize=8)
    axes.legend(loc="lower left", frameon=False, fontsize=6)


def _exponent(line: list[float]) -> str:
    exponent = float(spectral_decay(torch.tensor(line, dtype=torch.float64)).exponent)
    return f"{exponent:.2f}"


def _draw_ranks(ranks: Points, axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    for number, (name, line) in enumerate(ranks.items()):
        x, y = zip(*line, strict=True) if line else ((), ())
        marker = _MARKS[number % len(_MARKS)]
        axes.plot(x, y, color=COLOURS[number], linewidth=1.3, marker=marker, markersize=3, label=name)
    axes.set_xlabel("epochs completed", fontsize=8)
    axes.set_ylabel("effective rank", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    if len(ranks) > 1:
        axes.legend(loc="best", frameon=False, fontsize=6)
