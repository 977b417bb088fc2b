"""Fine-tuning that stays near its start: what it costs on the new task, and what is left of the old one.

    python recipes/feature_shift/finetune.py [--seeds 10] [--shots 10] [--fast]

A perceptron learns the digits 0 to 4, gets a new head, and is fine-tuned on a few images of each of the digits 5 to 9:
plainly, with its backbone frozen, or held near its start by one of the penalties of ``FeatureShiftRegularizer``, each
at weights a decade apart. The old head is kept aside and put back for the test on the old digits. The seed draws first
weights, few images and the order of batches; methods of one seed share all that and the pre-trained network, so that
differences are paired. The split into training, validation and test images never changes.

Prints the tables of README.md; writes them, the runs and finetune.png to --out. The same command again goes on with
what is missing.

Shapes: N images.
"""

import argparse
import functools
import warnings
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
from lightning_feat.compare import Comparison, compare
from lightning_feat.compare.effects import mean_and_spread
from lightning_feat.data.digits import DigitsDataModule, DigitsPart
from lightning_feat.functional.transfer.probe import linear_probe

NUM_OLD = 5  # classes 0 to 4 are old, 5 to 9 new
HIDDEN = (128,) * 5
LAYERS = [f"backbone.{2 * i}" for i in range(1, len(HIDDEN) + 1)]  # the ReLUs
MEASURES = {
    "new_accuracy": "new digits",
    "old_accuracy": "old digits, head kept",
    "probe_accuracy": "old digits, new probe",
    "first_shift": "shift, first layer",
    "last_shift": "shift, last layer",
}


class Method(NamedTuple):
    """How the network is held."""

    title: str
    form: str | None = None  # of the regulariser
    weights: tuple[float, ...] = ()


MARKS = "*osvD^"
METHODS = {
    "plain": Method("plain"),
    "l2_sp": Method("L2-SP", "l2_sp", (0.01, 0.1, 1.0)),
    "distillation": Method("distillation", "distillation", (0.001, 0.01, 0.1)),
    "relative": Method("relative shift", "relative", (0.01, 0.1, 1.0)),
    "cosine": Method("cosine", "cosine", (0.1, 1.0, 10.0)),
    "frozen": Method("backbone frozen"),
}


class Task(NamedTuple):
    """Images ``(N, 1, 8, 8)`` and targets ``(N,)`` of one half of the digits, counted from 0."""

    train: TensorDataset
    val: TensorDataset
    test: TensorDataset


@functools.cache
def tasks() -> tuple[Task, Task]:
    """The old task and the new one."""
    data = DigitsDataModule()
    data.setup()
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


def perceptron() -> MLPClassifier:
    """By the baseline's SGD with momentum, without weight decay, its rate on a half cosine."""
    return MLPClassifier(tasks()[0].train.tensors[0][0].numel(), NUM_OLD, HIDDEN, lr=0.05, weight_decay=0.0)


