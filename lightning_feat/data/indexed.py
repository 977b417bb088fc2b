"""A data set that says which of its examples it hands out."""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from torch.utils.data import Dataset, IterableDataset

T_co = TypeVar("T_co", covariant=True)


class IndexedDataset(Dataset[tuple[T_co, int]], Generic[T_co]):
    """Any map-style data set, giving ``(item, index)`` where it gave ``item``.

    The index is the position asked for, so it names the same example in every epoch, whatever the order, the number of
    workers or the sampler; it does not survive a change of the data set. The default collation turns the indices of a
    batch into an int64 tensor ``(N,)``, and leaves the items as they were: ``batch, indices = indexed_batch``.

    Args:
        dataset: has ``__getitem__`` and ``__len__``, and stays reachable under this name. If it fetches whole batches
            at once, by ``__getitems__``, so does this one.

    Raises:
        ValueError: if ``dataset`` is iterable-style or has no ``__getitem__`` or ``__len__``.

    Example:
        >>> IndexedDataset(["a", "b", "c"])[1]
        ('b', 1)
    """

    def __init__(self, dataset: Dataset[T_co] | Sequence[T_co]) -> None:
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"{type(dataset).__name__} is an IterableDataset, whose examples have no index: yield a key of your "
                "own with each example, or hand over a map-style data set, one with __getitem__ and __len__."
            )
        missing = [name for name in ("__getitem__", "__len__") if not hasattr(dataset, name)]
        if missing:
            raise ValueError(
                f"IndexedDataset needs a map-style data set, and {type(dataset).__name__} has no "
                f"{' and no '.join(missing)}: hand over the data set itself, not a loader or an iterator."
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch's Dataset leaves __len__ to the subclass

    def __getitem__(self, index: int) -> tuple[T_co, int]:
        if index < 0:  # one example, one index
            index += len(self)
        return self.dataset[index], index

    def __getitems__(self, indices: list[int]) -> list[tuple[T_co, int]]:
        """What a ``DataLoader`` calls for a whole batch."""
        whole_batch: Any = getattr(self.dataset, "__getitems__", None)
        items = [self.dataset[index] for index in indices] if whole_batch is None else whole_batch(indices)
        return list(zip(items, indices, strict=True))
