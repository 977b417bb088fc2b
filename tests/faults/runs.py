"""Short runs with the callbacks of all pillars that end where they are told to, for ``stage``."""

import json
import os
import random
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec.implementations.local as local_files
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

from lightning_feat.callbacks import (
    DataPlan,
    GrassmannHead,
    GrassmannMonitor,
    LinearProbe,
    MetricHistory,
    MixupGeometryMonitor,
    NeuralCollapseMonitor,
    NeuralCollapseRegularizer,
    SimplicityBiasUpsampler,
)
from tests.helpers import WIDTH, Net, points

SIZE, BATCH, EPOCHS = 46, 8, 3
BATCHES = 6  # of an epoch
COUNTS = [2] * 2 + [1] * (SIZE - 2)  # 48 examples, six batches again


class Learner(pl.LightningModule):
    """A small network with batch statistics and momentum, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.net.body.append(nn.BatchNorm1d(WIDTH))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


class Series(Logger):
    """Every value that was logged, with its name and step, a line each, written at once."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    name, version = "series", 0

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with (self.folder / "series.jsonl").open("a") as file:
            file.writelines(f"{json.dumps([name, step, repr(value)])}\n" for name, value in metrics.items())


def series(folder: Path) -> dict[tuple[str, int], list[str]]:
    """By name and step, the values in the order in which they were logged: more than one after a resume."""
    found: dict[tuple[str, int], list[str]] = {}
    for line in (folder / "series.jsonl").read_text().splitlines():
        name, step, value = json.loads(line)
        found.setdefault((name, step), []).append(value)
    return found


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class At(pl.Callback):
    """Does something in a hook, when the Trainer comes to it in an epoch and a batch for the n-th time."""

    def __init__(self, hook: str, epoch: int, batch: int, time: int, act: Callable[[], None]) -> None:
        self.where, self.time, self.act, self.came = (epoch, batch), time, act, 0
        setattr(self, hook, self._come)

    def _come(self, trainer: pl.Trainer, *rest: Any) -> None:
        now = trainer.current_epoch, trainer.fit_loop.batch_idx
        if not trainer.sanity_checking and now == self.where:
            self.came += 1
            if self.came == self.time:
                self.act()


