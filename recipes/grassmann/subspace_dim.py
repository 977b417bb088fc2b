"""How the number of subspace dimensions changes a representation: heads compared on a few noisy handwritten digits.

    python recipes/grassmann/subspace_dim.py [--seeds 40] [--heads softmax grassmann-4] [--fast]

Each run trains a small perceptron on five of the ten digits, with one of the heads, and measures on images it has not
seen: accuracy, the angle between features of one class, class separation, and how well a linear classifier on the
frozen features tells the other five digits apart. All heads of one seed share the classes, the training images, the
noise, the order of the batches and the first weights of the network, so that their differences are paired.

Prints the tables of README.md; writes runs.csv, table.md and subspace_dim.png to --out.
"""

import argparse
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
from torch.nn.functional import linear, normalize
from torch.utils.data import DataLoader

from lightning_feat.baselines import MLPClassifier
from lightning_feat.callbacks import GrassmannHead
from lightning_feat.data.digits import DigitsDataModule, DigitsPart
from lightning_feat.functional.transfer.class_separation import (
    class_separation_r2,
    direction_sums,
    pair_angle_sums,
    within_class_variability,
)
from lightning_feat.functional.transfer.probe import linear_probe

NUM_CLASSES, NUM_FEATURES, HIDDEN = 5, 128, 256  # classes trained on; width of the features; and of the layer before
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the probe, which picks one; below, its fit takes seconds
SCALE = 25.0  # largest logit of the normalised heads, as in the paper
GRASSMANN = {f"grassmann-{k}": k for k in (1, 2, 4, 8, 16)}
HEADS = ("softmax", "cosine", "smoothing", *GRASSMANN)
TITLES = {"softmax": "vector softmax", "cosine": "cosine softmax", "smoothing": "label smoothing 0.1"}
MEASURES = {  # name, and the factor it is printed with
    "accuracy": ("accuracy (%)", 100.0),
    "variability": ("variability (°)", 1.0),
    "r2": ("R²", 1.0),
    "transfer": ("transfer (%)", 100.0),
}
# Chosen on the validation images, with seeds that the tables do not use: see README.md.
LEARNING_RATE = {"softmax": 0.02, "cosine": 0.05, "smoothing": 0.01, **dict.fromkeys(GRASSMANN, 0.05)}


class Part(NamedTuple):
    """Images ``(N, 1, 8, 8)`` and their class indices ``(N,)``."""

    images: Tensor
    targets: Tensor


class Task(NamedTuple):
    """What one seed draws: five digits to train on (``seen``) and five to transfer to (``unseen``)."""

    train_seen: Part
    eval_seen: Part
    train_unseen: Part
    val_unseen: Part
    eval_unseen: Part


