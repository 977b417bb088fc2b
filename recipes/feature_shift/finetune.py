"""Fine-tuning that stays near its start: what it costs on the new task, and what is left of the old one.

    python recipes/feature_shift/finetune.py [--seeds 10] [--shots 10] [--fast]

A perceptron learns the digits 0 to 4, gets a new head, and is fine-tuned on a few images of each of the digits 5 to 9:
plainly, with its backbone frozen, or held near its start by one of the penalties of ``FeatureShiftRegularizer``, each
at weights a decade apart. The old head is kept aside and put back for the test on the old digits. The seed draws first
weights, few images and the order of batches; methods of one seed share all that and the pre-trained network, so that
differences are paired. The split into training, validation and test images never changes.

Prints the tables of README.md; writes runs.csv, shifts.csv, table.md and finetune.png to --out.

Shapes: N images.
"""

import argparse
import copy
import csv
import logging
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.baselines import MLPClassifier
from lightning_feat.callbacks.feature_shift.figures import draw_map
from lightning_feat.callbacks.feature_shift.monitor import FeatureShiftMonitor
from lightning_feat.callbacks.feature_shift.regularizer import FeatureShiftRegularizer
from lightning_feat.callbacks.reports.figures import COLOURS
from lightning_feat.data.digits import DigitsDataModule, DigitsPart
from lightning_feat.functional.transfer.probe import linear_probe

NUM_OLD = 5  # classes 0 to 4 are old, 5 to 9 new
HIDDEN = (128,) * 5
LAYERS = [f"backbone.{2 * i}" for i in range(1, len(HIDDEN) + 1)]  # the ReLUs
MEASURES = {  # name, and the factor it is printed with
    "new": ("new digits (%)", 100.0),
    "old": ("old digits, head kept (%)", 100.0),
    "probe": ("old digits, new probe (%)", 100.0),
    "first": ("shift, first layer", 1.0),
    "last": ("shift, last layer", 1.0),
}


class Method(NamedTuple):
    """How the network is held."""

    title: str
    form: str | None  # of the regulariser
    weights: tuple[float, ...]


MARKS = "*osvD^"
METHODS = {
    "plain": Method("plain", None, (0.0,)),
    "l2_sp": Method("L2-SP", "l2_sp", (0.01, 0.1, 1.0)),
    "distillation": Method("distillation", "distillation", (0.001, 0.01, 0.1)),
    "relative": Method("relative shift", "relative", (0.01, 0.1, 1.0)),
    "cosine": Method("cosine", "cosine", (0.1, 1.0, 10.0)),
    "frozen": Method("backbone frozen", None, (0.0,)),
}


class Task(NamedTuple):
    """Images ``(N, 1, 8, 8)`` and targets ``(N,)`` of one half of the digits, counted from 0."""

    train: TensorDataset
    val: TensorDataset
    test: TensorDataset


def tasks_of(data: DigitsDataModule) -> tuple[Task, Task]:
    """The old task and the new one."""
    parts = [data.train_set, data.val_set, data.test_set]
    old = Task(*(half_of(part, range(NUM_OLD)) for part in parts))
    return old, Task(*(half_of(part, range(NUM_OLD, data.num_classes)) for part in parts))


def half_of(part: DigitsPart, digits: range) -> TensorDataset:
    chosen = ((part.targets >= digits.start) & (part.targets < digits.stop)).nonzero()[:, 0]
    fetched: Any = part.__getitems__(chosen.tolist())
    return TensorDataset(torch.stack([image for image, _ in fetched]), part.targets[chosen] - digits.start)


def few_of(task: Task, shots: int, seed: int) -> TensorDataset:
    """``shots`` training images of each class, drawn by the seed."""
    images, targets = task.train.tensors
    generator = torch.Generator().manual_seed(seed)
    members = [(targets == c).nonzero()[:, 0] for c in targets.unique()]
    drawn = torch.cat([m[torch.randperm(len(m), generator=generator)[:shots]] for m in members])
    return TensorDataset(images[drawn], targets[drawn])


def train(
    module: MLPClassifier, data: TensorDataset, epochs: int, seed: int, *callbacks: Callback, val: Any = None
) -> None:
    """The baseline's SGD with momentum, without weight decay, its rate on a half cosine."""
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        check_val_every_n_epoch=2,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader = DataLoader(data, batch_size=32, shuffle=True)
    trainer.fit(module, loader, DataLoader(val, batch_size=512) if val is not None else None)


def pretrain(old: Task, epochs: int, seed: int) -> MLPClassifier:
    seed_everything(seed, verbose=False)
    module = MLPClassifier(old.train.tensors[0][0].numel(), NUM_OLD, HIDDEN, lr=0.05, weight_decay=0.0)
    train(module, old.train, epochs, seed)
    return module


