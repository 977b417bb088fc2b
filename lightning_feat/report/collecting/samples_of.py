"""What a data set says of its samples beside their tensors: names of classes, and of files."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Subset


def class_names_of(dataset: Any) -> list[str]:
    """Names of class 0, 1, ..., by the attribute ``classes`` that torchvision gave its data sets; else none."""
    dataset, _ = _under(dataset, [])
    names = getattr(dataset, "classes", None)
    if isinstance(names, (Mapping, str)) or not isinstance(names, Sequence):
        return []
    return [str(name) for name in names]


def names_of(dataset: Any, places: Sequence[int]) -> list[str] | None:
    """File names of the samples at these places, by the ``samples`` of torchvision's folders; else None."""
    dataset, places = _under(dataset, places)
    samples = getattr(dataset, "samples", None)
    if not isinstance(samples, Sequence) or isinstance(samples, str) or not len(samples):
        return None
    paths = [entry[0] if isinstance(entry, (tuple, list)) and entry else entry for entry in samples]
    if not all(isinstance(path, (str, os.PathLike)) for path in paths):
        return None
    return [os.path.basename(os.fspath(paths[place])) if place < len(paths) else "" for place in places]


def _under(dataset: Any, places: Sequence[int]) -> tuple[Any, Sequence[int]]:
    """The data set below subsets, and the places there."""
    while isinstance(dataset, Subset) or (not hasattr(dataset, "classes") and hasattr(dataset, "dataset")):
        indices = getattr(dataset, "indices", None)
        places = [int(indices[place]) for place in places] if indices is not None else places
        dataset = dataset.dataset
    return dataset, places