class CosineLinear(nn.Module):
    """Logits ``SCALE`` times the cosine between feature and class vector."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, in_features))

    def forward(self, features: Tensor) -> Tensor:
        return SCALE * linear(normalize(features), normalize(self.weight))


def draw_task(data: DigitsDataModule, seed: int, shots: int, noise: float, split: str) -> Task:
    """Classes, training images and noise of one seed. The split into training, validation and test never changes."""
    generator = torch.Generator().manual_seed(seed)
    digits = torch.randperm(10, generator=generator)

    def part(of: DigitsPart, classes: Tensor, shots: int | None) -> Part:
        images, targets = [], []
        for new, digit in enumerate(classes.tolist()):
            members = (of.targets == digit).nonzero()[:, 0]
            members = members[torch.randperm(len(members), generator=generator)][:shots]
            fetched: Any = of.__getitems__(members.tolist())
            batch = torch.stack([image for image, _ in fetched])
            images.append(batch + noise * torch.randn(batch.shape, generator=generator))
            targets.append(torch.full((len(members),), new))
        return Part(torch.cat(images), torch.cat(targets))

    seen, unseen = digits[:NUM_CLASSES], digits[NUM_CLASSES:]
    final = data.test_set if split == "test" else data.val_set
    return Task(
        part(data.train_set, seen, shots),
        part(final, seen, None),
        part(data.train_set, unseen, None),
        part(data.val_set, unseen, None),
        part(final, unseen, None),
    )


def batches_of(part: Part, num_steps: int, batch_size: int, seed: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """All batches of a run, shuffled anew in every pass: to Lightning one epoch, whose ends cost more than a step."""
    generator = torch.Generator().manual_seed(seed)
    size = len(part.targets)
    passes = math.ceil(num_steps * batch_size / size)
    order = torch.cat([torch.randperm(size, generator=generator) for _ in range(passes)])
    chosen = order[: num_steps * batch_size].split(batch_size)
    batches: Any = [(part.images[index], part.targets[index]) for index in chosen]
    return DataLoader(batches, batch_size=None)


def train(head: str, task: Task, seed: int, num_steps: int, batch_size: int, lr: float) -> MLPClassifier:
    """A perceptron with the given head, trained by the baseline's own SGD with a cosine schedule."""
    seed_everything(seed, verbose=False)
    smoothing = 0.1 if head == "smoothing" else 0.0
    in_features = task.train_seen.images[0].numel()
    module = MLPClassifier(in_features, NUM_CLASSES, (HIDDEN, NUM_FEATURES), label_smoothing=smoothing, lr=lr)
    if head == "cosine":
        module.set_submodule("head", CosineLinear(NUM_FEATURES, NUM_CLASSES))
    callbacks: list[Callback] = [GrassmannHead(GRASSMANN[head], layer="head", scale=SCALE)] if head in GRASSMANN else []
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches_of(task.train_seen, num_steps, batch_size, seed))
    return module.eval()


@torch.no_grad()
def measure(module: MLPClassifier, task: Task) -> dict[str, float]:
    """Accuracy and geometry on the classes trained on, transfer to the others; the network stays as it is."""
    features, targets = module.backbone(task.eval_seen.images), task.eval_seen.targets
    train, val, final = ((module.backbone(part.images), part.targets) for part in task[2:])
    probe = linear_probe(*train, *val, *final, penalties=PENALTIES)
    fitted = module(task.train_seen.images).argmax(1) == task.train_seen.targets
    return {
        "accuracy": float((module.head(features).argmax(1) == targets).double().mean()),
        "variability": float(within_class_variability(pair_angle_sums(features, targets, NUM_CLASSES))),
        "r2": float(class_separation_r2(direction_sums(features, targets, NUM_CLASSES))),
        "transfer": float(probe.accuracy),
        "train_accuracy": float(fitted.double().mean()),
    }


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval that Student's t gives it; nan for a single value."""
    from scipy.stats import t  # type: ignore[import-untyped]  # comes with scikit-learn

    sample = torch.tensor(values, dtype=torch.float64)
    count = len(values)
    spread = float(sample.std()) / math.sqrt(count) if count > 1 else math.nan
    return float(sample.mean()), float(t.ppf(0.975, max(count - 1, 1))) * spread


def title(head: str) -> str:
    return TITLES.get(head, f"Grassmann, k = {GRASSMANN.get(head, 0)}")


