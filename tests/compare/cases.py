"""Arms of a second each, which other processes can import."""

import os
import signal
import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Tiny(LightningModule):
    """A linear classifier of three classes in the plane."""

    def __init__(self, lr=0.1, width=2):
        super().__init__()
        self.network = nn.Linear(2, 3)
        self.lr = lr

    def loss_of(self, batch):
        inputs, targets = batch
        logits = self.network(inputs)
        return nn.functional.cross_entropy(logits, targets), (logits.argmax(1) == targets).float().mean()

    def training_step(self, batch, batch_idx):
        return self.loss_of(batch)[0]

    def validation_step(self, batch, batch_idx):
        loss, accuracy = self.loss_of(batch)
        self.log("val/loss", loss)
        self.log("val/accuracy", accuracy)

    def test_step(self, batch, batch_idx):
        self.log("test/accuracy", self.loss_of(batch)[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def loaders(samples=48):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(samples) % 3
    inputs = torch.randn(samples, 2, generator=generator) + nn.functional.one_hot(targets, 3)[:, :2]
    data = TensorDataset(inputs, targets)
    return DataLoader(data, batch_size=8, shuffle=True), DataLoader(data, batch_size=16)


def trainer(*callbacks, epochs=2):
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def base():
    return trainer(), Tiny(), loaders()


def faster():
    return trainer(), Tiny(lr=0.5), loaders()


class Draws(Callback):
    """Draws a random number before the data is asked for, as a new head would."""

    def setup(self, trainer, pl_module, stage):
        torch.rand(1)


def draws():
    return trainer(Draws()), Tiny(), loaders()


class DrawsAlways(Callback):
    def on_train_batch_end(self, *args):
        torch.rand(1)


def draws_always():
    return trainer(DrawsAlways()), Tiny(), loaders()


def other_weights():
    torch.rand(1)
    return base()


def fewer():
    return trainer(), Tiny(), loaders(24)


class Fails(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        raise FloatingPointError("the loss is nan")


def fails_with_seed_1(seed):
    return trainer(*([Fails()] if seed == 1 else [])), Tiny(), loaders()


def cannot_be_built():
    raise KeyError("no such network")


def gives_nothing():
    return None


class Killed(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGKILL)


def killed_with_seed_1(seed):
    return trainer(*([Killed()] if seed == 1 else [])), Tiny(), loaders()


class Slow(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        time.sleep(0.4)


def slow_base():
    return trainer(Slow(), epochs=3), Tiny(), loaders()


def slow_faster():
    return trainer(Slow(), epochs=3), Tiny(lr=0.5), loaders()
