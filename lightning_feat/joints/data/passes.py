"""Run a network over a data set in the middle of a fit, without a trace.

Eval mode, no gradient, the order of the data set, each sample once over all processes; see ``trace`` for what stays as
it is, and ``ways`` for how the network is run.
"""

import itertools
from collections.abc import Iterator, Sequence, Sized
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_feat.joints.data.calls import Forward, forward_inputs
from lightning_feat.joints.data.samplers import draws_all, is_plain, processes_share, sampler_of
from lightning_feat.joints.data.trace import without_trace
from lightning_feat.joints.data.ways import Ways
from lightning_feat.joints.features.kept import remember_generators
from lightning_feat.joints.features.taps import FeatureTap


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
    loader, dataset, shared = whole_set(trainer, loader, name)
    size = len(dataset) if isinstance(dataset, Sized) else 0
    if (size % trainer.world_size or not shared) and type(trainer.strategy).__name__ == "ModelParallelStrategy":
        why = f"do not divide by {trainer.world_size} processes" if shared else "are those of one process alone"
        raise ValueError(
            f"under FSDP2 every process must run equally many batches, but {size} samples of the {name} data {why}: "
            "use the online mode."
        )
    split = shared and trainer.world_size > 1
    share = Subset(dataset, range(trainer.global_rank, size, trainer.world_size)) if split else dataset
    batch_size = None if loader.batch_sampler is None else getattr(loader.batch_sampler, "batch_size", 1)
    return loader_like(loader, share, batch_size)


def whole_set(trainer: Trainer, loader: Any, name: str) -> tuple[DataLoader[Any], Any, bool]:
    """The one ``DataLoader``, the data set that it draws from, and whether the processes of the run share that.

    Raises:
        ValueError: if it is something else than a ``DataLoader`` over a map-style data set.
    """
    loader = loader[0] if isinstance(loader, list) and len(loader) == 1 else loader
    if loader is None or (isinstance(loader, list) and not loader):
        raise ValueError(f"there are no {name} data: give the Trainer some.")
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        what = "a DataLoader over an IterableDataset" if isinstance(loader, DataLoader) else type(loader).__name__
        what = f"a {what} of {len(loader)}" if isinstance(loader, (list, tuple, dict)) else what
        raise ValueError(
            f"a pass over the {name} data needs one DataLoader over a map-style data set, got {what}: choose the "
            "online mode of a monitor that has one, which sees the batches as they pass."
        )
    return loader, _drawn_from(loader, name), processes_share(trainer, loader)


def _drawn_from(loader: DataLoader[Any], name: str) -> Any:
    """The data set of the loader, or the part of it that its sampler draws from."""
    sampler: Any = sampler_of(loader)
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)  # Lightning wraps those of users
    own_batches = loader.batch_sampler is not None and not hasattr(loader.batch_sampler, "sampler")
    if own_batches:
        sampler = loader.batch_sampler
    if isinstance(sampler, SubsetRandomSampler):
        return Subset(loader.dataset, sorted(int(i) for i in sampler.indices))
    if isinstance(sampler, WeightedRandomSampler):
        return _part(loader.dataset, sampler.weights.nonzero()[:, 0].tolist())
    if is_plain(sampler):
        return _part(loader.dataset, range(len(sampler.data_source)))
    if loader.batch_sampler is None or isinstance(sampler, DistributedSampler) or draws_all(loader, sampler):
        return loader.dataset
    raise ValueError(
        f"a pass over the {name} data cannot tell which examples a {type(sampler).__name__} leaves out: give the "
        f"{type(loader).__name__} a torch.utils.data.Subset in place of such a sampler."
    )


def _part(dataset: Any, indices: Sequence[int]) -> Any:
    return dataset if len(indices) == len(dataset) else Subset(dataset, indices)


def clean_batches(trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of ``loader`` as the module gets them from Lightning: converted, transferred, on its device.

    Under ``fast_dev_run`` as many as that says; limits such as ``limit_train_batches`` do not count here.
    """
    precision, strategy = trainer.precision_plugin, trainer.strategy
    few = int(getattr(trainer, "fast_dev_run", False)) or None
    put_back = remember_generators(loader.dataset, loader.collate_fn)  # without workers they are those of the training
    try:
        for batch in itertools.islice(loader, few):
            yield strategy.batch_to_device(module._on_before_batch_transfer(precision.convert_input(batch)))
    finally:
        put_back()


def run_forward(trainer: Trainer, module: LightningModule, batch: Any, forward: Forward | None = None) -> Any:
    """What ``forward(module, batch)`` gives in the precision of the trainer; see ``forward_inputs`` for the default."""
    with trainer.precision_plugin.forward_context():
        return (forward or forward_inputs)(module, batch)


def try_first_batch(
    trainer: Trainer,
    module: LightningModule,
    clean: DataLoader[Any],
    name: str,
    ways: Ways,
    taps: Sequence[FeatureTap],
    foreign: bool = False,
) -> Any:
    """Run the network on the first batch of ``clean``, without a trace, to find out how, and to fail now if at all.

    Args:
        trainer: knows the precision.
        module: the module.
        clean: what ``clean_loader`` gives.
        name: of the data, for ``ways``.
        ways: gets to know the way.
        taps: attached to the module, what they hear must be features.
        foreign: see ``Ways.find``.

    Returns:
        The batch, as the module gets it; None where this process has no sample.

    Raises:
        ValueError: see ``find_way``; and what a ``forward`` that is given raises.
    """
    size = clean.batch_size or 1
    some = range(min(size, len(clean.dataset)))  # type: ignore[arg-type]
    # One worker at most; but one where there are any: a data set may open files in the process that first reads it.
    few = loader_like(clean, Subset(clean.dataset, some), clean.batch_size, min(1, clean.num_workers))
    with without_trace(trainer, module):
        for batch in clean_batches(trainer, module, few):
            way = ways.find(trainer, module, batch, name, taps, foreign)
            if ways.forward is not None:
                hear(trainer, module, batch, taps, way)
            return batch
    return None


def hear(
    trainer: Trainer, module: LightningModule, batch: Any, taps: Sequence[FeatureTap], way: Forward
) -> list[Tensor]:
    """Run the network and take what each tap has heard. Raises what ``FeatureTap.take`` raises."""
    for tap in taps:
        tap.listen()
    try:
        run_forward(trainer, module, batch, way)
        return [tap.take() for tap in taps]
    finally:
        for tap in taps:
            tap.drop()


def loader_like(
    clean: DataLoader[Any], dataset: Any, batch_size: int | None, num_workers: int | None = None
) -> DataLoader[Any]:
    """A loader of other samples, in their order, by the collation and the workers of ``clean``."""
    workers = clean.num_workers if num_workers is None else num_workers
    return DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=clean.collate_fn,
        num_workers=workers,
        pin_memory=clean.pin_memory,
        worker_init_fn=clean.worker_init_fn,
        multiprocessing_context=clean.multiprocessing_context if workers else None,
    )
