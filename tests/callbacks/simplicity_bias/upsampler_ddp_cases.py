"""What two gloo processes do, for ``test_upsampler_ddp.py``."""

import sys
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks import DataPlan, SimplicityBiasUpsampler
from tests.helpers import points, trainer
from tests.joints import ddp_cases
from tests.joints.ddp_cases import Momentum, flat

SIZE = 43  # odd: one process has an example more


class Still(Momentum):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Blind(Still):
    """Trains on finite numbers, whatever the data are."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x.nan_to_num(), y), batch_idx)


def fit(module, callback, world, data=None):
    pl.seed_everything(0)
    module = module()
    two = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2} if world == 2 else {}
    with tempfile.TemporaryDirectory() as root:
        run = trainer(Path(root), callbacks=[callback], max_epochs=3, **two)
        run.fit(module, DataLoader(points(SIZE) if data is None else data, batch_size=4, shuffle=True))
    return module


def selected(world, **options):
    upsampler = SimplicityBiasUpsampler(separating_epoch=1, **options)
    fit(Still, upsampler, world)
    found = upsampler.selection
    return [found.slow.tolist(), found.cluster.tolist(), found.targets.tolist()]


def selected_at_random(world):
    return selected(world, choose="random", outputs="features")


def upsampled(world):
    upsampler = SimplicityBiasUpsampler(separating_epoch=2, seed=0)
    module = fit(Momentum, upsampler, world)
    by_hand = fit(Momentum, DataPlan(upsampler.selection.counts()), world)
    return [flat(module), flat(by_hand)]


def weighted(world):
    return flat(fit(Momentum, SimplicityBiasUpsampler(separating_epoch=1, show="weights", restart=False), world))


def diverged(world):
    x, y = points(SIZE).tensors
    x[5] = torch.nan  # the last example of the first process, if of any
    try:
        fit(Blind, SimplicityBiasUpsampler(separating_epoch=1), world, TensorDataset(x, y))
    except ValueError as error:
        return [str(error)]
    return []


if __name__ == "__main__":
    ddp_cases.CASES[:] = [selected, selected_at_random, upsampled, weighted, diverged]
    ddp_cases.main(Path(sys.argv[1]))