def trainer(epochs: int, *callbacks: Callback) -> Trainer:
    return Trainer(
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


def pretrained(epochs: int, seed: int) -> dict[str, Tensor]:
    """Weights after training on the old digits: the start of all arms of a seed."""
    module = perceptron()
    seed_everything(seed, verbose=False)
    trainer(epochs).fit(module, DataLoader(tasks()[0].train, batch_size=32, shuffle=True))
    return module.state_dict()


def run(
    name: str, weight: float, shots: int, epochs: int, split: str, seed: int, start: dict[str, Tensor]
) -> tuple[Any, ...]:
    """An arm: the pre-trained network with a new head, held by one of the methods."""
    _, new = tasks()
    module, before = perceptron(), perceptron()
    module.load_state_dict(start)
    before.load_state_dict(start)
    seed_everything(seed, verbose=False)
    module.head = nn.Linear(HIDDEN[-1], NUM_OLD)
    form = METHODS[name].form
    monitor = FeatureShiftMonitor(LAYERS, data="val")
    callbacks: list[Callback] = [monitor]
    if form == "l2_sp":
        callbacks.append(FeatureShiftRegularizer(form="l2_sp", weight=weight, new_layers=["head"]))
    elif form is not None:
        callbacks.append(FeatureShiftRegularizer(LAYERS, form, weight))  # type: ignore[arg-type]
    if name == "frozen":
        module.backbone.requires_grad_(False)
    data = {
        "train": DataLoader(few_of(new, shots, seed), batch_size=32, shuffle=True),
        "val": DataLoader(new.val, batch_size=512),
    }

    def after() -> dict[str, float]:
        at_first = measure(before.eval(), before, split)
        return {
            **measure(module.eval(), before, split),
            "first_shift": monitor.history[LAYERS[0]][-1][1],
            "last_shift": monitor.history[LAYERS[-1]][-1][1],
            **{f"before/{key}": at_first[key] for key in ("old_accuracy", "probe_accuracy")},
        }

    seed_everything(seed, verbose=False)
    return trainer(epochs, *callbacks), module, data, after


@torch.no_grad()
def measure(module: Any, start: Any, split: str) -> dict[str, float]:
    """Accuracies on the images of ``split``; the old head is that of the start."""
    old, new = tasks()
    parts = [part.tensors for part in (old.train, old.val, getattr(old, split))]
    features = [module.backbone(images) for images, _ in parts]
    probe = linear_probe(features[0], parts[0][1], features[1], parts[1][1], features[2], parts[2][1])
    images, targets = getattr(new, split).tensors
    return {
        "new_accuracy": share_right(module(images), targets),
        "old_accuracy": share_right(start.head(features[2]), parts[2][1]),
        "probe_accuracy": float(probe.accuracy),
    }


def share_right(logits: Tensor, targets: Tensor) -> float:
    return float((logits.argmax(1) == targets).double().mean())


def draw_figure(made: Comparison, arms: dict[str, tuple[str, float]], path: Path, shown: tuple[str, str]) -> None:
    """New and old accuracy against those of plain fine-tuning, a curve for each penalty with paired intervals; and the
    shift of the layers over the epochs, twice.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    trade, left, right = figure.subplots(1, 3, width_ratios=[1.5, 1, 1.05])
    trade.axhline(0, color="0.7", linewidth=0.8)
    trade.axvline(0, color="0.7", linewidth=0.8)
    effects = {(effect.arm, effect.metric): effect for effect in made.effects}
    for place, (name, method) in enumerate(METHODS.items()):
        points = [
            [effects[arm, metric] for metric in ("old_accuracy", "new_accuracy")]
            for arm, (its, _) in arms.items()
            if its == name and name != "plain"
        ]
        if not points and name != "plain":
            continue
        style: dict[str, Any] = {"color": COLOURS[place]}
        x, y = ([100 * point[i].difference for point in points] or [0.0] for i in (0, 1))
        for point in points:
            ends = [[100 * end for end in effect.interval or (effect.difference,) * 2] for effect in point]
            old, new = (100 * effect.difference for effect in point)
            trade.plot(ends[0], [new, new], linewidth=0.8, alpha=0.55, **style)
            trade.plot([old, old], ends[1], linewidth=0.8, alpha=0.55, **style)
        trade.plot(x, y, "-", linewidth=1.1, **style)
        weights = ", ".join(f"{weight:g}" for its, weight in arms.values() if its == name and method.form)
        for i, (old, new) in enumerate(zip(x, y, strict=True)):
            label = method.title + (f": {weights}" if weights else "") if i == 0 else None
            trade.plot(old, new, MARKS[place], markersize=4 + 2 * i, label=label, **style)
    trade.set_xlabel("old digits, head kept, minus plain (points)", fontsize=9)
    trade.set_ylabel("new digits, minus plain (points)", fontsize=9)
    trade.spines[["top", "right"]].set_visible(False)
    trade.tick_params(labelsize=8)
    trade.legend(frameon=False, fontsize=7, loc="lower left", title="weights, small to large marks", title_fontsize=7)
    maps = {arm: mean_shifts(made, arm) for arm in shown if arm in arms}
    largest = max(value for found in maps.values() for line in found.values() for _, value in line)
    for axes, (arm, found) in zip((left, right), maps.items(), strict=False):
        draw_map(found, axes, largest)
        axes.set_title(title_of(*arms[arm]), fontsize=9)
        axes.set_ylabel("hidden layer", fontsize=8)
    for letter, axes in zip("abc", (trade, left, right), strict=True):
        axes.text(-0.02, 1.02, letter, transform=axes.transAxes, fontweight="bold", ha="right", va="bottom")
    figure.savefig(path, dpi=150)


def mean_shifts(made: Comparison, arm: str) -> dict[str, list[tuple[float, float]]]:
    """Of each layer, over seeds."""
    shifts = {}
    for number, layer in enumerate(LAYERS, 1):
        lines = [r.curves[f"feature_shift_val/relative/{layer}"] for r in made.records if r.arm == arm and r.finished]
        shifts[str(number)] = [(at[0][0], sum(value for _, value in at) / len(at)) for at in zip(*lines, strict=True)]
    return shifts


def title_of(name: str, weight: float) -> str:
    return METHODS[name].title + (f", {weight:g}" if METHODS[name].form else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="runs of each method")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="the first is the base")
    parser.add_argument("--weights", nargs="+", type=float, help="other weights, for all penalties")
    parser.add_argument("--shots", type=int, default=10, help="training images of each new digit")
    parser.add_argument("--epochs", type=int, default=40, help="of fine-tuning, two batches each at 10 shots")
    parser.add_argument("--split", choices=["test", "val"], default="test", help="val: to choose settings with")
    parser.add_argument("--fast", action="store_true", help="two seeds, three methods, a few epochs: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/feature_shift_finetune"))
    given = parser.parse_args()
    if given.fast:
        given.seeds, given.methods, given.epochs = 2, ["plain", "relative", "l2_sp"], 2
    warnings.filterwarnings("ignore", module="lightning")
    arms = {
        f"{name}_{weight:g}" if METHODS[name].form else name: (name, weight)
        for name in given.methods
        for weight in (given.weights or METHODS[name].weights if METHODS[name].form else (0.0,))
    }
    options = (given.shots, given.epochs, given.split)
    made = compare(
        {arm: functools.partial(run, *which, *options) for arm, which in arms.items()},
        range(given.first_seed, given.first_seed + given.seeds),
        list(MEASURES),
        folder=given.out,
        start=functools.partial(pretrained, 2 if given.fast else 20),
        executor="inline",
        threads=1,
        joint=False,
        share_order=False,  # all arms draw the same numbers
        answer=False,
        titles=MEASURES | {arm: title_of(*which) for arm, which in arms.items()},
    )
    print(made.overview)
    plain = [record for record in made.records if record.arm == made.question.base]
    for key in ("old_accuracy", "probe_accuracy"):
        _, mean, spread = mean_and_spread(plain, f"before/{key}")
        print(f"before fine-tuning, {MEASURES[key]}: {100 * mean:.1f} ± {100 * spread:.1f} %")
    if made.question.base == "plain":
        draw_figure(made, arms, given.out / "finetune.png", ("plain", "relative_0.1"))


if __name__ == "__main__":
    main()
