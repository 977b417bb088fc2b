"""A copy of a run, to be tried and thrown away: the user's module, trainer, data and files stay as they are.

Trainer, callbacks, module, datamodule and loaders are copied together. Shared are the data sets, whose random numbers
are put back. Loggers are replaced by silent ones, what writes checkpoints or draws progress is left out, and what the
rest writes goes into a folder that is removed. Several processes become one: their collectives are not tried.

Which attributes of Lightning are private was seen in 2.5 and 2.6.
"""

import contextlib
import copy
import functools
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.distributed
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    LearningRateFinder,
    ModelSummary,
    ProgressBar,
)
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_feat.doctor.held import held_by, set_state, state_of

# They write, or search, or end the run for reasons of their own. What those that wait for a metric wait for is checked.
LEFT_OUT = (Checkpoint, EarlyStopping, ProgressBar, ModelSummary, LearningRateFinder, BatchSizeFinder)


@dataclass
class Run:
    """What the user would call ``fit`` with."""

    trainer: Trainer
    module: LightningModule
    train_dataloaders: Any = None
    val_dataloaders: Any = None
    datamodule: LightningDataModule | None = None

    def __post_init__(self) -> None:
        if type(self.module).__name__ == "OptimizedModule":
            self.module = self.module._orig_mod  # type: ignore[assignment, unreachable]
        if isinstance(self.train_dataloaders, LightningDataModule):
            self.datamodule, self.train_dataloaders = self.train_dataloaders, None

    @property
    def callbacks(self) -> list[Callback]:
        """Those of the trainer, in their order."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return callbacks

    @property
    def num_processes(self) -> int:
        """Processes that the run will have."""
        return self.trainer.num_devices * self.trainer.num_nodes


@dataclass
class Trial:
    """A copy of a run.

    Attributes:
        callbacks: the copies, by the position of the originals.
    """

    trainer: Trainer
    module: LightningModule
    data: dict[str, Any]
    callbacks: dict[int, Callback] = field(default_factory=dict)

    def fit(self) -> None:
        """Run it, by PyTorch as it is: what was compiled runs uncompiled."""
        with torch.compiler.set_stance("force_eager"):
            self.trainer.fit(self.module, **self.data)


class SilentLogger(DummyLogger):
    """Takes everything and keeps nothing."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    @property
    def save_dir(self) -> str:
        return self.folder


def make_trial(
    run: Run, folder: str, batches: int, order: Sequence[int], first: Sequence[Callback], last: Sequence[Callback]
) -> Trial:
    """Copy ``run``.

    Args:
        run: what to copy.
        folder: for what callbacks write.
        batches: of a pass over data, where one is needed.
        order: which callbacks to keep, by position, in the order they shall have.
        first: callbacks to add before them.
        last: callbacks to add behind them.
    """
    trainer = run.trainer
    memo: dict[int, Any] = {}
    for part in held_by([*run.callbacks, run.datamodule, run.module, run.train_dataloaders, run.val_dataloaders]):
        if isinstance(part, Dataset) and not isinstance(part, IterableDataset):
            memo[id(part)] = part
    for logger in trainer.loggers:
        memo[id(logger)] = SilentLogger(folder)
    memo[id(trainer.profiler)] = PassThroughProfiler()  # type: ignore[attr-defined]
    stale: list[Any] = [trainer.fit_loop._combined_loader, trainer.fit_loop._data_fetcher]  # of an earlier run
    stale += [loop._combined_loader for loop in _evaluation_loops(trainer)]
    memo |= {id(old): None for old in stale if old is not None}
    memo[id(trainer.strategy)] = _one_process(trainer, memo)
    for position, callback in enumerate(run.callbacks):
        if position not in order:
            memo[id(callback)] = Callback()
    for part in held_by([*run.callbacks, run.datamodule, run.module, run.train_dataloaders, run.val_dataloaders]):
        if isinstance(part, DataLoader) and id(part) not in memo:
            memo[id(part)] = _copied_loader(part, memo)
    copied, module, train, val, datamodule, copies = copy.deepcopy(
        (trainer, run.module, run.train_dataloaders, run.val_dataloaders, run.datamodule, list(run.callbacks)), memo
    )
    _run_the_copy(module, memo)
    kept = {position: copies[position] for position in order}
    copied.callbacks = [*first, *kept.values(), *last]  # type: ignore[attr-defined]
    for part in held_by([*kept.values(), datamodule]):
        if isinstance(part, LightningDataModule):
            part.prepare_data = _nothing  # type: ignore[method-assign]  # it may download
    _shorten(copied, folder, batches)
    if isinstance(copied.limit_train_batches, float):  # so many batches, and steps of a schedule, has one process
        copied.limit_train_batches /= run.num_processes
    data = {"train_dataloaders": train, "val_dataloaders": val, "datamodule": datamodule}
    return Trial(copied, module, {key: value for key, value in data.items() if value is not None}, kept)


