"""What one process and two gloo processes do, for ``test_averaged_ddp.py``."""

import sys
import tempfile
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy

from lightning_feat.callbacks import (
    FeatureRelianceMonitor,
    FewShotMonitor,
    ForgettingMonitor,
    LinearProbe,
    NeuralCollapseMonitor,
    SharpnessMonitor,
)
from tests.helpers import EMAWeightAveraging, Net, Plain, loader, trainer
from tests.joints import ddp_cases


class Drawn(Plain):
    """The same start, whatever a strategy seeds."""

    def __init__(self):
        super().__init__(lr=0.3)
        pl.seed_everything(3)
        self.net = Net()


def fit(callback, world):
    """Steps of all examples at once, so that their order, and which process has which, makes no difference."""
    two = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2} if world == 2 else {}
    with tempfile.TemporaryDirectory() as root:
        run = trainer(Path(root), callbacks=[EMAWeightAveraging(decay=0.9), callback], max_epochs=3, **two)
        run.fit(Drawn(), loader(32, batch_size=32 // world, shuffle=True), loader(13, batch_size=4))
        shown = {name: float(value) for name, value in run.callback_metrics.items()}
    return {name: value for name, value in sorted(shown.items()) if name != "val/loss"}


def collapse(world):
    return fit(NeuralCollapseMonitor(mode="exact", data="both", weights="averaged"), world)


def current(world):
    return fit(NeuralCollapseMonitor(mode="exact", data="both"), world)


def reliance(world):
    return fit(FeatureRelianceMonitor({"first": 0}, best="linear", weights="averaged"), world)


def few_shots(world):
    return fit(FewShotMonitor(shots=[1], episodes=3, weights="averaged"), world)


def probe(world):
    return fit(LinearProbe(weights="averaged", penalties=[0.1]), world)


def forgetting(world):
    monitor = ForgettingMonitor(weights="averaged")
    shown = fit(monitor, world)
    return {**shown, **{f"{i}": float(value) for i, value in enumerate(monitor.times.first_learned)}}


def sharpness(world):
    return fit(SharpnessMonitor(weights="averaged", max_products=200, tolerance=1e-3), world)


CASES = [collapse, current, reliance, few_shots, probe, forgetting, sharpness]

if __name__ == "__main__":
    ddp_cases.CASES[:] = CASES
    ddp_cases.main(Path(sys.argv[1]))
