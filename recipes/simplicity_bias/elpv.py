"""Solar cells: which photographs a network learns late, what they have in common, and whether showing them twice helps.

    pip install "lightning-feat[recipes,elpv]"
    python recipes/simplicity_bias/elpv.py [--seeds 6] [--processes 1] [--fast]

A small timm network tells sound cells from broken ones. Early in training the photographs of each class are cut in two
by the logits, and the cluster with the higher loss counts as slow. What is known about a photograph beside its class is
then compared between slow and fast ones: cell type, whether the experts were sure of the label, brightness. At last the
network is trained from its first weights again, with slow photographs shown twice, and with as many random ones.

Each seed draws its own split, first weights and order of batches; the trainings of one seed share the first two, so
that differences are paired. Prints the tables of README.md; writes clusters.csv, accuracy.csv, table.md and elpv.png
to --out.

Shapes: N training photographs.
"""

import argparse
import csv
import itertools
import logging
import math
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_feat.baselines import TimmClassifier
from lightning_feat.data import ElpvDataModule
from lightning_feat.data.elpv import ElpvPart, load_elpv
from lightning_feat.functional.simplicity_bias.clusters import slow_examples

CLASSES = ("sound", "broken")
METHODS = {"plain": "each photograph once", "slow": "slow ones twice", "random": "as many random ones twice"}
PROPERTIES = {  # of photographs, and the factor and the digits they are printed with
    "poly": ("polycrystalline (%)", 100.0, 0),
    "unsure": ("label 1/3 or 2/3 (%)", 100.0, 0),
    "wrong": ("misclassified at that epoch (%)", 100.0, 0),
    "brightness": ("mean grey level (0 to 255)", 1.0, 1),
    "contrast": ("deviation of grey levels", 1.0, 1),
}
COLOURS = ("#0072B2", "#D55E00")  # Okabe and Ito, "Color Universal Design", 2008


class Setting(NamedTuple):
    """Of all trainings alike."""

    epochs: int
    image_size: int
    separating: tuple[int, ...]  # epochs after which photographs are told apart; the first one is used
    train_photographs: int | None = None  # None: all
    batch_size: int = 64
    lr: float = 0.05


class Photographs(NamedTuple):
    """What the package says of each of the 2,624, and two numbers measured on it."""

    thirds: Tensor  # thrice the defect probability
    poly: Tensor
    brightness: Tensor
    contrast: Tensor


class Found(NamedTuple):
    """What one seed found after one epoch; lists, which other processes can send."""

    seed: int
    epoch: int
    indices: list[int]  # (N,) numbers of the training photographs
    targets: list[int]
    slow: list[bool]
    wrong: list[bool]


Result = tuple[list[Found], dict[str, dict[str, float]]]  # of a seed: what was found, and accuracies by method


