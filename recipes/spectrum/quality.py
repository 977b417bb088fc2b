"""Do label-free numbers tell which training made the better features? Ranks and uniformity beside a linear probe.

    python recipes/spectrum/quality.py [--seeds 5] [--epochs 30] [--fast]

A small network learns from two views of each of 1,079 digits, without labels: views of one digit shall agree, and a
term spreads the features, by one of three losses with one of five weights, or not at all. Of each of these sixteen
settings, the accuracy of a linear probe on ten labels a class, and what the spectrum of the features says. For one seed
all settings share data, first weights, batches and views.

Prints two tables; writes table.md, runs.csv and quality.png to --out.
"""

import argparse
import csv
import logging
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from lightning import LightningModule, Trainer, seed_everything
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from lightning_feat.callbacks import LinearProbe, SpectrumMonitor, UniformityRegularizer
from lightning_feat.callbacks.reports.figures import COLOURS
from lightning_feat.compare.statistics import mean_of, paired_interval, spread_of
from lightning_feat.data import DigitsDataModule
from lightning_feat.functional.spectrum import alignment, lidar

LOSSES = ("wasserstein", "gaussian", "koleo")
WEIGHTS = (0.03, 0.1, 0.3, 1.0, 3.0)
MEASURES = {
    "rankme": "RankMe",
    "effective_rank": "effective rank, centred",
    "lidar": "LiDAR",
    "wasserstein_uniformity": "Wasserstein uniformity",
    "gaussian_uniformity": "Gaussian uniformity",
    "decay": "exponent of the spectrum",
}
NUM_FEATURES, VIEWS, LABELS = 64, 10, 10
MARKS = "osD"


class Setting(NamedTuple):
    """What spreads the features, and how much it weighs."""

    loss: str
    weight: float

    @property
    def name(self) -> str:
        return "none" if self.weight == 0 else f"{self.loss}, {self.weight:g}"


SETTINGS = [Setting("none", 0.0), *(Setting(loss, weight) for loss in LOSSES for weight in WEIGHTS)]


class Views(LightningModule):
    """Learns that two views of an image are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(1024, NUM_FEATURES),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.encoder(images)
        return features

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, _ = batch
        features = self(torch.cat([view(images), view(images)]))
        loss = alignment(*features.chunk(2))
        self.log("train/alignment", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=1e-4)


def view(images: Tensor) -> Tensor:
    """Turned by up to 20 degrees, moved by up to a pixel, a sixth larger or smaller, with noise."""
    size = len(images)
    angle, scale = 0.35 * (2 * torch.rand(size) - 1), 1 + 0.17 * (2 * torch.rand(size) - 1)
    shift = 0.25 * (2 * torch.rand(size, 2) - 1)
    row = torch.stack([scale * angle.cos(), -scale * angle.sin(), shift[:, 0]], 1)
    other = torch.stack([scale * angle.sin(), scale * angle.cos(), shift[:, 1]], 1)
    grid = affine_grid(torch.stack([row, other], 1), list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode="border", align_corners=False) + 0.2 * torch.randn_like(images)


def run(setting: Setting, seed: int, epochs: int, out: Path) -> dict[str, float]:
    """What was measured after a training."""
    seed_everything(seed, verbose=False)
    module, data = Views(), DigitsDataModule(batch_size=128, seed=seed)
    spectrum = SpectrumMonitor(
        "encoder", data="train", every_n_epochs=epochs, measures=[name for name in MEASURES if name != "lidar"]
    )
    callbacks = [
        spectrum,
        LinearProbe("encoder", data=DigitsDataModule(batch_size=256, train_per_class=LABELS, seed=seed)),
    ]
    if setting.weight:
        callbacks.append(UniformityRegularizer(setting.loss, setting.weight, "encoder"))  # type: ignore[arg-type]
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=out, callbacks=callbacks, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    values = {name.split("/")[1]: float(value) for name, value in trainer.callback_metrics.items()}
    images = torch.stack([data.val_set[index][0] for index in range(200)])
    torch.manual_seed(seed)
    with torch.no_grad():
        features = module(torch.cat([view(images) for _ in range(VIEWS)]))
    values["lidar"] = float(lidar(features, torch.arange(len(images)).repeat(VIEWS)))
    return {name: values[name] for name in ("accuracy", *MEASURES)}


def tables(runs: dict[tuple[str, int], dict[str, float]], seeds: range) -> str:
    lines = [
        "| spread by, weight | probe (%) | " + " | ".join(MEASURES.values()) + " |",
        "|---" * (len(MEASURES) + 2) + "|",
    ]
    for setting in SETTINGS:
        of = [runs[setting.name, seed] for seed in seeds]
        cells = [_cell([100 * values["accuracy"] for values in of], 1)]
        cells += [_cell([values[name] for values in of], 2) for name in MEASURES]
        lines.append(f"| {setting.name} | " + " | ".join(cells) + " |")
    lines += ["", f"| measure | rank correlation with the probe, {len(SETTINGS)} settings |", "|---|---|"]
    for name, title in MEASURES.items():
        found = [correlation(runs, seed, name) for seed in seeds]
        interval = paired_interval(found)
        low_high = "" if interval is None else f" [{interval.low:+.2f}, {interval.high:+.2f}]"
        lines.append(f"| {title} | {mean_of(found):+.2f}{low_high} |")
    return "\n".join(lines)


def _cell(values: list[float], digits: int) -> str:
    return f"{mean_of(values):.{digits}f} ± {spread_of(values):.{digits}f}"


def correlation(runs: dict[tuple[str, int], dict[str, float]], seed: int, name: str) -> float:
    """Spearman's, over the settings of one seed."""
    of = [runs[setting.name, seed] for setting in SETTINGS]
    found = spearmanr([values[name] for values in of], [values["accuracy"] for values in of]).statistic
    return float(found)


def draw(runs: dict[tuple[str, int], dict[str, float]], seeds: range, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    for number, (axes, (name, title)) in enumerate(zip(figure.subplots(2, 3).flat, MEASURES.items(), strict=True)):
        for loss, colour, mark in zip(("none", *LOSSES), ("#000000", *COLOURS), "*" + MARKS, strict=False):
            of = [runs[setting.name, seed] for setting in SETTINGS if setting.loss == loss for seed in seeds]
            x, y = [values[name] for values in of], [100 * values["accuracy"] for values in of]
            axes.scatter(x, y, s=14, color=colour, marker=mark, alpha=0.7, linewidths=0, label=loss)
        axes.set_title("abcdef"[number], loc="left", fontsize=9, fontweight="bold")
        axes.set_xlabel(title, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        if number % 3 == 0:
            axes.set_ylabel("linear probe (%)", fontsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    legend.set_title("features spread by", {"size": 8})
    figure.savefig(path, dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--fast", action="store_true", help="two seeds and two epochs: shows only that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/spectrum_quality"))
    arguments = parser.parse_args()
    seeds, epochs = (range(2), 2) if arguments.fast else (range(arguments.seeds), arguments.epochs)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = {(s.name, seed): run(s, seed, epochs, arguments.out) for seed in seeds for s in SETTINGS}
    with (arguments.out / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", "seed", "accuracy", *MEASURES])
        writer.writerows([name, seed, *values.values()] for (name, seed), values in runs.items())
    text = tables(runs, seeds)
    print(text)
    (arguments.out / "table.md").write_text(text + "\n")
    draw(runs, seeds, arguments.out / "quality.png")


if __name__ == "__main__":
    main()
