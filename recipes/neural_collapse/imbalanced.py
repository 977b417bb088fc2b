"""Few images of some classes: what a fixed simplex, dot-regression, collapse regularisation and a classifier that is
realigned after training do for small classes.

    python recipes/neural_collapse/imbalanced.py [--seeds 10] [--factors 10 100] [--fast]

Each run trains the same small perceptron on handwritten digits whose class sizes fall exponentially, the largest
``factor`` times the smallest, by one of the methods, far beyond zero training error. Which digits are large, and which
of their images are kept, is drawn by the seed; the split into training, validation and test images never changes.
Methods of one seed share all that, the order of the batches and the first weights, so that differences are paired.

Prints the tables of README.md; writes runs.csv, table.md and imbalanced.png to --out.

Shapes: N images, D features, C classes.
"""

import argparse
import csv
import logging
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from lightning_feat.baselines import MLPClassifier
from lightning_feat.callbacks import (
    DotRegressionRegularizer,
    NeuralCollapseRegularizer,
    SimplexETFHead,
    realign_classifier,
)
from lightning_feat.data.digits import DigitsDataModule, DigitsPart
from lightning_feat.functional.common.class_sums import class_means, class_sums

NUM_CLASSES, HIDDEN, SMALL = 10, (256, 128), 5  # the small classes are the last five
# Distinct for all kinds of colour vision; Okabe and Ito, "Color Universal Design", 2008.
COLOURS = ("#000000", "#0072B2", "#CC79A7", "#7F7F7F", "#56B4E9", "#009E73", "#D55E00", "#E69F00")
MARKS = "os^vDPX*"  # with the colours, so that a copy in grey can be read
MEASURES = {  # name, and the factor it is printed with
    "balanced": ("all (%)", 100.0),
    "large": ("large classes (%)", 100.0),
    "small": ("small classes (%)", 100.0),
    "nearest": ("by nearest mean (%)", 100.0),
    "rows": ("rows: cosine", 1.0),
    "means": ("means: cosine", 1.0),
}


class Method(NamedTuple):
    """A training, with the settings chosen on the validation images by other seeds than the tables show."""

    title: str
    lr: float
    head: str = "linear"  # or "simplex"
    scale: float = 25.0  # of the simplex: its largest logit
    dot_regression: bool = False
    class_counts: bool = False  # dot-regression with all classes weighing the same
    pull: float = 0.0  # weights of the collapse regulariser, none if zero
    push: float = 0.0
    lr_factor: float = 1.0  # of its means
    balanced: bool = False  # images of small classes come as often as those of large ones
    realigned: Literal["", "lengths", "prior"] = ""  # of the classifier, after training


METHODS = {
    "ce": Method("cross-entropy", 0.1),
    "ce-balanced": Method("cross-entropy, classes drawn alike", 0.03, balanced=True),
    "ce-lengths": Method("cross-entropy, rows realigned after", 0.1, realigned="lengths"),
    "ce-prior": Method("cross-entropy, prior taken back after", 0.1, realigned="prior"),
    "simplex-ce": Method("fixed simplex, cross-entropy", 0.02, "simplex", scale=10.0),
    "simplex-dr": Method("fixed simplex, dot-regression", 0.1, "simplex", dot_regression=True),
    "simplex-dr-weighted": Method(
        "dot-regression, classes weighted", 0.1, "simplex", dot_regression=True, class_counts=True
    ),
    "regularized": Method("collapse regulariser 0.01 and 0.1", 0.1, pull=0.01, push=0.1, lr_factor=5.0),
}


class Task(NamedTuple):
    """What one seed draws: images ``(N, 1, 8, 8)`` and class indices ``(N,)``, classes in falling order of size."""

    images: Tensor
    targets: Tensor
    counts: list[int]
    eval_images: Tensor
    eval_targets: Tensor


