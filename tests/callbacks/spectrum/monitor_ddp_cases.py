"""What two gloo processes do, for ``test_monitor_ddp.py``."""

import sys
import tempfile
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_feat.callbacks import SpectrumMonitor
from lightning_feat.callbacks.spectrum.spectrum_pass import OF_MOMENTS, OF_SAMPLE
from tests.helpers import Plain, loader, points, trainer
from tests.joints import ddp_cases


def run(world, size):
    pl.seed_everything(0)
    module = Plain(lr=0.0)
    two = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2} if world == 2 else {}
    monitor = SpectrumMonitor("net.body", measures=[*OF_MOMENTS, *OF_SAMPLE], max_samples=11)
    with tempfile.TemporaryDirectory() as folder:
        of = trainer(Path(folder), callbacks=[monitor], **two)
        of.fit(module, loader(16), DataLoader(points(size), batch_size=4))
    return {name: float(value) for name, value in of.callback_metrics.items() if name.startswith("spectrum")}


def an_odd_number_of_samples(world):
    return run(world, 29)  # the sampler would repeat one


def one_process_without_samples(world):
    return run(world, 1)


if __name__ == "__main__":
    ddp_cases.CASES[:] = [an_odd_number_of_samples, one_process_without_samples]
    ddp_cases.main(Path(sys.argv[1]))