class StepClassifier(TimmClassifier):
    """With the schedule of the paper: a tenth of the rate after a half, and again after three quarters of the run."""

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        epochs = self.trainer.max_epochs or 1
        return [optimizer], [MultiStepLR(optimizer, [epochs // 2, 3 * epochs // 4])]


class Selecting(Callback):
    """Tells slow from fast photographs after each of some epochs."""

    def __init__(self, part: ElpvPart, seed: int, indices: Tensor, epochs: Sequence[int]) -> None:
        self.part, self.seed, self.indices, self.epochs = part, seed, indices, epochs
        self.found: list[Found] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch + 1 not in self.epochs:
            return
        logits, targets = logits_of(pl_module, self.part), self.part.targets
        loss = cross_entropy(logits, targets, reduction="none")
        slow = slow_examples(logits, loss, targets, num_classes=2, seed=self.seed).slow
        wrong = logits.argmax(1) != targets
        columns = (self.indices.tolist(), targets.tolist(), slow.tolist(), wrong.tolist())
        self.found.append(Found(self.seed, trainer.current_epoch + 1, *columns))


@torch.no_grad()
def logits_of(module: LightningModule, part: ElpvPart) -> Tensor:
    """In eval mode, without augmentation, in the order of the part."""
    module.eval()
    logits = [module(images) for images, _ in DataLoader(part, batch_size=256)]
    module.train()
    return torch.cat(logits)


def train(dataset: Dataset[Any], seed: int, setting: Setting, callbacks: list[Callback]) -> LightningModule:
    seed_everything(seed, verbose=False)
    module = StepClassifier("test_resnet", num_classes=2, in_chans=1, lr=setting.lr)
    trainer = Trainer(
        max_epochs=setting.epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(dataset, setting.batch_size, shuffle=True))
    return module


def accuracies(module: LightningModule, part: ElpvPart) -> dict[str, float]:
    """In percent, over all photographs and over those of each class."""
    right = (logits_of(module, part).argmax(1) == part.targets).double() * 100
    return {
        "all": float(right.mean()),
        **{name: float(right[part.targets == c].mean()) for c, name in enumerate(CLASSES)},
    }


def run_seed(seed: int, setting: Setting, methods: Sequence[str], split: str) -> Result:
    """All trainings of a seed."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    data = ElpvDataModule(image_size=setting.image_size, val_fraction=0.1, test_fraction=0.3, seed=seed)
    data.setup()
    part: ElpvPart = data.train_set
    indices = data.train_indices
    if setting.train_photographs is not None:
        part = ElpvPart(part.images, part.targets, torch.arange(setting.train_photographs), 1, flip=True)
    clean = ElpvPart(part.images, part.targets, torch.arange(len(part)), channels=1)
    selecting = Selecting(clean, seed, indices[: len(part)], setting.separating)
    slow = torch.zeros(len(part), dtype=torch.bool)
    final = data.test_set if split == "test" else data.val_set
    reached = {}
    for method in methods:
        if method == "plain":
            module = train(part, seed, setting, [selecting])
            slow = torch.tensor(selecting.found[0].slow)
        else:
            twice = slow if method == "slow" else random_like(slow, part.targets, seed)
            shown = torch.arange(len(part)).repeat_interleave(1 + twice.long())
            module = train(Subset(part, shown.tolist()), seed, setting, [])
        reached[method] = accuracies(module, final)
    return selecting.found, reached


def random_like(slow: Tensor, targets: Tensor, seed: int) -> Tensor:
    """As many of each class as are slow, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros_like(slow)
    for target in targets.unique():
        members = (targets == target).nonzero()[:, 0]
        order = members[torch.randperm(len(members), generator=generator)]
        drawn[order[: int(slow[members].sum())]] = True
    return drawn


def known_photographs() -> tuple[Tensor, Photographs]:
    images, thirds, is_poly = load_elpv()
    parts = images.flatten(1).split(256)  # all at once would be a gigabyte of floats
    brightness, contrast = (
        torch.cat([measure(part.float(), 1) for part in parts]) for measure in (torch.mean, torch.std)
    )
    return images, Photographs(thirds, is_poly.double(), brightness, contrast)


def compare(found: Found, known: Photographs) -> dict[str, Any]:
    """Of each class the size, and every property, of the fast and the slow cluster."""
    indices = torch.tensor(found.indices)
    targets, slow = torch.tensor(found.targets), torch.tensor(found.slow)
    unsure = (known.thirds[indices] % 3 != 0).double()
    columns = {
        "poly": known.poly[indices],
        "unsure": unsure,
        "wrong": torch.tensor(found.wrong).double(),
        "brightness": known.brightness[indices].double(),
        "contrast": known.contrast[indices].double(),
    }
    row: dict[str, Any] = {"seed": found.seed, "epoch": found.epoch}
    for c, name in enumerate(CLASSES):
        for cluster, chosen in (("fast", ~slow), ("slow", slow)):
            members = chosen & (targets == c)
            row[f"{name} {cluster} photographs"] = int(members.sum())
            row.update({f"{name} {cluster} {key}": float(values[members].mean()) for key, values in columns.items()})
    return row


def overlap(founds: Sequence[Found], target: int) -> list[tuple[float, float]]:
    """For each two seeds: photographs of a class slow in both, over those slow in either; and what chance would give.

    Over the training photographs that both seeds have.
    """
    pairs = []
    for one, other in itertools.combinations(founds, 2):
        first, second = (
            {i: s for i, s, t in zip(f.indices, f.slow, f.targets, strict=True) if t == target} for f in (one, other)
        )
        common = first.keys() & second.keys()
        both = sum(first[i] and second[i] for i in common)
        either = sum(first[i] or second[i] for i in common)
        share, share_too = (sum(which[i] for i in common) / max(len(common), 1) for which in (first, second))
        union = share + share_too - share * share_too
        pairs.append((both / max(either, 1), share * share_too / union if union else math.nan))
    return pairs


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval that Student's t gives it; nan for a single value."""
    from scipy.stats import t  # type: ignore[import-untyped]  # comes with scikit-learn

    count = len(values)
    spread = statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return statistics.fmean(values), float(t.ppf(0.975, max(count - 1, 1))) * spread


def with_interval(values: Sequence[float], digits: int) -> str:
    mean, half = mean_and_half_width(values)
    return f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"


def cluster_table(rows: Sequence[dict[str, Any]]) -> str:
    """Of one epoch: means over seeds, and slow minus fast with intervals over seeds."""
    lines = ["| class | | fast | slow | slow minus fast |", "|---|---|---|---|---|"]
    for name in CLASSES:
        sizes = [[row[f"{name} {cluster} photographs"] for row in rows] for cluster in ("fast", "slow")]
        cells = " | ".join(f"{statistics.fmean(size):.0f} ({min(size)} to {max(size)})" for size in sizes)
        lines.append(f"| {name} | photographs (least and most) | {cells} | |")
        for key, (title, scale, digits) in PROPERTIES.items():
            fast, slow = ([scale * row[f"{name} {cluster} {key}"] for row in rows] for cluster in ("fast", "slow"))
            difference = with_interval([b - a for a, b in zip(fast, slow, strict=True)], digits)
            means = " | ".join(f"{statistics.fmean(values):.{digits}f}" for values in (fast, slow))
            lines.append(f"| {name} | {title} | {means} | {difference} |")
    return "\n".join(lines)


def overlap_table(founds: Sequence[Found], rows: Sequence[dict[str, Any]], epochs: Sequence[int]) -> str:
    """By epoch: share of slow photographs, overlap of two seeds, and slow minus fast of two properties."""
    lines = [
        "| class | epoch | slow (%) | overlap of two seeds (least and most) | by chance "
        "| misclassified, slow and fast (%) | label 1/3 or 2/3, slow minus fast | mean grey level, slow minus fast |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (c, name), epoch in itertools.product(enumerate(CLASSES), epochs):
        here = [row for row in rows if row["epoch"] == epoch]
        pairs = overlap([found for found in founds if found.epoch == epoch], c)
        seen, chance = zip(*pairs, strict=True) if pairs else ((math.nan,), (math.nan,))
        slow, fast = ([row[f"{name} {cluster} photographs"] for row in here] for cluster in ("slow", "fast"))
        share = 100 * statistics.fmean(s / (s + f) for s, f in zip(slow, fast, strict=True))
        wrong = [100 * statistics.fmean(row[f"{name} {k} wrong"] for row in here) for k in ("slow", "fast")]
        gaps = []
        for key in ("unsure", "brightness"):
            _, scale, digits = PROPERTIES[key]
            gaps.append(
                with_interval([scale * (row[f"{name} slow {key}"] - row[f"{name} fast {key}"]) for row in here], digits)
            )
        lines.append(
            f"| {name} | {epoch} | {share:.0f} | {statistics.fmean(seen):.2f} ({min(seen):.2f} to {max(seen):.2f}) "
            f"| {statistics.fmean(chance):.2f} | {wrong[0]:.0f}, {wrong[1]:.0f} | {gaps[0]} | {gaps[1]} |"
        )
    return "\n".join(lines)


def accuracy_table(reached: Sequence[dict[str, dict[str, float]]]) -> str:
    """Mean and deviation over seeds; paired differences to plain training with intervals."""
    keys = ("all", *CLASSES)
    headings = [*(f"{key} (%)" for key in keys), *(f"{key}, minus once" for key in keys)]
    lines = ["| shown | " + " | ".join(headings) + " |", "|---|" + "---|" * len(headings)]
    for method, title in METHODS.items():
        if method not in reached[0]:
            continue
        cells = []
        for key in keys:
            values = [row[method][key] for row in reached]
            cells.append(f"{statistics.fmean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}")
        for key in keys:
            cells.append(
                "" if method == "plain" else with_interval([row[method][key] - row["plain"][key] for row in reached], 1)
            )
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_figure(images: Tensor, found: Found, rows: Sequence[dict[str, Any]], path: Path, across: int = 5) -> None:
    """Photographs of each cluster, drawn at random; and the differences between clusters, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(10.5, 4.2), layout="constrained")
    photographs, chart = figure.subfigures(1, 2, width_ratios=[2.75, 1])  # type: ignore[misc]  # an array
    blocks = photographs.subfigures(2, 2, wspace=0.03, hspace=0.03)
    generator = torch.Generator().manual_seed(found.seed)
    indices, slow, targets = torch.tensor(found.indices), torch.tensor(found.slow), torch.tensor(found.targets)
    for (c, name), (place, cluster) in itertools.product(enumerate(CLASSES), enumerate(("fast", "slow"))):
        block, members = blocks[c, place], indices[(targets == c) & (slow == bool(place))]
        chosen = members[torch.randperm(len(members), generator=generator)[: 2 * across]]
        block.suptitle(f"{name}, {cluster}: {len(members)} photographs", fontsize=10)
        for axis, index in itertools.zip_longest(block.subplots(2, across).flat, chosen.tolist()):
            axis.axis("off")
            if index is not None:
                axis.imshow(images[index].numpy(), cmap="gray", vmin=0, vmax=255)

    # What is a share has its own axis, and what is a grey level has another.
    upper, lower = chart.subplots(2, 1, height_ratios=[3, 2])
    for axis, names, unit in (
        (upper, {"poly": "polycrystalline", "unsure": "label 1/3 or 2/3", "wrong": "misclassified"}, "points"),
        (lower, {"brightness": "mean", "contrast": "deviation"}, "grey levels"),
    ):
        for (place, key), (c, name) in itertools.product(enumerate(names), enumerate(CLASSES)):
            scale = PROPERTIES[key][1]
            gaps = [scale * (row[f"{name} slow {key}"] - row[f"{name} fast {key}"]) for row in rows]
            mean, half = mean_and_half_width(gaps)
            style: dict[str, Any] = {"color": COLOURS[c], "markersize": 5, "capsize": 3}
            label = name if place == 0 else None
            axis.errorbar(mean, place + 0.24 * c - 0.12, xerr=half, fmt="os"[c], label=label, **style)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), list(names.values()))
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel(f"slow minus fast ({unit})", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    upper.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.4, 1), ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(results: Sequence[Result], setting: Setting, seeds: Sequence[int], out: Path) -> None:
    """Print and write everything."""
    founds = [found for some, _ in results for found in some]
    reached = [row for _, row in results]
    images, known = known_photographs()
    rows = [compare(found, known) for found in founds]
    first = [row for row in rows if row["epoch"] == setting.separating[0]]
    text = "\n\n".join((cluster_table(first), overlap_table(founds, rows, setting.separating), accuracy_table(reached)))
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text + "\n")
    with open(out / "clusters.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    with open(out / "accuracy.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "method", "all", *CLASSES])
        for seed, row in zip(seeds, reached, strict=True):
            writer.writerows([seed, method, *values.values()] for method, values in row.items())
    draw_figure(images, founds[0], first, out / "elpv.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--separating", nargs="+", type=int, default=[2, 4, 10], help="epochs to tell apart after; the first is used"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="plain comes first")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--image-size", type=int, default=48)
    parser.add_argument("--split", choices=["test", "val"], default="test", help="val: to choose settings with")
    parser.add_argument("--processes", type=int, default=1, help="seeds to run at once, one thread each")
    parser.add_argument("--fast", action="store_true", help="two seeds, two epochs, 128 photographs: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/simplicity_bias_elpv"))
    arguments = parser.parse_args()
    if arguments.methods[0] != "plain":
        parser.error("--methods begins with plain, which tells the photographs apart")
    setting = Setting(arguments.epochs, arguments.image_size, tuple(arguments.separating), lr=arguments.lr)
    if arguments.fast:
        arguments.seeds, setting = 2, Setting(epochs=2, image_size=32, separating=(1, 2), train_photographs=128)

    began = time.perf_counter()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    jobs = [(seed, setting, arguments.methods, arguments.split) for seed in seeds]
    if arguments.processes > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.processes, context) as pool:
            results = list(pool.map(run_seed, *zip(*jobs, strict=True)))
    else:
        results = list(itertools.starmap(run_seed, jobs))
    report(results, setting, list(seeds), arguments.out)
    print(f"\n{arguments.seeds} seeds in {time.perf_counter() - began:.0f} s; files in {arguments.out}")


if __name__ == "__main__":
    main()