def draw_task(data: DigitsDataModule, seed: int, factor: float, split: str) -> Task:
    """Which digit becomes which class, and which of its training images are kept.

    Not ``DigitsDataModule(imbalance_factor=...)``: there the small classes are always the same digits, and hard ones.
    """
    generator = torch.Generator().manual_seed(seed)
    digits = torch.randperm(NUM_CLASSES, generator=generator).tolist()
    members = [(data.train_set.targets == digit).nonzero()[:, 0] for digit in digits]
    largest = min(map(len, members))
    counts = [max(1, round(largest * factor ** (-c / (NUM_CLASSES - 1)))) for c in range(NUM_CLASSES)]
    kept = [m[torch.randperm(len(m), generator=generator)][:count] for m, count in zip(members, counts, strict=True)]
    final = data.test_set if split == "test" else data.val_set
    class_of = torch.tensor([digits.index(digit) for digit in range(NUM_CLASSES)])
    return Task(
        images_of(data.train_set, torch.cat(kept)),
        torch.arange(NUM_CLASSES).repeat_interleave(torch.tensor(counts)),
        counts,
        images_of(final, torch.arange(len(final))),
        class_of[final.targets],
    )


def images_of(part: DigitsPart, indices: Tensor) -> Tensor:
    fetched: Any = part.__getitems__(indices.tolist())
    return torch.stack([image for image, _ in fetched])


def batches_of(
    task: Task, num_steps: int, batch_size: int, seed: int, balanced: bool
) -> DataLoader[tuple[Tensor, Tensor]]:
    """All batches of a run, shuffled anew in every pass: to Lightning one epoch, whose ends cost more than a step."""
    generator = torch.Generator().manual_seed(seed)
    size = len(task.targets)
    if balanced:
        share = 1 / torch.tensor(task.counts)[task.targets].double()
        order = torch.multinomial(share, num_steps * batch_size, replacement=True, generator=generator)
    else:
        passes = math.ceil(num_steps * batch_size / size)
        order = torch.cat([torch.randperm(size, generator=generator) for _ in range(passes)])
    chosen = order[: num_steps * batch_size].split(batch_size)
    batches: Any = [(task.images[index], task.targets[index]) for index in chosen]
    return DataLoader(batches, batch_size=None)


def callbacks_for(method: Method, task: Task, seed: int) -> list[Callback]:
    callbacks: list[Callback] = []
    if method.head == "simplex":
        callbacks.append(SimplexETFHead(scale=method.scale, seed=seed, layer="head"))
    if method.dot_regression:
        counts = task.counts if method.class_counts else None
        callbacks.append(DotRegressionRegularizer(class_counts=counts, layer="head"))
    if method.pull:
        callbacks.append(NeuralCollapseRegularizer(method.pull, method.push, lr_factor=method.lr_factor, seed=seed))
    return callbacks


def train(method: Method, task: Task, seed: int, num_steps: int, batch_size: int) -> MLPClassifier:
    """The baseline's own SGD, with momentum 0.9, L2 decay 5e-4 and its rate on a half cosine."""
    seed_everything(seed, verbose=False)
    module = MLPClassifier(task.images[0].numel(), NUM_CLASSES, HIDDEN, lr=method.lr)
    # A simplex has no room where no feature is negative, so that dot-regression's paper ends its network in this, too.
    module.backbone.append(nn.BatchNorm1d(HIDDEN[-1]))
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks_for(method, task, seed),
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches_of(task, num_steps, batch_size, seed, method.balanced))
    if method.realigned == "lengths":
        realign_classifier(module, "head")
    elif method.realigned == "prior":
        realign_classifier(module, "head", power=0.0, frequencies=[1.0] * NUM_CLASSES, train_frequencies=task.counts)
    return module.eval()


@torch.no_grad()
def measure(module: Any, task: Task) -> dict[str, float]:
    """Accuracies over classes, each weighing the same, and angles between small classes in training; see README.md."""
    features = module.backbone(task.eval_images)
    mean_CD = class_means(class_sums(module.backbone(task.images), task.targets, NUM_CLASSES))
    right_C = class_accuracy(module.head(features), task.eval_targets)
    nearest_NC = features.double() @ mean_CD.T - mean_CD.square().sum(1) / 2
    row_CD = module.head.prototypes if hasattr(module.head, "prototypes") else module.head.weight
    fitted = module(task.images).argmax(1) == task.targets
    return {
        "balanced": float(right_C.mean()),
        "large": float(right_C[:-SMALL].mean()),
        "small": float(right_C[-SMALL:].mean()),
        "nearest": float(class_accuracy(nearest_NC, task.eval_targets).mean()),
        "rows": mean_cosine((row_CD - row_CD.mean(0))[-SMALL:]),
        "means": mean_cosine((mean_CD - mean_CD.mean(0))[-SMALL:]),
        "fitted": float(fitted.double().mean()),
        **{f"class {c}": float(right) for c, right in enumerate(right_C)},
    }


