"""What callbacks, loaders and datamodules keep: data, and generators of random numbers."""

import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset


def held_by(owners: Sequence[Any], deep: bool = False) -> Iterator[Any]:
    """Loaders, data sets and datamodules that these keep, and with ``deep`` also what draws random numbers in them."""
    wanted: tuple[type, ...] = (DataLoader, Dataset, LightningDataModule)
    seen: set[int] = set()
    waiting = [(owner, 0) for owner in owners]
    while waiting:
        part, depth = waiting.pop(0)
        if part is None or id(part) in seen or isinstance(part, (torch.Tensor, str, bytes, int, float, Trainer, type)):
            continue
        seen.add(id(part))
        if isinstance(part, wanted) or (deep and state_of(part) is not None):
            yield part
        if depth < (5 if deep else 3):
            inner: list[Any] = []
            if isinstance(part, dict):
                inner = list(part.values()) if len(part) <= 256 else []
            elif isinstance(part, (list, tuple, set)):
                inner = list(part) if len(part) <= 64 else []
            elif isinstance(part, (DataLoader, Dataset)) or depth == 0 or deep or isinstance(part, wanted):
                inner = list(getattr(part, "__dict__", {}).values())
            waiting += [(value, depth + 1) for value in inner]


def state_of(part: Any) -> Any:
    """The state of a random number generator; None for anything else."""
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, random.Random):
        return part.getstate()
    if type(part).__module__.startswith("numpy.random"):
        bits = getattr(part, "bit_generator", None)
        if bits is not None:
            return copy.deepcopy(bits.state)
        return part.get_state() if hasattr(part, "get_state") else None
    return None


def set_state(part: Any, state: Any) -> None:
    """Undo what was drawn since ``state_of``."""
    if isinstance(part, random.Random):
        part.setstate(state)
    elif hasattr(part, "bit_generator"):
        part.bit_generator.state = state
    else:
        part.set_state(state)
