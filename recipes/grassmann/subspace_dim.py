"""How the number of subspace dimensions changes a representation: heads compared on a few noisy handwritten digits.

    python recipes/grassmann/subspace_dim.py [--seeds 40] [--heads softmax grassmann-4] [--fast]

Each run trains a small perceptron on five of the ten digits, with one of the heads, and measures on images it has not
seen: accuracy, the angle between features of one class, class separation, and how well a linear classifier on the
frozen features tells the other five digits apart. All heads of one seed share the classes, the training images, the
noise, the order of the batches and the first weights of the network, so that their differences are paired.

Prints the tables of README.md; writes them, the runs and subspace_dim.png to --out. The same command again goes on with
what is missing.
"""

import argparse
import functools
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, Trainer
from torch import Tensor, nn
from torch.nn.functional import linear, normalize
from torch.utils.data import DataLoader

from lightning_feat.baselines import MLPClassifier
from lightning_feat.callbacks import GrassmannHead
from lightning_feat.compare import Comparison, compare
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
TITLES = {"softmax": "vector softmax", "cosine": "cosine softmax", "smoothing": "label smoothing 0.1"}
TITLES |= {head: f"Grassmann, k = {k}" for head, k in GRASSMANN.items()}
MEASURES = {
    "accuracy": "accuracy",
    "variability": "variability (°)",
    "r2": "R²",
    "transfer_accuracy": "transfer",
    "fitted_accuracy": "fitted",
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


@functools.cache
def all_digits() -> DigitsDataModule:
    """Their split, the same for all."""
    data = DigitsDataModule(val_fraction=0.2, test_fraction=0.4)
    data.setup()
    return data


def draw_task(seed: int, shots: int, noise: float, split: str) -> Task:
    """Classes, training images and noise of one seed. The split into training, validation and test never changes."""
    data, generator = all_digits(), torch.Generator().manual_seed(seed)
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


def run(
    head: str, lr: float, shots: int, noise: float, split: str, num_steps: int, batch_size: int, seed: int
) -> tuple[Any, ...]:
    """An arm: a perceptron with the given head, trained by the baseline's own SGD with a cosine schedule."""
    task = draw_task(seed, shots, noise, split)
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
    batches = batches_of(task.train_seen, num_steps, batch_size, seed)
    return trainer, module, batches, lambda: measure(module.eval(), task)


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
        "transfer_accuracy": float(probe.accuracy),
        "fitted_accuracy": float(fitted.double().mean()),
    }


def draw_figure(made: Comparison, path: Path) -> None:
    """Paired differences to the base against k, with intervals; heads without subspaces as levels."""
    from matplotlib.figure import Figure

    shown = [metric for metric in MEASURES if metric != "fitted_accuracy"]
    figure = Figure(figsize=(10, 2.9), layout="constrained")
    axes = figure.subplots(1, len(shown))
    base = TITLES[made.question.base]
    for axis, metric in zip(axes, shown, strict=True):
        effects = {effect.arm: effect for effect in made.effects if effect.metric == metric}
        axis.axhline(0, color="black", linewidth=1, label=base)
        for colour, style, head in zip(("tab:orange", "tab:green"), ("--", ":"), ("cosine", "smoothing"), strict=True):
            if head in effects:
                level, low, high = ends_of(effects[head])
                axis.axhline(level, color=colour, linestyle=style, linewidth=1.4, label=TITLES[head])
                axis.axhspan(low, high, color=colour, alpha=0.12, linewidth=0)
        swept = {GRASSMANN[head]: ends_of(effect) for head, effect in effects.items() if head in GRASSMANN}
        bars = [[mean - low for mean, low, _ in swept.values()], [high - mean for mean, _, high in swept.values()]]
        axis.errorbar([*swept], [mean for mean, _, _ in swept.values()], bars, fmt="o-", capsize=3, label="Grassmann")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(GRASSMANN.values()), [str(k) for k in GRASSMANN.values()])
        axis.set_title(MEASURES[metric] + (" (%)" if effects[next(iter(effects))].is_share else ""), fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("dimensions of a class subspace, k", fontsize=10)
    axes[0].set_ylabel(f"difference to {base}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def ends_of(effect: Any) -> tuple[float, float, float]:
    """Difference and ends of its interval, in the unit they are shown in."""
    low, high = effect.interval or (effect.difference, effect.difference)
    return effect.difference * effect.factor, low * effect.factor, high * effect.factor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=40, help="runs of each head")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--heads", nargs="+", choices=TITLES, default=list(TITLES), help="the first is the base")
    parser.add_argument("--fast", action="store_true", help="two seeds, three heads, a few steps: does it run?")
    parser.add_argument("--split", choices=["test", "val"], default="test", help="val: to choose settings with")
    parser.add_argument("--lr", type=float, help="instead of the rate chosen for each head")
    parser.add_argument("--shots", type=int, default=20, help="training images of each digit")
    parser.add_argument("--noise", type=float, default=1.0, help="of the pixels, in their standard deviations")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/grassmann"))
    given = parser.parse_args()
    if given.fast:
        given.seeds, given.steps = 2, 20
        given.heads = ["softmax", "grassmann-1", "grassmann-8"]
    warnings.filterwarnings("ignore", module="lightning")
    options = (given.shots, given.noise, given.split, given.steps, given.batch_size)
    made = compare(
        {head: functools.partial(run, head, given.lr or LEARNING_RATE[head], *options) for head in given.heads},
        range(given.first_seed, given.first_seed + given.seeds),
        list(MEASURES),
        folder=given.out,
        executor="inline",
        threads=1,
        joint=False,
        titles=MEASURES | TITLES,
        answer=False,
    )
    print(made.overview)
    draw_figure(made, given.out / "subspace_dim.png")


if __name__ == "__main__":
    main()
