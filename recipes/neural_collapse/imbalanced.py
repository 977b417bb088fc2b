"""Few images of some classes: what a fixed simplex, dot-regression, collapse regularisation and a classifier that is
realigned after training do for small classes.

    python recipes/neural_collapse/imbalanced.py [--seeds 10] [--factors 10 100] [--fast]

Each run trains the same small perceptron on handwritten digits whose class sizes fall exponentially, the largest
``factor`` times the smallest, by one of the methods, far beyond zero training error. Which digits are large, and which
of their images are kept, is drawn by the seed; the split into training, validation and test images never changes.
Methods of one seed share all that, the order of the batches and the first weights, so that differences are paired.

Prints the tables of README.md; writes overview.md, comparison.png and the runs of each factor to --out. The same
command again goes on with what is missing.

Shapes: N images, D features, C classes.
"""

import argparse
import functools
import math
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning import Callback, Trainer
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
from lightning_feat.compare import compare_conditions
from lightning_feat.data.digits import DigitsDataModule, DigitsPart
from lightning_feat.functional.common.class_sums import class_means, class_sums

NUM_CLASSES, HIDDEN, SMALL = 10, (256, 128), 5  # the small classes are the last five
MEASURES = {
    "all_accuracy": "all",
    "large_accuracy": "large classes",
    "small_accuracy": "small classes",
    "nearest_accuracy": "by nearest mean",
    "rows_cosine": "rows: cosine",
    "means_cosine": "means: cosine",
    "fitted_accuracy": "fitted",
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


@functools.cache
def digits() -> DigitsDataModule:
    """Their split, the same for all."""
    data = DigitsDataModule(val_fraction=0.15, test_fraction=0.3)
    data.setup()
    return data


def draw_task(seed: int, factor: float, split: str) -> Task:
    """Which digit becomes which class, and which of its training images are kept.

    Not ``DigitsDataModule(imbalance_factor=...)``: there the small classes are always the same digits, and hard ones.
    """
    data, generator = digits(), torch.Generator().manual_seed(seed)
    drawn = torch.randperm(NUM_CLASSES, generator=generator).tolist()
    members = [(data.train_set.targets == digit).nonzero()[:, 0] for digit in drawn]
    largest = min(map(len, members))
    counts = [max(1, round(largest * factor ** (-c / (NUM_CLASSES - 1)))) for c in range(NUM_CLASSES)]
    kept = [m[torch.randperm(len(m), generator=generator)][:count] for m, count in zip(members, counts, strict=True)]
    final = data.test_set if split == "test" else data.val_set
    class_of = torch.tensor([drawn.index(digit) for digit in range(NUM_CLASSES)])
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


def run(method: Method, factor: float, split: str, num_steps: int, batch_size: int, seed: int) -> tuple[Any, ...]:
    """An arm: the baseline's own SGD, with momentum 0.9, L2 decay 5e-4 and its rate on a half cosine."""
    task = draw_task(seed, factor, split)
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
    batches = batches_of(task, num_steps, batch_size, seed, method.balanced)
    return trainer, module, batches, lambda: measure(module, task, method)


@torch.no_grad()
def measure(module: Any, task: Task, method: Method) -> dict[str, float]:
    """Accuracies over classes, each weighing the same, and angles between small classes in training; see README.md."""
    if method.realigned == "lengths":
        realign_classifier(module, "head")
    elif method.realigned == "prior":
        realign_classifier(module, "head", power=0.0, frequencies=[1.0] * NUM_CLASSES, train_frequencies=task.counts)
    module.eval()
    features = module.backbone(task.eval_images)
    mean_CD = class_means(class_sums(module.backbone(task.images), task.targets, NUM_CLASSES))
    right_C = class_accuracy(module.head(features), task.eval_targets)
    nearest_NC = features.double() @ mean_CD.T - mean_CD.square().sum(1) / 2
    row_CD = module.head.prototypes if hasattr(module.head, "prototypes") else module.head.weight
    fitted = module(task.images).argmax(1) == task.targets
    return {
        "all_accuracy": float(right_C.mean()),
        "large_accuracy": float(right_C[:-SMALL].mean()),
        "small_accuracy": float(right_C[-SMALL:].mean()),
        "nearest_accuracy": float(class_accuracy(nearest_NC, task.eval_targets).mean()),
        "rows_cosine": mean_cosine((row_CD - row_CD.mean(0))[-SMALL:]),
        "means_cosine": mean_cosine((mean_CD - mean_CD.mean(0))[-SMALL:]),
        "fitted_accuracy": float(fitted.double().mean()),
        **{f"class_{c}_accuracy": float(right) for c, right in enumerate(right_C)},
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="runs of each method")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--factors", nargs="+", type=float, default=[10.0, 100.0], help="largest over smallest class")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="the first is the base")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings for all methods")
    parser.add_argument("--split", choices=["test", "val"], default="test", help="val: to choose settings with")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--fast", action="store_true", help="two seeds, three methods, a few steps: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/neural_collapse_imbalanced"))
    given = parser.parse_args()
    if given.fast:
        given.seeds, given.steps, given.factors = 2, 20, [10.0]
        given.methods = ["ce", "simplex-dr", "regularized"]
    changes: Any = {name: float(value) for name, value in (change.split("=") for change in given.set)}
    warnings.filterwarnings("ignore", module="lightning")

    def arms(factor: float) -> dict[str, Any]:
        options = (factor, given.split, given.steps, given.batch_size)
        return {name: functools.partial(run, METHODS[name]._replace(**changes), *options) for name in given.methods}

    compare_conditions(
        {f"{factor:g}": arms(factor) for factor in given.factors},
        range(given.first_seed, given.first_seed + given.seeds),
        list(MEASURES),
        folder=given.out,
        executor="inline",
        threads=1,
        joint=False,
        titles=MEASURES | {name: method.title for name, method in METHODS.items()},
        heading="factor",
    )


if __name__ == "__main__":
    main()
