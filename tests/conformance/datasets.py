"""The data of the matrix: 32 points to train on and 16 to validate on, in batches of any form."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from tests.conformance.modules import NUM_CLASSES, Habits

SAMPLES, BATCH = 32, 8


@dataclass
class Example:
    x: Tensor
    target: Tensor


class Points(Dataset):
    """Pairs of a point in four dimensions and what ``habits`` say of its target."""

    def __init__(self, habits: Habits, n: int = SAMPLES, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 4, generator=generator)
        classes = torch.arange(n) % NUM_CLASSES
        self.x += 0.5 * one_hot(classes, 4)  # there is something to learn
        if habits.task == "regression":
            self.y = self.x[:, :2] + 0.1 * torch.randn(n, 2, generator=generator)
        else:
            self.y = 0.8 * one_hot(classes, NUM_CLASSES) + 0.2 / NUM_CLASSES if habits.soft else classes

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Stream(IterableDataset):
    def __init__(self, points: Points) -> None:
        self.points = points

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.points[i] for i in range(len(self.points)))


class Collate:
    """Examples as a batch of the given form. An object, because a worker process must be able to unpickle it."""

    def __init__(self, form: str) -> None:
        self.form = form

    def __call__(self, examples: list[tuple[Tensor, Tensor]]) -> Any:
        x, y = (torch.stack(column) for column in zip(*examples, strict=True))
        if self.form == "two inputs":  # without the second the first is another
            return x / 2, y, torch.full((len(x), 1), 2.0)
        forms = {"tuple": (x, y), "list": [x, y], "dict": {"image": x, "label": y}, "dataclass": Example(x, y)}
        return forms[self.form]


Source: TypeAlias = Literal["points", "stream", "stateful", "own"]


def loader(habits: Habits, part: str, source: Source = "points") -> DataLoader:
    """The loader of a part, ``"train"`` or ``"val"``; training data are shuffled by the global random numbers.

    They come from a ``"stream"`` without length, or by a ``"stateful"`` loader, which restores a position of its own;
    or each process has its ``"own"`` half.
    """
    points: Any = points_of(habits, part)
    given: dict[str, Any] = {"batch_size": BATCH, "shuffle": part == "train", "collate_fn": Collate(habits.batch)}
    if source == "own":
        points = Subset(points, range(int(os.environ["LOCAL_RANK"]), len(points), 2))
    elif part == "train" and source == "stream":
        return DataLoader(Stream(points), **{**given, "shuffle": False})
    elif part == "train" and source == "stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(points, **given, generator=torch.Generator().manual_seed(0))
    return DataLoader(points, **given)


def points_of(habits: Habits, part: str) -> Points:
    return Points(habits) if part == "train" else Points(habits, n=SAMPLES // 2, seed=1)


def tensors(habits: Habits) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and targets of both parts."""
    return {part: (points.x, points.y) for part in ("train", "val") for points in [points_of(habits, part)]}