@contextlib.contextmanager
def without_a_trace(run: Run) -> Iterator[tuple[str, list[warnings.WarningMessage]]]:
    """A folder that is removed at the end, and the warnings of the block. Nothing is printed; random numbers, the
    environment, gradient mode and process group are put back.

    Raises:
        LedBack: where a copy of the module runs the layers of the module itself.
    """
    generators = list(held_by([run.train_dataloaders, run.val_dataloaders, run.datamodule, *run.callbacks], deep=True))
    states = [(part, state_of(part)) for part in generators if state_of(part) is not None]
    environment, grad = dict(os.environ), torch.is_grad_enabled()
    in_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    handles = [part.register_forward_pre_hook(_led_back) for part in run.module.modules()]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(isolate_rng())
        seen = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield folder, seen
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            for handle in handles:
                handle.remove()
            if not in_group and torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            torch.set_grad_enabled(grad)
            os.environ.clear()
            os.environ.update(environment)
            for part, state in states:
                set_state(part, state)


def _shorten(trainer: Trainer, folder: str, batches: int) -> None:
    """Only what leaves schedules as they are: ``max_epochs`` and the number of training batches stay."""
    trainer._default_root_dir = folder  # type: ignore[attr-defined]
    trainer.fast_dev_run = max(batches, 2)  # type: ignore[attr-defined]  # callbacks write nothing, and look at few batches
    trainer.num_sanity_val_steps = 0
    trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None  # type: ignore[misc]
    if trainer.limit_val_batches:
        few = trainer.limit_val_batches if isinstance(trainer.limit_val_batches, int) else batches
        trainer.limit_val_batches = min(few, batches)
    if trainer.check_val_every_n_epoch is not None:
        trainer.check_val_every_n_epoch = 1


def _one_process(trainer: Trainer, memo: dict[int, Any]) -> Strategy:
    """The strategy of the run on one of its devices."""
    strategy: Any = trainer.strategy
    precision: Any = copy.deepcopy(strategy.precision_plugin, memo)
    accelerator = copy.deepcopy(strategy.accelerator, memo)
    if isinstance(strategy, ModelParallelStrategy):
        sharded = ModelParallelStrategy(1, 1)
        sharded._process_group_backend = getattr(strategy, "_process_group_backend", None)
        sharded.accelerator, sharded.precision_plugin = accelerator, precision
        sharded.parallel_devices = [strategy.root_device]
        sharded.cluster_environment = LightningEnvironment()
        return sharded
    if isinstance(strategy, ParallelStrategy):
        name = type(strategy).__name__
        if type(precision).__name__.startswith(("FSDP", "DeepSpeed")):
            precision = Precision()  # theirs need their own wrappers of the module
        # By its name callbacks tell what they cannot work with.
        return type(name, (SingleDeviceStrategy,), {})(strategy.root_device, accelerator, None, precision)  # type: ignore[no-any-return]
    if type(strategy) is SingleDeviceStrategy:
        return SingleDeviceStrategy(strategy.root_device, accelerator, None, precision)
    copied: Strategy = copy.deepcopy(strategy, memo)
    return copied


def _copied_loader(loader: DataLoader[Any], memo: dict[int, Any]) -> DataLoader[Any]:
    """The same loader over the same data, with samplers and generators of its own."""
    copied = copy.copy(loader)
    for name in ("generator", "sampler", "batch_sampler", "collate_fn"):
        copied.__dict__[name] = copy.deepcopy(loader.__dict__[name], memo)
    if isinstance(loader.dataset, IterableDataset):
        copied.__dict__["dataset"] = copy.deepcopy(loader.dataset, memo)
    copied._iterator = None  # type: ignore[assignment]
    return copied


def _run_the_copy(copied: nn.Module, memo: dict[int, Any]) -> None:
    """Where a method was put on a part, let that of the copy work with the copy; compiled ones stay uncompiled."""
    for part in copied.modules():
        for key, hook in list(part._forward_pre_hooks.items()):
            if hook is _led_back:
                del part._forward_pre_hooks[key]
        for name, value in list(vars(part).items()):
            method = getattr(value, "_torchdynamo_orig_callable", None)
            if isinstance(method, MethodType) and id(method.__self__) in memo:
                part.__dict__[name] = MethodType(method.__func__, memo[id(method.__self__)])
            if isinstance(value, MethodType) and isinstance(value.__func__, functools.partial):
                # The configure_optimizers of LightningCLI, which keeps its optimizer in a partial that is not copied.
                part.__dict__[name] = MethodType(copy.deepcopy(value.__func__, memo), value.__self__)
    if getattr(copied, "_compiler_ctx", None) is not None:
        copied.__dict__["_compiler_ctx"] = None


class LedBack(RuntimeError):
    """A copy of the module ran the module itself."""


def _led_back(part: nn.Module, args: Any) -> None:
    raise LedBack(
        f"a copy of the module runs the layers of the module itself ({type(part).__name__}), as it does through a "
        "function that was made around them"
    )


def _evaluation_loops(trainer: Trainer) -> list[Any]:
    return [trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop]


def _nothing() -> None:
    """In place of ``prepare_data``."""