def class_accuracy(scores: Tensor, targets: Tensor) -> Tensor:
    """Share of each class ``(C,)`` whose largest score is its own."""
    right = (scores.argmax(1) == targets).double()
    return torch.stack([right[targets == c].mean() for c in range(NUM_CLASSES)])


def mean_cosine(vectors: Tensor) -> float:
    """Over all pairs of rows; one if all have the same direction."""
    gram = normalize(vectors.double()) @ normalize(vectors.double()).T
    size = len(vectors)
    return float((gram.sum() - gram.trace()) / (size * (size - 1)))


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval that Student's t gives it; nan for a single value."""
    from scipy.stats import t  # type: ignore[import-untyped]  # comes with scikit-learn

    sample = torch.tensor(values, dtype=torch.float64)
    count = len(values)
    spread = float(sample.std()) / math.sqrt(count) if count > 1 else math.nan
    return float(sample.mean()), float(t.ppf(0.975, max(count - 1, 1))) * spread


Runs = dict[float, dict[str, list[dict[str, float]]]]  # factor, method, seeds


def differences(runs: Runs, factor: float, name: str, key: str) -> tuple[float, float]:
    scale = MEASURES[key][1]
    pairs = zip(runs[factor][name], runs[factor]["ce"], strict=True)
    return mean_and_half_width([scale * (row[key] - base[key]) for row, base in pairs])