def finetune(
    start: MLPClassifier, new: Task, few: TensorDataset, method: Method, weight: float, epochs: int, seed: int
) -> tuple[MLPClassifier, dict[str, list[tuple[float, float]]]]:
    """The network after fine-tuning, with the new head, and the shift of each layer on new validation images."""
    module = copy.deepcopy(start)
    seed_everything(seed, verbose=False)
    module.head = nn.Linear(HIDDEN[-1], NUM_OLD)
    monitor = FeatureShiftMonitor(LAYERS, data="val")
    callbacks: list[Callback] = [monitor]
    if method.form == "l2_sp":
        callbacks.append(FeatureShiftRegularizer(form="l2_sp", weight=weight, new_layers=["head"]))
    elif method.form is not None:
        callbacks.append(FeatureShiftRegularizer(LAYERS, method.form, weight))  # type: ignore[arg-type]
    if method.title == "backbone frozen":
        module.backbone.requires_grad_(False)
    train(module, few, epochs, seed, *callbacks, val=new.val)
    return module.eval(), monitor.history


@torch.no_grad()
def measure(module: Any, start: Any, old: Task, new: Task, split: str) -> dict[str, float]:
    """Accuracies on the images of ``split``; the old head is that of the start."""
    features = [module.backbone(part.tensors[0]) for part in (old.train, old.val, getattr(old, split))]
    targets = [part.tensors[1] for part in (old.train, old.val, getattr(old, split))]
    probe = linear_probe(features[0], targets[0], features[1], targets[1], features[2], targets[2])
    images, new_targets = getattr(new, split).tensors
    return {
        "new": share_right(module(images), new_targets),
        "old": share_right(start.head(features[2]), targets[2]),
        "probe": float(probe.accuracy),
    }


def share_right(logits: Tensor, targets: Tensor) -> float:
    return float((logits.argmax(1) == targets).double().mean())


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval that Student's t gives it; nan for a single value."""
    from scipy.stats import t  # type: ignore[import-untyped]  # comes with scikit-learn

    sample = torch.tensor(values, dtype=torch.float64)
    count = len(values)
    spread = float(sample.std()) / math.sqrt(count) if count > 1 else math.nan
    return float(sample.mean()), float(t.ppf(0.975, max(count - 1, 1))) * spread


class Run(NamedTuple):
    method: str
    weight: float
    seed: int
    values: dict[str, float]
    history: dict[str, list[tuple[float, float]]]


def rows_of(runs: list[Run]) -> dict[tuple[str, float], list[Run]]:
    """Runs of one method and weight, in the order of seeds."""
    rows: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        rows.setdefault((run.method, run.weight), []).append(run)
    return rows


