"""Neural collapse of a real network, under SGD with L2 decay, Adam with L2 decay, and AdamW.

    python recipes/neural_collapse/digits.py [--seeds 3] [--fast]

The trainings of digits.yaml (sgd) and digits_adamw.yaml (adamw), and one between: a perceptron learns handwritten
digits, far beyond zero training error. Prints the table of README.md; writes table.md and digits.png to --out.
"""

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Trainer, seed_everything
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_feat.baselines import MLPClassifier
from lightning_feat.callbacks import MetricHistory, NeuralCollapseMonitor
from lightning_feat.data import DigitsDataModule
from lightning_feat.functional.neural_collapse import center_sums, class_centers, class_sums, collapse_measures

WIDTH, DEPTH = 128, 6
OPTIMIZERS: dict[str, tuple[str, type[Optimizer], dict[str, Any]]] = {
    "sgd": ("SGD, L2 5e-4", SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}),
    "adam": ("Adam, L2 5e-4", Adam, {"lr": 1e-3, "weight_decay": 5e-4}),
    "adamw": ("AdamW, decay 1e-2", AdamW, {"lr": 1e-3, "weight_decay": 1e-2}),
}
MEASURES = {  # what is logged, and its name in the table
    "nc0_relative": "NC0, relative",
    "nc1_pinv_over_k": "NC1, pseudo-inverse / K",
    "nc1_quotient": "NC1, quotient",
    "nc2_etf_error": "NC2, means",
    "nc2_weight_etf_error": "NC2, rows",
    "nc3": "NC3",
    "nc3_centered_weight": "NC3, rows centred",
    "nc4_mismatch": "NC4",
}
COLOURS = ("#0072B2", "#009E73", "#D55E00")  # distinct for all kinds of colour vision: Okabe and Ito

Points = dict[str, list[tuple[float, float]]]


class Run(NamedTuple):
    """One training: what was logged, against the epochs, from before the first."""

    points: Points
    seconds: float


def train(name: str, seed: int, epochs: int) -> Run:
    seed_everything(seed, verbose=False)
    module: Any = MLPClassifier(64, 10, (WIDTH,) * DEPTH, batch_norm=True)
    _, make, options = OPTIMIZERS[name]
    optimizer: Any = make(module.parameters(), **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    module.configure_optimizers = lambda: {"optimizer": optimizer, "lr_scheduler": schedule}
    data, history = DigitsDataModule(), MetricHistory()
    data.setup()
    start = measure(module, data)
    measures = [*MEASURES, "nc0", "ncc_accuracy"]
    began = time.perf_counter()
    Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[NeuralCollapseMonitor(mode="exact", every_n_epochs="log", measures=measures), history],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=10,
    ).fit(module, data)
    points = {name: [(0.0, start[name]), *rest] if name in start else rest for name, rest in history.points.items()}
    return Run(points, time.perf_counter() - began)


@torch.no_grad()
def measure(module: Any, data: DigitsDataModule) -> dict[str, float]:
    """What the monitor measures after an epoch, before the first."""
    fetched: Any = data.train_set.__getitems__(list(range(len(data.train_set))))
    features = module.eval().backbone(torch.stack([image for image, _ in fetched]))
    targets, logits = data.train_set.targets, module.head(features)
    module.train()
    totals = class_sums(features, targets, data.num_classes)
    residuals = center_sums(features, targets, logits, class_centers(totals))
    values = collapse_measures(totals, residuals=residuals, weight=module.head.weight)
    return {logged(name): float(value) for name, value in values.items()}


def logged(measure: str) -> str:
    return f"neural_collapse/{measure}/penultimate"


def table(runs: dict[str, list[Run]]) -> str:
    """Means over seeds before training, after the first epoch and after the last, there with their deviation."""
    lines = ["| | " + " | ".join(OPTIMIZERS[name][0] for name in runs) + " |", "|---|" + "---|" * len(runs)]
    for measure, title in {**MEASURES, "val/accuracy": "validation accuracy (%)"}.items():
        is_share = measure == "val/accuracy"
        cells = []
        for group in runs.values():
            points = [run.points[measure if is_share else logged(measure)] for run in group]
            places = (0, -1) if is_share else (0, 1, -1)
            ends = torch.tensor([[entry[place][1] for place in places] for entry in points], dtype=torch.float64)
            mean, spread = ends.mean(0).tolist(), ends.std(0, correction=min(1, len(group) - 1)).tolist()
            if is_share:
                cells.append(f"{100 * mean[-1]:.1f} ± {100 * spread[-1]:.1f}")
            else:
                cells.append(f"{mean[0]:.2g} → {mean[1]:.2g} → {mean[2]:.2g} ± {spread[2]:.1g}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_figure(runs: dict[str, list[Run]], path: Path) -> None:
    """NC0 to NC3 against the epoch, one line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    shown = {key: MEASURES[key] for key in ("nc0_relative", "nc1_pinv_over_k", "nc2_etf_error", "nc3")}
    figure, grid = plt.subplots(1, len(shown), figsize=(10, 2.8), layout="constrained")
    for axis, (measure, title) in zip(grid, shown.items(), strict=True):
        for colour, (name, group) in zip(COLOURS, runs.items(), strict=False):
            for run in group:
                epochs, values = zip(*run.points[logged(measure)][1:], strict=True)  # from epoch 1: log axis
                axis.plot(epochs, values, color=colour, linewidth=1.2, label=OPTIMIZERS[name][0])
        axis.set_xscale("log")
        axis.set_yscale("log")
        if axis.get_ylim()[1] < 30 * axis.get_ylim()[0]:  # powers of ten alone would be one or two
            axis.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, which="both")
    figure.supxlabel("epoch", fontsize=10)
    handles = dict(zip(*reversed(grid[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--fast", action="store_true", help="one seed, ten epochs: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/neural_collapse_digits"))
    arguments = parser.parse_args()
    if arguments.fast:
        arguments.seeds, arguments.epochs = 1, 10

    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    runs: dict[str, list[Run]] = {name: [] for name in arguments.optimizers}
    for name, group in runs.items():
        for seed in range(arguments.seeds):
            group.append(train(name, seed, arguments.epochs))
            print(f"{name}, seed {seed}: {group[-1].seconds:.0f} s", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = table(runs)
    (arguments.out / "table.md").write_text(text + "\n")
    draw_figure(runs, arguments.out / "digits.png")
    print(f"{text}\n\nall in {arguments.out}")


if __name__ == "__main__":
    main()