def tables(runs: Runs) -> str:
    """Two markdown tables: mean and deviation over seeds; and paired differences to cross-entropy, with intervals."""
    names = " | ".join(name for name, _ in MEASURES.values())
    rule = "|---|---|" + "---|" * len(MEASURES)
    lines = [f"| factor | method | {names} | fitted (%) |", f"{rule}---|"]
    for factor, by_method in runs.items():
        for name, rows in by_method.items():
            cells = []
            for key, (_, scale) in (*MEASURES.items(), ("fitted", ("", 100.0))):
                values = torch.tensor([scale * row[key] for row in rows], dtype=torch.float64)
                spread = float(values.std()) if len(rows) > 1 else math.nan
                digits = 1 if scale > 1 else 2
                cells.append(f"{float(values.mean()):.{digits}f} ± {spread:.{digits}f}")
            lines.append(f"| {factor:g} | {METHODS[name].title} | " + " | ".join(cells) + " |")
    if not all("ce" in by_method for by_method in runs.values()):
        return "\n".join(lines)
    lines += ["", f"| factor | method, minus cross-entropy | {names} |", rule]
    for factor, by_method in runs.items():
        for name in by_method:
            if name == "ce":
                continue
            cells = []
            for key, (_, scale) in MEASURES.items():
                mean, half = differences(runs, factor, name, key)
                digits = 1 if scale > 1 else 2
                cells.append(f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]")
            lines.append(f"| {factor:g} | {METHODS[name].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_figure(runs: Runs, path: Path) -> None:
    """Mean accuracy by class; paired differences to cross-entropy and angles of small classes, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows_of = len(next(iter(runs.values())))
    height = 0.8 + (0.9 + 0.28 * rows_of) * len(runs)
    figure, grid = plt.subplots(len(runs), 3, figsize=(11, height), layout="constrained", squeeze=False)
    for (factor, by_method), (classes, gains, angles) in zip(runs.items(), grid, strict=True):
        for place, (name, rows) in enumerate(by_method.items()):
            style: dict[str, Any] = {"color": COLOURS[place], "markersize": 4.5, "capsize": 2, "linewidth": 1.2}
            by_class = [mean_and_half_width([100 * row[f"class {c}"] for row in rows])[0] for c in range(NUM_CLASSES)]
            classes.plot(
                range(1, NUM_CLASSES + 1), by_class, f"{MARKS[place]}-", color=COLOURS[place], markersize=4, linewidth=1
            )
            gains.plot(
                -0.04, place, MARKS[place], color=COLOURS[place], transform=gains.get_yaxis_transform(), clip_on=False
            )
            if name != "ce":
                for offset, key, marker in ((-0.17, "large", "^"), (0.17, "small", "v")):
                    mean_gain, half_gain = differences(runs, factor, name, key)
                    gains.errorbar(mean_gain, place + offset, xerr=half_gain, fmt=marker, **style)
            for offset, key, marker in ((-0.17, "rows", "s"), (0.17, "means", "o")):
                cosine, width = mean_and_half_width([row[key] for row in rows])
                angles.errorbar(cosine, place + offset, xerr=width, fmt=marker, **style)
        classes.set_xticks(range(1, NUM_CLASSES + 1))
        classes.set_ylabel("accuracy (%)")
        classes.set_title(f"   smallest class 1/{factor:g} of the largest", loc="left", fontsize=9)
        gains.axvline(0, color="black", linewidth=0.8)
        angles.axvline(-1 / (NUM_CLASSES - 1), color="black", linewidth=0.8, linestyle=":")
        gains.set_yticks(range(len(by_method)), [METHODS[name].title for name in by_method])
        gains.tick_params(axis="y", length=0, pad=16)
        angles.set_yticks([])
        for axis in (gains, angles):
            axis.set_ylim(len(by_method) - 0.5, -0.5)
        for axis in (classes, gains, angles):
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
    for letter, axis in zip("abcdefghijkl", grid.flat, strict=False):
        axis.text(0, 1.02, letter, transform=axis.transAxes, fontweight="bold", ha="right", va="bottom")
    grid[-1, 0].set_xlabel("class, largest first")
    grid[-1, 1].set_xlabel("accuracy, minus cross-entropy (points):\n▲ large, ▼ small classes")
    grid[-1, 2].set_xlabel("mean cosine of two small classes:\n■ rows, ● means; dotted: simplex")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="runs of each method")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--factors", nargs="+", type=float, default=[10.0, 100.0], help="largest over smallest class")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings for all methods")
    parser.add_argument("--split", choices=["test", "val"], default="test", help="val: to choose settings with")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--fast", action="store_true", help="two seeds, three methods, a few steps: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/neural_collapse_imbalanced"))
    arguments = parser.parse_args()
    if arguments.fast:
        arguments.seeds, arguments.steps, arguments.factors = 2, 20, [10.0]
        arguments.methods = ["ce", "simplex-dr", "regularized"]
    changes: Any = {name: float(value) for name, value in (change.split("=") for change in arguments.set)}

    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    data = DigitsDataModule(val_fraction=0.15, test_fraction=0.3)
    data.setup()
    runs: Runs = {factor: {name: [] for name in arguments.methods} for factor in arguments.factors}
    began = time.perf_counter()
    for factor, by_method in runs.items():
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            task = draw_task(data, seed, factor, arguments.split)
            for name, rows in by_method.items():
                method = METHODS[name]._replace(**changes)
                module = train(method, task, seed, arguments.steps, arguments.batch_size)
                rows.append({"seed": seed, **measure(module, task)})
    count = sum(len(rows) for by_method in runs.values() for rows in by_method.values())
    taken = time.perf_counter() - began

    arguments.out.mkdir(parents=True, exist_ok=True)
    with open(arguments.out / "runs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        classes = [f"class {c}" for c in range(NUM_CLASSES)]
        writer.writerow(["factor", "method", "seed", *MEASURES, "fitted", *classes])
        for factor, by_method in runs.items():
            for name, rows in by_method.items():
                writer.writerows([factor, name, *row.values()] for row in rows)
    text = tables(runs)
    (arguments.out / "table.md").write_text(text + "\n")
    if "ce" in arguments.methods:
        draw_figure(runs, arguments.out / "imbalanced.png")
    print(f"{text}\n\n{count} runs in {taken:.0f} s, {taken / count:.2f} s each; all in {arguments.out}")


if __name__ == "__main__":
    main()
