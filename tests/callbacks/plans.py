"""What the tests of plans share: a plan, a module that notes what it sees, and a fit."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_feat.data import IndexedDataset, PlanSampler
from tests.helpers import Plain, points, trainer

SIZE = 7
COUNTS = {0: None, 1: [2, 0, 1, 1, 1, 3, 1], 2: [2, 0, 1, 1, 1, 3, 1], 3: torch.tensor([1, 1, 1, 1, 0, 0, 0])}


def plan(epoch):
    return COUNTS.get(epoch)


def indexed(batch_size=2, **kwargs):
    return DataLoader(IndexedDataset(points(SIZE)), batch_size=batch_size, shuffle=True, **kwargs)


class Seeing(Plain):
    """Notes the index of each example it trains on, by epoch."""

    def __init__(self, unpack=lambda batch: batch, **kwargs):
        super().__init__(**kwargs)
        self.unpack, self.seen = unpack, {}

    def training_step(self, batch, batch_idx):
        example, index = self.unpack(batch)
        self.seen.setdefault(self.current_epoch, []).extend(index.tolist())
        return super().training_step(example, batch_idx)


def planned(epoch, **kwargs):
    sampler = PlanSampler(plan(epoch) if plan(epoch) is not None else [1] * SIZE, **kwargs)
    sampler.set_epoch(epoch)
    return list(sampler)


def fit(tmp_path, module, *callbacks, loaders=None, ckpt_path=None, **kwargs):
    kwargs = {"max_epochs": 4, **kwargs}
    run = trainer(tmp_path, callbacks=list(callbacks), **kwargs)
    if isinstance(loaders, pl.LightningDataModule):
        run.fit(module, datamodule=loaders, ckpt_path=ckpt_path)
    else:
        run.fit(module, loaders, ckpt_path=ckpt_path)
    return run


class Hook(Seeing):
    def train_dataloader(self):
        return indexed()


class SaveAt(pl.Callback):
    def __init__(self, path, epoch, batch_idx):
        self.path, self.at = path, (epoch, batch_idx)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            trainer.save_checkpoint(self.path)


class Warm(Seeing):
    """Its scheduler asks for the length of the run before the checkpoint is restored."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=max(1, int(steps)))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]