def tables(runs: dict[str, list[dict[str, float]]]) -> str:
    """Two markdown tables: mean and deviation over seeds; and paired differences to vector softmax, with intervals."""
    names = [name for name, _ in MEASURES.values()]
    lines = ["| head | " + " | ".join([*names, "fitted (%)"]) + " |", "|---|" + "---|" * (len(names) + 1)]
    for head, rows in runs.items():
        cells = []
        for key, (_, factor) in (*MEASURES.items(), ("train_accuracy", ("", 100.0))):
            values = torch.tensor([factor * row[key] for row in rows], dtype=torch.float64)
            spread = float(values.std()) if len(rows) > 1 else math.nan
            digits = 3 if key == "r2" else 1
            cells.append(f"{float(values.mean()):.{digits}f} ± {spread:.{digits}f}")
        lines.append(f"| {title(head)} | " + " | ".join(cells) + " |")
    if "softmax" not in runs or len(runs) == 1:
        return "\n".join(lines)
    lines += ["", "| head, minus vector softmax | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for head, rows in runs.items():
        if head == "softmax":
            continue
        cells = []
        for key, (_, factor) in MEASURES.items():
            pairs = zip(rows, runs["softmax"], strict=True)
            mean, half = mean_and_half_width([factor * (row[key] - base[key]) for row, base in pairs])
            digits = 3 if key == "r2" else 1 if key == "variability" else 2
            cells.append(f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]")
        lines.append(f"| {title(head)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_figure(runs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Paired differences to vector softmax against k, with 95 % intervals; heads without subspaces as levels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(MEASURES), figsize=(10, 2.9), layout="constrained")
    swept = [head for head in runs if head in GRASSMANN]
    for axis, (key, (name, factor)) in zip(axes, MEASURES.items(), strict=True):
        differences = {
            head: mean_and_half_width(
                [factor * (row[key] - base[key]) for row, base in zip(rows, runs["softmax"], strict=True)]
            )
            for head, rows in runs.items()
        }
        axis.axhline(0, color="black", linewidth=1, label="vector softmax")
        for colour, style, head in zip(("tab:orange", "tab:green"), ("--", ":"), ("cosine", "smoothing"), strict=True):
            if head in runs:
                level, half = differences[head]
                axis.axhline(level, color=colour, linestyle=style, linewidth=1.4, label=title(head))
                axis.axhspan(level - half, level + half, color=colour, alpha=0.12, linewidth=0)
        means, halves = zip(*(differences[head] for head in swept), strict=True)
        axis.errorbar([GRASSMANN[head] for head in swept], means, halves, fmt="o-", capsize=3, label="Grassmann")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(GRASSMANN.values()), [str(k) for k in GRASSMANN.values()])
        axis.set_title(name, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("dimensions of a class subspace, k", fontsize=10)
    axes[0].set_ylabel("difference to vector softmax")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=40, help="runs of each head")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--fast", action="store_true", help="two seeds, three heads, a few steps: does it run?")
    parser.add_argument("--split", choices=["test", "val"], default="test", help="val: to choose settings with")
    parser.add_argument("--lr", type=float, help="instead of the rate chosen for each head")
    parser.add_argument("--shots", type=int, default=20, help="training images of each digit")
    parser.add_argument("--noise", type=float, default=1.0, help="of the pixels, in their standard deviations")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/grassmann"))
    arguments = parser.parse_args()
    if arguments.fast:
        arguments.seeds, arguments.steps = 2, 20
        arguments.heads = ["softmax", "grassmann-1", "grassmann-8"]

    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    data = DigitsDataModule(val_fraction=0.2, test_fraction=0.4)
    data.setup()
    runs: dict[str, list[dict[str, float]]] = {head: [] for head in arguments.heads}
    began = time.perf_counter()
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        task = draw_task(data, seed, arguments.shots, arguments.noise, arguments.split)
        for head in arguments.heads:
            lr = LEARNING_RATE[head] if arguments.lr is None else arguments.lr
            module = train(head, task, seed, arguments.steps, arguments.batch_size, lr)
            runs[head].append({"seed": seed, **measure(module, task)})
    count = arguments.seeds * len(runs)
    taken = time.perf_counter() - began

    arguments.out.mkdir(parents=True, exist_ok=True)
    with open(arguments.out / "runs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["head", "seed", *MEASURES, "train_accuracy"])
        for head, rows in runs.items():
            writer.writerows([head, *row.values()] for row in rows)
    text = tables(runs)
    (arguments.out / "table.md").write_text(text + "\n")
    draw_figure(runs, arguments.out / "subspace_dim.png")
    print(f"{text}\n\n{count} runs in {taken:.0f} s, {taken / count:.2f} s each; all in {arguments.out}")


if __name__ == "__main__":
    main()
