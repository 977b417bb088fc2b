"""What the datamodules share: parts to train, validate and test on, their loaders, and choices by a hash."""

from abc import abstractmethod
from collections.abc import Sequence, Sized
from hashlib import sha256
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset


class PartsDataModule(LightningDataModule):
    """A data set in three parts, ``train_set``, ``val_set`` and ``test_set``, which ``setup`` of a subclass makes.

    Training is shuffled by the global seed; the other parts, and prediction on the test part, come in their order.

    Args:
        batch_size: examples in a batch, at most; the last one may be smaller.
        num_workers: worker processes of each loader.
        thing: what an example is, for errors.
    """

    train_set: Any
    val_set: Any
    test_set: Any

    def __init__(self, batch_size: int, num_workers: int, thing: str = "example") -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a batch needs at least one {thing}.")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}: give zero or more worker processes.")
        self.batch_size, self.num_workers = batch_size, num_workers

    def train_dataloader(self) -> Any:
        return self.loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> Any:
        """No loader if nothing is held out."""
        return [] if self.val_set is None else self.loader(self.val_set)

    def test_dataloader(self) -> Any:
        return self.loader(self.test_set)

    def predict_dataloader(self) -> Any:
        """The test part, in its order."""
        return self.loader(self.test_set)

    def loader(self, part: Any, **options: Any) -> DataLoader[Any]:
        """A loader of ``part`` with the batch size and the workers of this module; ``options`` of ``DataLoader``."""
        usual = {
            "batch_size": self.batch_size,  # by name: Lightning makes loaders anew, and would give shuffle twice
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }
        return DataLoader(part, **{**usual, **options})


class Part(Dataset[tuple[Any, ...]]):
    """Examples that are fetched a batch at a time.

    Attributes:
        targets: one for each example.
        thing: what an example is, for errors.
    """

    thing = "example"
    targets: Sized

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.thing} {index} of {len(self)}")  # ends a plain `for` over the part
        return self.__getitems__([index % len(self)])[0]

    @abstractmethod
    def __getitems__(self, indices: list[int]) -> list[tuple[Any, ...]]:
        """What a ``DataLoader`` calls for a whole batch."""


def check_share(name: str, share: float) -> None:
    """Raise a ``ValueError`` unless ``share`` is one of each class that leaves some."""
    if not 0 <= share < 1:
        raise ValueError(f"{name}={share}: give the share of each class as a number in [0, 1).")


def hash_of(index: int | str, salt: str) -> int:
    """A large number that looks random, and is the same everywhere."""
    return int.from_bytes(sha256(f"{salt}:{index}".encode()).digest(), "big")


def by_hash(indices: Sequence[int], salt: str) -> list[int]:
    """The indices in an order that looks random; taking some away leaves the order of the others as it was."""
    return sorted(indices, key=lambda index: hash_of(index, salt))
