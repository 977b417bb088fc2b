"""What two gloo processes do, for ``test_sharpness_ddp.py``."""

import sys
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

from lightning_feat.callbacks import SharpnessAwareMinimization
from lightning_feat.functional.simplicity_bias import sharpness_step
from tests.helpers import Momentum, points, trainer
from tests.joints import ddp_cases
from tests.joints.ddp_cases import flat

RHO = 0.3


class PerProcess(Momentum):
    """One process with the batches of two: the loss of each half at its own worst point."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, trained, sums = self.optimizers(), [*self.parameters()], None
        for half in (slice(0, None, 2), slice(1, None, 2)):  # as DistributedSampler deals them out
            x, y = (part[half] for part in batch)
            before = [p.detach().clone() for p in trained]
            slopes = torch.autograd.grad(cross_entropy(self(x), y), trained)
            for p, step in zip(trained, sharpness_step(slopes, RHO), strict=True):
                p.data.add_(step)
            slopes = torch.autograd.grad(cross_entropy(self(x), y), trained)
            for p, old in zip(trained, before, strict=True):
                p.data.copy_(old)
            sums = slopes if sums is None else [a + b for a, b in zip(sums, slopes, strict=True)]
        for p, total in zip(trained, sums, strict=True):
            p.grad = total / 2
        optimizer.step()

    def on_train_epoch_end(self):
        self.lr_schedulers().step()


def fit(kind, world, *callbacks):
    pl.seed_everything(0)
    module = kind()
    two = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2} if world == 2 else {}
    with tempfile.TemporaryDirectory() as root:
        run = trainer(Path(root), callbacks=[*callbacks], max_epochs=3, use_distributed_sampler=False, **two)
        data, rank = points(48), run.global_rank if world == 2 else 0
        sampler = DistributedSampler(data, world, rank, shuffle=False)  # Lightning's own would shuffle
        run.fit(module, DataLoader(data, batch_size=8 // world, sampler=sampler))
        return [flat(module), float(run.callback_metrics.get("sharpness/rise", 0.0))]


def joint(world):
    return fit(Momentum, world, SharpnessAwareMinimization(RHO))


def per_process(world):
    if world == 2:
        return fit(Momentum, world, SharpnessAwareMinimization(RHO, scope="per_process"))
    return fit(PerProcess, world)


if __name__ == "__main__":
    ddp_cases.CASES[:] = [joint, per_process]
    ddp_cases.main(Path(sys.argv[1]))
