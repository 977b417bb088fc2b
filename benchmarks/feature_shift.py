"""Time of a training step with feature shift watched or penalised, beside the same step without.

    python benchmarks/feature_shift.py [--turns 9] [--steps 20] [--quick]   # --quick leaves out the larger network

One process, threads as found; each turn takes every way once, so that whatever else the machine does meets all. A step
is that of Lightning: forward, backward and optimizer, and the callback's hooks. Ratios are taken turn by turn; printed
are their median and the range of the middle half. Memory is that of the reference: the weights of the frozen copy, the
cached features, or the weights of the start.
"""

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
from turns import add_efforts

from lightning_feat.baselines import TimmClassifier
from lightning_feat.callbacks.feature_shift.monitor import FeatureShiftMonitor
from lightning_feat.callbacks.feature_shift.regularizer import FeatureShiftRegularizer
from lightning_feat.data import IndexedDataset

CASES = {  # network, layers, image size, batch size
    "test_vit": (["network.blocks.0", "network.blocks.2", "network.blocks.4"], 160, 16),
    "resnet18": (["network.layer1", "network.layer2", "network.layer3", "network.layer4"], 96, 16),
}
WARM_UP = 3


class Indexed(TimmClassifier):
    """Gets batches with indices."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[0], batch_idx)

    def forward(self, images: Any) -> Any:
        return super().forward(images[0] if isinstance(images, list) else images)


class StepTimer(Callback):
    """Seconds of the batches of an epoch after the first few, the cached pass before them left out."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM_UP:
            self.began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.perf_counter() - self.began


def ways_for(layers: list[str]) -> dict[str, list[Callback]]:
    return {
        "nothing": [],
        "monitor": [FeatureShiftMonitor(layers)],
        "monitor, every 10th batch": [FeatureShiftMonitor(layers, every_n_batches=10)],
        "relative, live": [FeatureShiftRegularizer(layers)],
        "relative, cached": [FeatureShiftRegularizer(layers, reference="cached", index_key=1, cache_dtype="float16")],
        "L2-SP": [FeatureShiftRegularizer(form="l2_sp")],
        "relative, live, and monitor": [FeatureShiftRegularizer(layers), FeatureShiftMonitor(layers)],
    }


def seconds_of(module: LightningModule, callbacks: list[Callback], data: Any, batch_size: int) -> float:
    timer = StepTimer()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[timer, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=batch_size))
    return timer.seconds


def memory_of(callbacks: list[Callback]) -> float:
    """Megabytes of the reference after a fit; two callbacks share one."""
    for callback in callbacks[:1]:
        owner: Any = (
            callback if isinstance(callback, FeatureShiftRegularizer) else getattr(callback, "comparison", None)
        )
        state = owner.reference.state()
        tensors = [tensor for part in state.values() if isinstance(part, dict) for tensor in part.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20)
    add_efforts(parser)
    arguments = parser.parse_args()
    if arguments.moment:
        arguments.turns, arguments.steps = 1, 2
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32\n")
    for name, (layers, size, batch_size) in list(CASES.items())[: 1 if arguments.quick or arguments.moment else None]:
        torch.manual_seed(0)
        module = Indexed(name, num_classes=10)
        count = (arguments.steps + WARM_UP) * batch_size
        data: Any = IndexedDataset(TensorDataset(torch.randn(count, 3, size, size), torch.arange(count) % 10))
        ways = ways_for(layers)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        memory = {}
        for _ in range(arguments.turns):
            for way, callbacks in ways.items():
                made = copy.deepcopy(callbacks)
                seconds[way].append(seconds_of(copy.deepcopy(module), made, data, batch_size))
                memory[way] = memory_of(made)
        step = 1000 * statistics.median(seconds["nothing"]) / arguments.steps
        print(f"{name}, {size} x {size}, batch {batch_size}: {step:.1f} ms a step, {len(layers)} layers\n")
        print("| with | time of a step, as a ratio | half of them | reference (MB) |\n|---|---|---|---|")
        for way in ways:
            ratios = [a / b for a, b in zip(seconds[way], seconds["nothing"], strict=True)]
            low, middle, high = statistics.quantiles(ratios) if len(ratios) > 1 else [ratios[0]] * 3
            print(f"| {way} | {middle:.2f} | {low:.2f} to {high:.2f} | {memory[way]:.1f} |", flush=True)
        print()


if __name__ == "__main__":
    main()
