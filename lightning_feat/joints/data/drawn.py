"""Some examples of a data set, drawn by a seed: a bounded number of them, or each beside another one."""

import random
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Subset

from lightning_feat.joints.data.passes import clean_batches, loader_like, whole_set
from lightning_feat.joints.data.samplers import batch_size_of
from lightning_feat.joints.data.trace import without_trace


def drawn_batches(trainer: Trainer, module: LightningModule, loader: Any, name: str, size: int, seed: int) -> list[Any]:
    """Batches of at most ``size`` examples, drawn at random, as the module gets them but in the memory of the host.

    Where the processes share the data all have the same batches, random augmentation included. Each of the network's
    passes over them sees the same numbers. The random numbers of the run stay as they are.
    """
    loader, dataset, _ = whole_set(trainer, loader, name)
    with isolate_rng(), without_trace(trainer, module):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed % 2**32)  # noqa: NPY002  # all there are
        chosen = torch.randperm(len(dataset))[:size].tolist()
        batch_size = _batch_size(loader)
        if batch_size is not None:  # several batches, which the processes share out
            batch_size = min(batch_size, max(1, -(-len(chosen) // trainer.world_size)))
        few = loader_like(loader, Subset(dataset, chosen), batch_size)
        return [move_data_to_device(batch, "cpu") for batch in clean_batches(trainer, module, few)]


def paired_loader(trainer: Trainer, loader: Any, name: str, seed: int) -> DataLoader[Any]:
    """This process's share of the data, each example followed by the one that a random order of all puts in its place:
    the batches hold both. All examples of the data are in the order, those of other processes too.
    """
    loader, dataset, shared = whole_set(trainer, loader, name)
    size = len(dataset)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    first, step = (trainer.global_rank, trainer.world_size) if shared else (0, 1)
    pairs = [index for i in range(first, size, step) for index in (i, order[i])]
    batch_size = _batch_size(loader)
    if batch_size is None:
        raise ValueError(
            f"the loader of the {name} data makes no batches of examples (batch_size=None), so that no example can be "
            "put beside another: give it a batch_size."
        )
    return loader_like(loader, Subset(dataset, pairs), 2 * batch_size)


def _batch_size(loader: DataLoader[Any]) -> int | None:
    return None if loader.batch_sampler is None else batch_size_of(loader) or 1
