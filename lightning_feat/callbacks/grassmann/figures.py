from typing import Any

from torch import Tensor

from lightning_feat.callbacks.reports.figures import COLOURS


def draw_angles(angles: Tensor) -> Any:
    """Histograms of the smallest, the middle and the largest principal angle of each pair, ``(P, k)`` in degrees."""
    from matplotlib.figure import Figure

    # Not by pyplot: that would choose a window system, and keep the figure.
    figure = Figure(figsize=(3.25, 2.2), layout="constrained")  # one column of a paper in two
    axes = figure.subplots()
    k = angles.shape[1]
    shown = {0: "smallest", (k - 1) // 2: "middle", k - 1: "largest"} if k > 2 else {0: "smallest", k - 1: "largest"}
    for number, (place, title) in enumerate(shown.items()):
        values = angles[:, place].numpy()
        style: dict[str, Any] = {"color": COLOURS[number], "linewidth": 1.3, "linestyle": ("-", "--", ":")[number]}
        axes.hist(
            values,
            bins=45,
            range=(0, 90),
            weights=[100 / len(values)] * len(values),
            histtype="step",
            label=title if k > 1 else None,
            **style,
        )
    axes.set_xlabel("principal angle between class subspaces (degrees)", fontsize=8)
    axes.set_ylabel("pairs of classes (%)", fontsize=8)
    axes.set_xlim(0, 90)
    axes.set_xticks(range(0, 91, 15))
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    if k > 1:
        axes.legend(loc="upper left", frameon=False, fontsize=7)
    return figure
