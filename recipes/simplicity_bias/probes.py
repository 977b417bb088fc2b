"""The four probes of simplicity bias beside SGD, USEFUL, SAM and ASAM: what is learned first, late and how sharply.

    python recipes/simplicity_bias/probes.py [--seeds 3] [--epochs 100] [--fast]

The same small perceptron on digits beside a patch that tells the class of nine tenths of them, by each of five methods;
all of one seed share data, first weights and the order of examples as far as the method allows. The probes look at the
ends of epochs 1, 2, 3, 4, 6, 8, 12, ... and change nothing in the training.

Prints the last values; writes curves.csv and probes.png, means over seeds with their ranges, to --out.
"""

import argparse
import csv
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from lightning_feat.baselines import MLPClassifier
from lightning_feat.callbacks import (
    DataPlan,
    DistributionalSimplicityMonitor,
    FeatureRelianceMonitor,
    ForgettingMonitor,
    SharpnessAwareMinimization,
    SharpnessMonitor,
    SimplicityBiasUpsampler,
)
from lightning_feat.callbacks.reports.figures import COLOURS
from lightning_feat.data import SpuriousDigitsDataModule

RHO, ADAPTIVE_RHO = 0.05, 0.2  # beyond twice of them trainings diverge once every example is learned, see README.md
NUM_TRAIN = 899


def _every_example(seed: int) -> DataPlan:
    """The orders of the upsampler, before it shows anything twice."""
    return DataPlan(torch.ones(NUM_TRAIN, dtype=torch.long), seed=seed)


METHODS: dict[str, Callable[[int], list[Callback]]] = {
    "SGD": lambda seed: [_every_example(seed)],
    "USEFUL": lambda seed: [SimplicityBiasUpsampler(seed=seed)],
    "SAM": lambda seed: [_every_example(seed), SharpnessAwareMinimization(RHO)],
    "ASAM": lambda seed: [_every_example(seed), SharpnessAwareMinimization(ADAPTIVE_RHO, adaptive=True)],
    "SAM and USEFUL": lambda seed: [SimplicityBiasUpsampler(seed=seed), SharpnessAwareMinimization(RHO)],
}
MARKS = "o^svD"


class Panel(NamedTuple):
    """One quantity against the epoch."""

    key: str
    title: str
    scale: float = 1.0
    log: bool = False


PANELS = (
    Panel("distributional_simplicity/accuracy_gaussian/logits", "right on Gaussian clones (%)", 100),
    Panel("feature_reliance/accuracy/all", "right on validation digits (%)", 100),
    Panel("feature_reliance/reliance/patch", "reliance on the patch"),
    Panel("forgetting/learned/all", "training examples ever right (%)", 100),
    Panel("forgetting/events/all", "times forgotten, mean"),
    Panel("sharpness/top_eigenvalue", "largest eigenvalue of the Hessian", log=True),
)


class Perceptron(MLPClassifier):
    """The baseline with a tenth of the rate after half of the epochs, and after three quarters."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        epochs = self.trainer.max_epochs or 1
        optimizer = SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        return [optimizer], [MultiStepLR(optimizer, [epochs // 2, epochs * 3 // 4], gamma=0.1)]


class Record(Callback):
    """What the probes have logged at the end of each epoch; it comes behind them."""

    def __init__(self) -> None:
        self.curves: dict[int, dict[str, float]] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = ("feature_reliance/", "forgetting/", "sharpness/", "distributional_simplicity/")
        new = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(names)}
        epoch = trainer.current_epoch + 1
        if epoch & (epoch - 1) == 0 or (epoch % 3 == 0 and (epoch // 3) & (epoch // 3 - 1) == 0):
            self.curves[epoch] = new


def run(method: str, seed: int, epochs: int, folder: Path) -> dict[int, dict[str, float]]:
    seed_everything(seed, verbose=False)
    data = SpuriousDigitsDataModule(train_strength=0.9, batch_size=128, val_fraction=0.4, test_fraction=0.1, seed=seed)
    record = Record()
    probes: list[Callback] = [
        DistributionalSimplicityMonitor(num_examples=500),
        FeatureRelianceMonitor({"patch": ":, :, 8:", "digit": ":, :, :8"}, every_n_epochs="log"),
        ForgettingMonitor(every_n_epochs="log", table=False),
        SharpnessMonitor(num_examples=256, max_products=20, every_n_epochs="log"),
        record,
    ]
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*METHODS[method](seed), *probes],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Perceptron(3 * 8 * 16, 10, (128, 64), lr=0.05), data)
    return record.curves


Curves = dict[str, list[dict[int, dict[str, float]]]]


def draw(curves: Curves, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6), layout="constrained")
    grid: Any = figure.subplots(2, 3)
    for letter, panel, axes in zip("abcdef", PANELS, grid.flat, strict=True):
        for place, (method, runs) in enumerate(curves.items()):
            epochs = [epoch for epoch in runs[0] if all(panel.key in one.get(epoch, {}) for one in runs)]
            values = torch.tensor([[panel.scale * one[epoch][panel.key] for epoch in epochs] for one in runs])
            if not epochs:
                continue
            axes.plot(
                epochs,
                values.mean(0),
                f"{MARKS[place]}-",
                color=COLOURS[place],
                markersize=3.5,
                linewidth=1.1,
                label=method,
            )
            low, high = values.min(0).values.tolist(), values.max(0).values.tolist()
            axes.fill_between(epochs, low, high, color=COLOURS[place], alpha=0.12, linewidth=0)
        axes.set(xscale="log", ylabel=panel.title, yscale="log" if panel.log else "linear")
        axes.set_title(letter, loc="left", fontsize=10, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    for axes in grid[1]:
        axes.set_xlabel("epoch")
    handles, labels = grid[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


def table(curves: Curves) -> str:
    lines = [f"| method | {' | '.join(panel.title for panel in PANELS)} |", "|" + "---|" * (1 + len(PANELS))]
    for method, runs in curves.items():
        cells = []
        for panel in PANELS:
            last = torch.tensor([panel.scale * one[max(one)].get(panel.key, torch.nan) for one in runs])
            cells.append(f"{float(last.mean()):.3g} ({float(last.min()):.3g} to {float(last.max()):.3g})")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=96, help="the probes look at 1, 2, 3, 4, 6, 8, 12, ..., 96")
    parser.add_argument("--fast", "--quick", action="store_true", help="one seed, three epochs: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/simplicity_bias_probes"))
    options = parser.parse_args()
    if options.fast:
        options.seeds, options.epochs = 1, 3
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    options.out.mkdir(parents=True, exist_ok=True)
    curves: Curves = {
        method: [run(method, seed, options.epochs, options.out) for seed in range(options.seeds)] for method in METHODS
    }
    with open(options.out / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "epoch", "quantity", "value"])
        for method, runs in curves.items():
            for seed, one in enumerate(runs):
                for epoch, values in one.items():
                    writer.writerows([method, seed, epoch, name, value] for name, value in values.items())
    draw(curves, options.out / "probes.png")
    print(f"{table(curves)}\n\nall in {options.out}")


if __name__ == "__main__":
    main()