def after(calls: int, function: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    """The function, which acts after so many calls."""
    came = []

    def called(*args: Any, **kwargs: Any) -> Any:
        returned = function(*args, **kwargs)
        came.append(1)
        if len(came) == calls:
            act()
        return returned

    return called


def _half_written(write: Callable[..., Any], number: int) -> Callable[..., Any]:
    """Die in writing the n-th checkpoint, with half of it on the disk."""
    came = []

    def called(opener: Any, content: bytes) -> Any:
        if getattr(opener, "temp", None) is not None:
            came.append(1)
            if len(came) == number:
                write(opener, content[: len(content) // 2])
                opener.f.flush()
                kill_myself()
        return write(opener, content)

    return called


def _half_moved(number: int) -> Callable[..., Any]:
    """Die in moving the n-th checkpoint into its place, as where that lies on another disk: the move is a copy."""
    came = []

    def commit(opener: Any) -> None:
        opener.f.close()
        came.append(1)
        content = Path(opener.temp).read_bytes()
        if len(came) == number:
            Path(opener.path).write_bytes(content[: len(content) // 2])
            kill_myself()
        Path(opener.path).write_bytes(content)

    return commit


def deadly(place: str | None) -> tuple[list[pl.Callback], list[Any]]:
    """Callbacks and patches that kill the process at a place by its name."""
    hooks = {
        "first batch": ("on_train_batch_end", 0, 1, 1),
        "mid-epoch": ("on_train_batch_end", 1, 3, 1),
        "mid-epoch, later": ("on_train_batch_end", 1, 4, 1),
        "mid-epoch, after the restart": ("on_train_batch_end", 1, 3, 2),
        "first batch after the restart": ("on_train_batch_start", 0, 0, 2),
        "validation": ("on_validation_batch_start", 1, 5, 1),
        "after the last epoch": ("on_train_epoch_end", 2, 5, 1),
    }
    if place in hooks:
        return [At(*hooks[place], kill_myself)], []
    from lightning_feat.callbacks.simplicity_bias import slow_pass, upsampler
    from lightning_feat.joints.data import shared_pass

    opener = local_files.LocalFileOpener
    patches = {
        None: [],
        "pass of a monitor": [(shared_pass, "run_forward", after(5, shared_pass.run_forward, kill_myself))],
        "pass of the selection": [(slow_pass, "hear", after(2, slow_pass.hear, kill_myself))],
        "restart": [(upsampler, "begin_again", after(1, upsampler.begin_again, kill_myself))],
        "writing a checkpoint": [(opener, "write", _half_written(opener.write, 2))],
        "moving a checkpoint": [(opener, "commit", _half_moved(2))],
    }[place]
    return [], [mock.patch.object(*patch) for patch in patches]


def callbacks(kind: str) -> list[pl.Callback]:
    watching = [NeuralCollapseMonitor(measures=["*"], figures=False), MetricHistory()]
    pillars = [GrassmannHead(2), *watching, NeuralCollapseMonitor(mode="exact", data="val"), GrassmannMonitor()]
    return {
        "bare": lambda: [],
        "monitors": lambda: [
            *watching,
            NeuralCollapseMonitor(mode="exact", data="val"),
            LinearProbe(penalties=[0.1]),
            MixupGeometryMonitor(num_pairs=8),
        ],
        "pillars": lambda: [*pillars, NeuralCollapseRegularizer()],
        "plan": lambda: [*pillars, NeuralCollapseRegularizer(), DataPlan(lambda epoch: COUNTS if epoch else None)],
        "upsampler": lambda: [*pillars, NeuralCollapseRegularizer(), SimplicityBiasUpsampler(separating_epoch=2)],
        "knee": lambda: [SimplicityBiasUpsampler(separating_epoch="knee", restart=False, length="keep")],
    }[kind]()


def fit(
    folder: Path,
    kind: str = "pillars",
    place: str | None = None,
    resume: bool = False,
    by_epoch: bool = True,
    every_n_batches: int | None = None,
    keep: int = -1,
) -> None:
    """Train, from the newest checkpoint in the folder if that is to be resumed; leave weights, series and checkpoints.

    Args:
        folder: for all files.
        kind: of the callbacks.
        place: where to die.
        resume: whether to resume.
        by_epoch: whether an ordinary loader draws an order by the epoch; else by the global random numbers.
        every_n_batches: save after every n-th batch, else after each epoch.
        keep: how many checkpoints.
    """
    pl.seed_everything(random.SystemRandom().randrange(2**31) if resume else 0, verbose=False)
    killers, patches = deadly(place)
    when = {"every_n_train_steps": every_n_batches} if every_n_batches else {"save_on_train_epoch_end": True}
    saver = ModelCheckpoint(folder / "saved", "{step}", save_top_k=keep, monitor="step", mode="max", **when)
    module = Learner()
    run = pl.Trainer(
        default_root_dir=folder,
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        logger=Series(folder),
        log_every_n_steps=1,
        callbacks=[*callbacks(kind), saver, *killers],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = points(SIZE)
    if by_epoch and kind not in ("plan", "upsampler", "knee"):
        loader = DataLoader(data, BATCH, sampler=DistributedSampler(data, num_replicas=1, rank=0))
    else:
        loader = DataLoader(data, BATCH, shuffle=True)
    if resume:
        torch.manual_seed(1)  # of the order that is drawn where a run goes on, for the bare run and ours alike
    for patch in patches:
        patch.start()
    newest = max((folder / "saved").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns) if resume else None
    run.fit(module, loader, DataLoader(points(24, seed=1), BATCH), ckpt_path=newest)
    torch.save([p.detach() for p in [*module.parameters(), *module.buffers()]], folder / "weights.pt")


def pair_member(folder: Path, rank: int, port: int, seconds: float, place: str, fault: str) -> None:
    """One of two processes; the second, at a place, is gone (``dies``) or silent (``sleeps``)."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank)
    )
    import time

    from lightning_feat.callbacks.simplicity_bias import slow_pass
    from lightning_feat.metrics.neural_collapse import NeuralCollapse

    def fail(*_: Any) -> None:
        (folder / "failed").write_text(repr(time.time()))
        if fault == "dies":
            os._exit(3)
        time.sleep(120)

    guilty, patches, watching = rank == 1, [], []
    if place == "mid-epoch":
        watching = [At("on_train_batch_start", 0, 1, 1, fail)] if guilty else []
        watching.append(NeuralCollapseRegularizer())
    elif place == "compute of a monitor":
        watching = [NeuralCollapseMonitor(measures=["cdnv"])]
        patches = [mock.patch.object(NeuralCollapse, "compute", side_effect=fail)]
    elif place == "exact pass":
        watching = [NeuralCollapseMonitor(mode="exact")]
        patches = [mock.patch.object(NeuralCollapse, "start_second_pass", side_effect=fail)]
    elif place == "selection":  # the first process chooses, and tells the others
        guilty = rank == 0
        watching = [SimplicityBiasUpsampler(separating_epoch=1)]
        patches = [mock.patch.object(slow_pass.SlowPass, "_chosen", side_effect=fail)]
    for patch in patches if guilty else []:
        patch.start()
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=seconds))
    run = pl.Trainer(
        default_root_dir=folder,
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        callbacks=watching,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        run.fit(Learner(), DataLoader(points(SIZE), BATCH, shuffle=True))
    except BaseException:
        (folder / "noticed").write_text(repr(time.time()))
        raise
