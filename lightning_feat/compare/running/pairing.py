"""What the runs of one seed share: made so where it can be, and witnessed in any case.

All arms start from one global seed. An arm that draws a random number more than the base, for a new head say, would
then see other batches from there on. So the order of the training data gets a generator of its own from the seed, and
the global generators are seeded anew at each epoch. What the arms really shared is read off hashes of their first
weights, first batches and generators.
"""

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

FIRST_BATCHES = 3


class SharedOrder(Callback):
    """Batches, and the random numbers of each epoch, by the seed of the run alone.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.requests = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning asks here for loaders, wherever they come from: nothing of the user's is patched.
        source: Any = trainer.fit_loop._data_source
        ask = source.dataloader

        def dataloader() -> Any:
            self.requests += 1
            loaders = ask()
            for number, loader in enumerate(_loaders_in(loaders)):
                give_generators(loader, mixed(self.seed, "data", self.requests, number))
            seed_globally(mixed(self.seed, "start", self.requests))  # what is fetched ahead of the first epoch
            return loaders

        source.dataloader = dataloader

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seed_globally(mixed(self.seed, "epoch", trainer.current_epoch))


class Witness(Callback):
    """Hashes of what the runs of a seed should share, in ``fingerprint``, all of it plain values."""

    def __init__(self) -> None:
        self.fingerprint: dict[str, Any] = {"weights": {}, "batches": [], "targets": [], "generators": []}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.fingerprint["weights"]:
            return  # a method that restarts the training
        self.fingerprint["weights"] = {name: hash_of(p) for name, p in pl_module.named_parameters()}
        self.fingerprint["training batches"] = str(trainer.num_training_batches)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch > 0 or len(self.fingerprint["batches"]) >= FIRST_BATCHES:
            return
        leaves = tree_leaves(batch)
        whole = [leaf for leaf in leaves if not isinstance(leaf, Tensor) or not leaf.is_floating_point()]
        self.fingerprint["batches"].append(hash_of(*leaves))
        self.fingerprint["targets"].append(hash_of(*whole) if whole else "")
        self.fingerprint["generators"].append(hash_of(torch.get_rng_state()))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and not trainer.sanity_checking:
            seen = self.fingerprint.setdefault("validation", {"batches": str(trainer.num_val_batches)})
            seen.setdefault(str(dataloader_idx), hash_of(*tree_leaves(batch)))  # of the first validation


def mixed(*parts: Any) -> int:
    """A seed from all of them."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big")


def hash_of(*values: Any) -> str:
    """Of the bytes of tensors, and the text of the rest."""
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        if isinstance(value, Tensor):
            local: Any = value.detach()
            local = local.to_local() if hasattr(local, "to_local") else local
            if torch.nn.parameter.is_lazy(value) or local.layout != torch.strided:
                digest.update(f"{type(value)} {local.layout}".encode())
                continue
            digest.update(f"{local.dtype} {tuple(local.shape)}".encode())
            digest.update(local.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def seed_globally(seed: int) -> None:
    """Python, NumPy and torch, without the words and the environment of ``seed_everything``."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002  # user code may draw from it
    torch.manual_seed(seed)


def give_generators(loader: Any, seed: int) -> None:
    """Let what shuffles draw from a generator of its own, and workers get their seeds from it. One that the user gave
    stays.
    """
    samplers = [getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)]
    unique: dict[int, Any] = {id(sampler): sampler for sampler in samplers}
    for sampler in unique.values():
        if getattr(sampler, "generator", "none there") is None:
            sampler.generator = torch.Generator().manual_seed(seed)
    if isinstance(loader, DataLoader) and loader.generator is None:
        loader.generator = torch.Generator().manual_seed(seed + 1)


def _loaders_in(loaders: Any) -> Iterator[Any]:
    yield from loaders.flattened if isinstance(loaders, CombinedLoader) else tree_leaves(loaders)
