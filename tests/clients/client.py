"""What a client is: a module of a published package, and data of its own kind."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

NUM_CLASSES, SAMPLES, BATCH = 3, 24, 8
TARGETS = torch.arange(SAMPLES) % NUM_CLASSES


class Samples(Dataset):
    """Samples that are dicts or tuples, and how they become a batch where torch does not know."""

    def __init__(self, samples: list[Any], collate: Callable[[list[Any]], Any] | None = None) -> None:
        self.samples = samples
        self.collate = collate

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


@dataclass
class Client:
    """A module and its data.

    Args:
        package: to be there.
        build: the module and its data; seeded by the caller.
        features: the features ``(N, D)`` of the layer for a batch, computed without us.
        layer: whose output they are, or None where a classifier is found, and they are its input.
        head: the classifier, where it is not found and we ask for its name.
        labels: the classes ``(N,)`` of a batch where they are not found: of a regression, what its data were made with.
        pooling: what makes vectors of what that layer gives.
        shift: options of a feature shift, where what is trained lies before the layer's part of the network.
        eval_step: the module has a validation step; it gets the training data again.
        root: the package whose Trainer the module wants.
    """

    package: str
    build: Callable[[], tuple[Any, Dataset]]
    features: Callable[[Any, Any], Tensor]
    layer: str | None = None
    head: str | None = None
    labels: Callable[[Any], Tensor] | None = None
    pooling: str | None = None
    shift: dict[str, Any] = field(default_factory=dict)
    eval_step: bool = True
    root: str = "lightning.pytorch"

    @property
    def classifies(self) -> bool:
        return self.layer is None

    def of_features(self) -> dict[str, Any]:
        found = {} if self.labels is None else {"target_key": self.labels}
        read = (
            {"layer": self.layer, "pooling": self.pooling}
            if self.head is None
            else {"layer": self.head, "read": "input"}
        )
        return {**read, **found}

    def labels_of(self, batch: Any) -> Tensor:
        if self.labels is not None:
            return self.labels(batch)
        return batch.get("label", batch.get("labels")) if isinstance(batch, dict) else batch[1]


def images(size: int = 32, seed: int = 1) -> Tensor:
    """Images with a class in their mean, so that class means differ."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SAMPLES, 3, size, size, generator=generator) + TARGETS[:, None, None, None] / 2


def loaders(data: Dataset) -> DataLoader[Any]:
    return DataLoader(data, batch_size=BATCH, collate_fn=getattr(data, "collate", None))
