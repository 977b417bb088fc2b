"""Run a network over a data set in the middle of a fit, without a trace.

Eval mode, no gradient, the order of the data set, each sample once over all processes; the random numbers, the
BatchNorm statistics and what the training has logged stay as they are.
"""

import itertools
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_feat.joints.data.samplers import is_plain, processes_share, sampler_of
from lightning_feat.joints.features.batches import inputs_of

Forward: TypeAlias = Callable[[LightningModule, Any], Any]


def forward_inputs(module: LightningModule, batch: Any) -> Any:
    """The usual forward pass: ``module(inputs)``, with the first entry of a tuple or list, or with the whole batch."""
    return module(inputs_of(batch))


def clean_loader(trainer: Trainer, loader: Any, name: str) -> DataLoader[Any]:
    """A loader of this process's share of the same data: in the order of the data set, nothing left out, nothing
    repeated.

    Batch size, collation and workers are those of ``loader``. Process r of W takes the samples r, r + W, r + 2 W, ...;
    or all, where each process has data of its own (``processes_share``).

    Args:
        trainer: knows the processes.
        loader: a ``DataLoader`` over a map-style data set.
        name: of the loader, for errors.

    Raises:
        ValueError: if it is something else: then the samples of a process cannot be told. Under FSDP2 also where the
            shares are uneven: there the processes must run in step.
    """
    loader = loader[0] if isinstance(loader, list) and len(loader) == 1 else loader
    if loader is None:
        raise ValueError(
            f"there are no {name} data yet: give the Trainer some, and where the first validation comes late leave its "
            "sanity check on (num_sanity_val_steps)."
        )
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        what = type(loader).__name__ if not isinstance(loader, DataLoader) else "a DataLoader over an IterableDataset"
        raise ValueError(
            f"a pass over the {name} data needs one DataLoader over a map-style data set, got {what}: choose the "
            "online mode of a monitor that has one, which sees the batches as they pass."
        )
    dataset = _drawn_from(loader, name)
    size = len(dataset) if isinstance(dataset, Sized) else 0
    shared = processes_share(trainer, loader)
    if (size % trainer.world_size or not shared) and type(trainer.strategy).__name__ == "ModelParallelStrategy":
        why = f"do not divide by {trainer.world_size} processes" if shared else "are those of one process alone"
        raise ValueError(
            f"under FSDP2 every process must run equally many batches, but {size} samples of the {name} data {why}: "
            "use the online mode."
        )
    split = shared and trainer.world_size > 1
    share = Subset(dataset, range(trainer.global_rank, size, trainer.world_size)) if split else dataset
    return DataLoader(
        share,
        batch_size=None if loader.batch_sampler is None else getattr(loader.batch_sampler, "batch_size", 1),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def _drawn_from(loader: DataLoader[Any], name: str) -> Any:
    """The data set of the loader, or the part of it that its sampler draws from."""
    sampler: Any = sampler_of(loader)
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)  # Lightning wraps those of users
    if isinstance(sampler, SubsetRandomSampler):
        return Subset(loader.dataset, sorted(int(i) for i in sampler.indices))
    if is_plain(sampler):
        first = len(sampler.data_source)
        return loader.dataset if first == len(loader.dataset) else Subset(loader.dataset, range(first))  # type: ignore[arg-type]
    if loader.batch_sampler is not None and not isinstance(sampler, (WeightedRandomSampler, DistributedSampler)):
        raise ValueError(
            f"a pass over the {name} data cannot tell which examples a {type(sampler).__name__} leaves out: give the "
            f"{type(loader).__name__} a torch.utils.data.Subset in place of such a sampler."
        )
    return loader.dataset


@contextmanager
def without_trace(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Eval mode and no gradient; the random number generators and every train or eval flag are put back at the end.

    ``no_grad`` and not ``inference_mode``: tensors made under the latter cannot be updated in place later.
    """
    modes = [(part, part.training) for part in module.modules()]
    stage = trainer.state.stage
    try:
        trainer.state.stage = RunningStage.VALIDATING  # a hook of the module that mixes training batches asks for it
        module.eval()
        with isolate_rng(), torch.no_grad():
            yield
    finally:
        trainer.state.stage = stage
        for part, training in modes:
            part.training = training


def is_last_epoch(trainer: Trainer) -> bool:
    """Whether no epoch follows the one that ends: by ``max_epochs``, ``max_steps``, or a callback that stopped it."""
    by_steps = 0 <= trainer.max_steps <= trainer.global_step
    epochs = trainer.current_epoch + 1
    may_stop = epochs >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
    return epochs == trainer.max_epochs or by_steps or (trainer.should_stop and may_stop)


def clean_batches(trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of ``loader`` as the module gets them from Lightning: converted, transferred, on its device.

    Under ``fast_dev_run`` as many as that says; limits such as ``limit_train_batches`` do not count here.
    """
    precision, strategy = trainer.precision_plugin, trainer.strategy
    few = int(getattr(trainer, "fast_dev_run", False)) or None
    for batch in itertools.islice(loader, few):
        yield strategy.batch_to_device(module._on_before_batch_transfer(precision.convert_input(batch)))


def run_forward(trainer: Trainer, module: LightningModule, batch: Any, forward: Forward | None = None) -> Any:
    """What ``forward(module, batch)`` gives in the precision of the trainer; see ``forward_inputs`` for the default."""
    with trainer.precision_plugin.forward_context():
        return (forward or forward_inputs)(module, batch)
