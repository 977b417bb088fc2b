"""The runs in which callbacks are measured: a network, its data in memory, and a fit with a stopwatch.

A fit has two epochs of so many batches, with a validation after each. Nothing is logged to files, saved or shown.
"""

import contextlib
import copy
import functools
import io
import logging
import statistics
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from registry import Task
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from turns import Effort, now, pick

from lightning_feat.baselines import TimmClassifier
from lightning_feat.baselines.clip_classifier import ClipClassifier
from lightning_feat.baselines.clip_pretraining import SmallClipPretraining
from lightning_feat.data import DigitsDataModule

EPOCHS, WARM = 2, 2  # WARM: batches at the start of a fit that do not count
QUIET: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)


class Network(NamedTuple):
    """What a fit trains, and on how much."""

    name: str  # in timm
    channels: int
    batch_size: int
    batches: int  # of an epoch, full size

    def size(self, effort: Effort) -> tuple[int, int]:
        """Samples of a batch, and batches of an epoch."""
        return pick(effort, (self.batch_size, self.batches), (self.batch_size, 3), (8, 2))


DIGITS = Network("test_resnet", 1, 64, 8)
RESNET18 = Network("resnet18", 3, 128, 4)


class Times(NamedTuple):
    """Seconds: of a batch (median), of all epochs, and of the rest of a fit."""

    step: float
    epochs: float
    rest: float


@dataclass
class Watch:
    """Two callbacks around all others."""

    device: str
    steps: list[float] = field(default_factory=list)
    began: float = 0.0
    first: float = 0.0
    ended: float = 0.0

    def ends(self) -> tuple[Callback, Callback]:
        return _First(self), _Last(self)


class _First(Callback):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.watch.first = self.watch.first or now(self.watch.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.watch.began = now(self.watch.device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.watch.ended = now(self.watch.device)


class _Last(Callback):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.watch.steps.append(now(self.watch.device) - self.watch.began)


class Regression(LightningModule):
    """A timm network with two targets and the squared error."""

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        self.network = timm.create_model(name, num_classes=2, in_chans=channels)

    def forward(self, images: Tensor) -> Tensor:
        values: Tensor = self.network(images)
        return values

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


@functools.cache
def module_of(network: Network, task: Task) -> LightningModule:
    """To copy before it is trained."""
    torch.manual_seed(0)
    if task == "regression":
        return Regression(network.name, network.channels)
    return small_clip() if task == "clip" else TimmClassifier(network.name, 10, in_chans=network.channels)


def small_clip() -> LightningModule:
    """Ten class names against images of 32 x 32; the image tower trains, the text tower is frozen."""
    names = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    trained = SmallClipPretraining([*names, "a", "photo", "of"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.ckpt"
        torch.save({"hyper_parameters": dict(trained.hparams), "state_dict": trained.state_dict()}, path)
        return ClipClassifier(names, source="small", model=str(path), trainable=["visual"])


@functools.cache
def loaders_of(network: Network, task: Task, effort: Effort) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Batches of images, targets and indices in memory: digits, or noise of three channels."""
    batch_size, batches = network.size(effort)
    size = batch_size * (batches + 1)
    generator = torch.Generator().manual_seed(0)
    if network.channels == 1 and task == "classes":
        digits = DigitsDataModule(image_size=32)
        digits.setup()
        images = torch.stack([torch.as_tensor(digits.train_set[i][0]) for i in range(size)])
        targets = digits.train_set.targets[:size]
    else:
        images = torch.randn(size, 3 if task == "clip" else network.channels, 32, 32, generator=generator)
        targets = torch.arange(size) % 10
    if task == "regression":
        targets = torch.randn(size, 2, generator=generator)
    data = TensorDataset(images, targets, torch.arange(size))
    train, val = (
        torch.utils.data.Subset(data, range(*ends)) for ends in ((0, size - batch_size), (size - batch_size, size))
    )
    return DataLoader(train, batch_size, shuffle=True), DataLoader(val, batch_size)


def fit(
    network: Network,
    task: Task,
    callbacks: list[Callback],
    effort: Effort,
    device: str,
    around: "contextlib.AbstractContextManager[Any] | None" = None,
) -> Times:
    """Train a copy of the network, with something ``around`` the training."""
    torch.manual_seed(0)
    watch = Watch(device)
    first, last = watch.ends()
    with quietly(), tempfile.TemporaryDirectory() as folder:
        module, (train, val) = copy.deepcopy(module_of(network, task)), loaders_of(network, task, effort)
        began = now(device)
        trainer = Trainer(
            max_epochs=EPOCHS,
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            callbacks=[first, *callbacks, last],
            num_sanity_val_steps=0,
            default_root_dir=folder,
            **QUIET,
        )
        with around or contextlib.nullcontext():
            trainer.fit(module, train, val)
        ended = now(device)
    whole = watch.ended - watch.first
    return Times(statistics.median(watch.steps[WARM:] or watch.steps), whole, ended - began - whole)


@contextlib.contextmanager
def quietly() -> Any:
    """Without the warnings of Lightning and the tables of callbacks."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
