"""What one process and two gloo processes do, for ``test_probes_ddp.py``."""

import sys
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks import (
    DistributionalSimplicityMonitor,
    FeatureRelianceMonitor,
    ForgettingMonitor,
    SharpnessMonitor,
)
from tests.helpers import Plain, points, trainer
from tests.joints import ddp_cases


class Still(Plain):
    """The same network on one process and on two: what is measured has one right value."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(callback, world, size=43, classes=3, module=Still, **options):
    """An odd number of examples: one process has one more."""
    pl.seed_everything(0)
    module = module()
    x, y = points(size).tensors
    data = TensorDataset(x, y.clamp(max=classes - 1))
    two = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2} if world == 2 else {}
    with tempfile.TemporaryDirectory() as root:
        run = trainer(Path(root), callbacks=[callback], max_epochs=2, **{**two, **options})
        run.fit(module, DataLoader(data, batch_size=4, shuffle=True), DataLoader(data, batch_size=4))
        shown = {name: float(value) for name, value in run.callback_metrics.items()}
    return {name: value for name, value in sorted(shown.items()) if name != "val/loss"}


def clones(world):
    return fit(DistributionalSimplicityMonitor(num_examples=40), world)


def clones_of_few(world):
    return fit(DistributionalSimplicityMonitor(num_examples=1, data="val"), world)


def reliance(world):
    return fit(FeatureRelianceMonitor({"first": 0, "rest": "1:"}, best="linear", repeats=2), world)


class TwoClasses(Still):
    def __init__(self):
        super().__init__()
        self.net.fc = torch.nn.Linear(8, 2)


def reliance_of_two_classes(world):
    return fit(FeatureRelianceMonitor({"first": 0}), world, classes=2, module=TwoClasses)


def reliance_of_few(world):
    return fit(FeatureRelianceMonitor({"first": 0}), world, size=3)


def sharpness(world):
    return fit(SharpnessMonitor(num_examples=40, max_products=200, tolerance=1e-3), world)


def sharpness_of_few(world):
    return fit(SharpnessMonitor(num_examples=1, max_products=200, tolerance=1e-3), world)


def forgetting(world):
    monitor = ForgettingMonitor()
    shown = fit(monitor, world)
    return {**shown, **{f"{i}": float(value) for i, value in enumerate(monitor.times.first_learned)}}


if __name__ == "__main__":
    ddp_cases.CASES[:] = [clones, clones_of_few, reliance, reliance_of_two_classes, reliance_of_few]
    ddp_cases.CASES += [sharpness, sharpness_of_few, forgetting]
    ddp_cases.main(Path(sys.argv[1]))
