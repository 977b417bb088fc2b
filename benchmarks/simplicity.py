"""Time of the selection of slow examples, beside scikit-learn's k-means and beside an epoch of training.

    python benchmarks/simplicity.py [--quick]   # --quick leaves out the largest cases

One process, threads as found, medians of three rounds taken in turns.

- clustering: both cut every class in two with ten starts; the inertias that they reach are printed, as a sum over
  classes, relative to scikit-learn's. Then the same from outputs in float16, the memory on top of the outputs, and the
  share of examples that change sides.
- selection: the pass over the data, clustering and all, inside a fit, over the time of the epoch before it
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.cluster import KMeans
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from turns import add_efforts

from lightning_feat.baselines import MLPClassifier, TimmClassifier
from lightning_feat.callbacks import SimplicityBiasUpsampler
from lightning_feat.functional.simplicity_bias.clusters import two_means

CASES = [(10_000, 10, 10), (50_000, 100, 100), (100_000, 100, 100)]  # examples, classes, outputs
MOMENT = [(200, 2, 4)]


def outputs_of(size: int, num_classes: int, width: int) -> tuple[Tensor, Tensor]:
    """Logits of a network early in training: a class and a part of it that is further along, with noise."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(size) % num_classes
    easy = (torch.rand(size, generator=generator) < 0.7).float()
    outputs = torch.randn(size, width, generator=generator)
    outputs[torch.arange(size), targets % width] += 1 + 4 * easy
    return outputs, targets


def by_scikit_learn(outputs: Tensor, targets: Tensor, num_classes: int) -> float:
    inertia = 0.0
    for label in range(num_classes):
        mine = outputs[targets == label].numpy()
        inertia += float(KMeans(2, n_init=10, random_state=0, max_iter=100, tol=0).fit(mine).inertia_)
    return inertia


class Timed(SimplicityBiasUpsampler):
    """Goes on after the first epoch, and takes the time of that epoch and of the selection after it."""

    def __init__(self) -> None:
        super().__init__(separating_epoch=1, restart=False)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self.began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ended = time.perf_counter()
        if self.selection is None:
            super().on_train_epoch_end(trainer, pl_module)
            self.epoch, self.took = ended - self.began, time.perf_counter() - ended


def selection_rounds(
    new_module: Callable[[], LightningModule], images: Tensor, num_classes: int, count: int = 3
) -> list[list[float]]:
    """Seconds of an epoch, of the selection, and their ratio, in each round."""
    rounds = []
    for _ in range(count):
        timed = Timed()
        quiet: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        data = TensorDataset(images, torch.arange(len(images)) % num_classes)
        trainer = Trainer(max_epochs=2, accelerator="cpu", callbacks=timed, limit_val_batches=0, **quiet)
        trainer.fit(new_module(), DataLoader(data, batch_size=128, shuffle=True))
        rounds.append([timed.epoch, timed.took, timed.took / timed.epoch])
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_efforts(parser)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32\n")
    print(
        "| examples x classes x outputs | ours (s) | scikit-learn (s) | inertia, ours over theirs |\n|---|---|---|---|"
    )
    for case in MOMENT if arguments.moment else CASES[:-1] if arguments.quick else CASES:
        outputs, targets = outputs_of(*case)
        ways: dict[str, Callable[[], float]] = {
            "ours": lambda o=outputs, t=targets, c=case[1]: float(two_means(o, t, c).inertia.sum()),  # type: ignore[misc]
            "theirs": lambda o=outputs, t=targets, c=case[1]: by_scikit_learn(o, t, c),  # type: ignore[misc]
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        inertia = {}
        for _ in range(3):
            for name, way in ways.items():
                began = time.perf_counter()
                inertia[name] = way()
                seconds[name].append(time.perf_counter() - began)
        cells = [f"{statistics.median(taken):.2f}" for taken in seconds.values()]
        print(
            f"| {' x '.join(map(str, case))} | " + " | ".join(cells) + f" | {inertia['ours'] / inertia['theirs']:.6f} |"
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        exact, half = two_means(outputs, targets, case[1]), two_means(outputs.half(), targets, case[1])
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        agree = (exact.cluster == half.cluster).float()
        share = torch.zeros(case[1]).index_add_(0, targets, agree) / targets.bincount(minlength=case[1])
        changed = float((1 - torch.maximum(share, 1 - share)).mean())  # which cluster is called 0 is chance
        print(f"\nfrom float16: {changed:.2e} of the examples change sides; {more:.0f} MiB more than before\n")
    print("| network, data | epoch (s) | selection (s) | ratio |\n|---|---|---|---|")
    size = 500 if arguments.moment else 20_000
    pixels = torch.randn(size, 64)
    cases: dict[str, tuple[Callable[[], LightningModule], Tensor, int]] = {
        f"MLP 128-64, {size:,} x 64": (lambda: MLPClassifier(64, 10), pixels, 10),
        f"MLP 128-64, {size:,} x 64, 100 classes": (lambda: MLPClassifier(64, 100), pixels, 100),
    }
    if not (arguments.quick or arguments.moment):
        images = torch.randn(1_000, 3, 32, 32)
        cases["resnet18, 1,000 x 32 px"] = (lambda: TimmClassifier("resnet18", 10), images, 10)
    for name, case_ in cases.items():
        columns = zip(*selection_rounds(*case_, count=1 if arguments.moment else 3), strict=True)
        epoch, took, ratio = map(statistics.median, columns)
        print(f"| {name} | {epoch:.2f} | {took:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