def tables(runs: list[Run], before: list[dict[str, float]]) -> str:
    """Two markdown tables: means and deviations over seeds; and paired differences to plain fine-tuning."""
    rows = rows_of(runs)
    names = " | ".join(name for name, _ in MEASURES.values())
    rule = "|---|---|" + "---|" * len(MEASURES)
    lines = [f"| method | weight | {names} |", rule]
    cells = [f"{mean_and_deviation([100 * b[key] for b in before], 1)}" for key in ("old", "probe")]
    lines.append(f"| before fine-tuning | | | {cells[0]} | {cells[1]} | 0 | 0 |")
    for (name, weight), found in rows.items():
        cells = [
            mean_and_deviation([scale * run.values[key] for run in found], 1 if scale > 1 else 3)
            for key, (_, scale) in MEASURES.items()
        ]
        lines.append(f"| {METHODS[name].title} | {weight:g} | " + " | ".join(cells) + " |")
    lines += ["", f"| method, minus plain | weight | {names} |", rule]
    plain = rows.get(("plain", 0.0), [])
    for (name, weight), found in rows.items():
        if name == "plain" or not plain:
            continue
        cells = []
        for key, (_, scale) in MEASURES.items():
            gains = [scale * (run.values[key] - base.values[key]) for run, base in zip(found, plain, strict=True)]
            mean, half = mean_and_half_width(gains)
            digits = 1 if scale > 1 else 3
            cells.append(f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]")
        lines.append(f"| {METHODS[name].title} | {weight:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_and_deviation(values: list[float], digits: int) -> str:
    sample = torch.tensor(values, dtype=torch.float64)
    spread = float(sample.std()) if len(values) > 1 else math.nan
    return f"{float(sample.mean()):.{digits}f} ± {spread:.{digits}f}"


def draw_figure(runs: list[Run], path: Path, shown: tuple[tuple[str, float], tuple[str, float]]) -> None:
    """New and old accuracy against those of plain fine-tuning, a curve for each penalty with paired 95 % intervals; and
    the shift of the layers over the epochs, twice.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = rows_of(runs)
    figure = plt.figure(figsize=(10.5, 3.8), layout="constrained")
    trade, left, right = figure.subplots(1, 3, width_ratios=[1.5, 1, 1.05])
    base = rows.get(("plain", 0.0), [])
    trade.axhline(0, color="0.7", linewidth=0.8)
    trade.axvline(0, color="0.7", linewidth=0.8)
    trade.plot(0, 0, MARKS[0], color=COLOURS[0], markersize=6, label=METHODS["plain"].title)
    for place, name in enumerate(METHODS):
        points, sizes = [], []
        for step, weight in enumerate(METHODS[name].weights if name != "plain" else ()):
            found = rows.get((name, weight), [])
            if found and base:
                # Paired by seed: the seeds share what is hard in their draw.
                gains = [
                    [100 * (run.values[key] - plain.values[key]) for run, plain in zip(found, base, strict=True)]
                    for key in ("old", "new")
                ]
                points.append([mean_and_half_width(gain) for gain in gains])
                sizes.append(4 + 2 * step)
        if not points:
            continue
        x, y = ([point[i][0] for point in points] for i in (0, 1))
        x_half, y_half = ([point[i][1] for point in points] for i in (0, 1))
        style: dict[str, Any] = {"color": COLOURS[place], "linewidth": 1.1}
        trade.errorbar(x, y, yerr=y_half, xerr=x_half, elinewidth=0.8, alpha=0.55, fmt="none", ecolor=COLOURS[place])
        weights = ", ".join(f"{weight:g}" for weight in METHODS[name].weights) if METHODS[name].form else ""
        label = METHODS[name].title + (f": {weights}" if weights else "")
        trade.plot(x, y, "-", **style)
        for i, size in enumerate(sizes):
            trade.plot(x[i], y[i], MARKS[place], markersize=size, color=COLOURS[place], label=label if i == 0 else None)
    trade.set_xlabel("old digits, head kept, minus plain (points)", fontsize=9)
    trade.set_ylabel("new digits, minus plain (points)", fontsize=9)
    trade.spines[["top", "right"]].set_visible(False)
    trade.tick_params(labelsize=8)
    trade.legend(frameon=False, fontsize=7, loc="lower left", title="weights, small to large marks", title_fontsize=7)
    maps = [mean_history([run.history for run in rows[key]]) for key in shown if key in rows]
    largest = max((value for found in maps for line in found.values() for _, value in line), default=1.0)
    for axes, key, layers in zip((left, right), [key for key in shown if key in rows], maps, strict=False):
        draw_map({f"{i + 1}": line for i, line in enumerate(layers.values())}, axes, largest)
        suffix = f", weight {key[1]:g}" if METHODS[key[0]].form is not None else ""
        axes.set_title(f"{METHODS[key[0]].title}{suffix}", fontsize=9)
        axes.set_ylabel("hidden layer", fontsize=8)
    for letter, axes in zip("abc", (trade, left, right), strict=True):
        axes.text(-0.02, 1.02, letter, transform=axes.transAxes, fontweight="bold", ha="right", va="bottom")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def mean_history(histories: list[dict[str, list[tuple[float, float]]]]) -> dict[str, list[tuple[float, float]]]:
    return {
        layer: [
            (point[0], sum(history[layer][i][1] for history in histories) / len(histories))
            for i, point in enumerate(line)
        ]
        for layer, line in histories[0].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="runs of each method")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--weights", nargs="+", type=float, help="other weights, for all penalties")
    parser.add_argument("--shots", type=int, default=10, help="training images of each new digit")
    parser.add_argument("--epochs", type=int, default=40, help="of fine-tuning, two batches each at 10 shots")
    parser.add_argument("--split", choices=["test", "val"], default="test", help="val: to choose settings with")
    parser.add_argument("--fast", action="store_true", help="two seeds, three methods, a few epochs: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/feature_shift_finetune"))
    arguments = parser.parse_args()
    if arguments.fast:
        arguments.seeds, arguments.methods, arguments.epochs = 2, ["plain", "relative", "l2_sp"], 2
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    began = time.perf_counter()
    data = DigitsDataModule()
    data.setup()
    old, new = tasks_of(data)
    runs: list[Run] = []
    before = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        start = pretrain(old, 2 if arguments.fast else 20, seed).eval()
        before.append(measure(start, start, old, new, arguments.split))
        few = few_of(new, arguments.shots, seed)
        for name in arguments.methods:
            method = METHODS[name]
            for weight in arguments.weights or method.weights if method.form else method.weights:
                module, history = finetune(start, new, few, method, weight, arguments.epochs, seed)
                values = measure(module, start, old, new, arguments.split)
                shifts = {"first": history[LAYERS[0]][-1][1], "last": history[LAYERS[-1]][-1][1]}
                runs.append(Run(name, weight, seed, {**values, **shifts}, history))
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs.sort(key=lambda run: (list(METHODS).index(run.method), run.weight, run.seed))
    text = tables(runs, before)
    print(f"\n{text}\n\n{time.perf_counter() - began:.0f} s, torch {torch.__version__}, one thread")
    (arguments.out / "table.md").write_text(text + "\n")
    with (arguments.out / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "weight", "seed", *MEASURES])
        writer.writerows([run.method, run.weight, run.seed, *(run.values[key] for key in MEASURES)] for run in runs)
    with (arguments.out / "shifts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "weight", "seed", "layer", "epochs", "relative shift"])
        for run in runs:
            for layer, line in run.history.items():
                writer.writerows([run.method, run.weight, run.seed, layer, *point] for point in line)
    draw_figure(runs, arguments.out / "finetune.png", (("plain", 0.0), ("relative", 0.1)))


if __name__ == "__main__":
    main()
