"""What two gloo processes do, for ``test_mixup_ddp.py``."""

import sys
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks import MixupGeometryMonitor
from tests.helpers import Plain, trainer
from tests.joints import ddp_cases


def measures(world):
    """Two classes of identical samples, and shares that lie evenly about a half.

    Every draw of pairs of two classes then gives the same; of one class, which of the two it is remains chance.
    """
    pl.seed_everything(0)
    module = Plain(lr=0.0)
    x = torch.randn(2, 4)
    targets = torch.arange(11) // 2 % 2  # odd: one process has a sample more
    two = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2} if world == 2 else {}
    monitor = MixupGeometryMonitor(data="train", shares=(0.2, 0.4, 0.6, 0.8), num_pairs=9)
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(Path(folder), callbacks=[monitor], **two)
        run.fit(module, DataLoader(TensorDataset(x[targets], targets), batch_size=4))
    return {name: float(value) for name, value in run.callback_metrics.items() if "mixup" in name}


if __name__ == "__main__":
    ddp_cases.CASES[:] = [measures]
    ddp_cases.main(Path(sys.argv[1]))
