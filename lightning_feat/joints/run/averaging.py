"""Callbacks that average weights: the copies they keep, and what they must be a copy of.

Lightning pairs the tensors of such a copy with those of the module by their position, and says nothing where there are
more on one side.
"""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_feat.joints.run.twins import callbacks_of


def averages(callback: Callback) -> bool:
    """Whether this callback averages the weights of the module."""
    return any(cls.__name__ in ("WeightAveraging", "StochasticWeightAveraging") for cls in type(callback).__mro__)


def shows_average(callback: Callback) -> bool:
    """Whether it validates the average, and writes it into checkpoints in the place of the weights."""
    return any(cls.__name__ == "WeightAveraging" for cls in type(callback).__mro__)


def averaged_copies(trainer: Trainer) -> list[tuple[Callback, nn.Module]]:
    """The averaging callbacks of the trainer that have made their copy of the module, each with that copy."""
    copies = []
    for callback in callbacks_of(trainer):
        copy: Any = getattr(callback, "_average_model", None) if averages(callback) else None
        if copy is not None:
            copies.append((callback, copy.module if isinstance(copy, AveragedModel) else copy))
    return copies


def refuse_averaging_before(trainer: Trainer, callback: Callback) -> None:
    """Raise a ``ValueError`` if an averaging callback copies the module before this callback has changed it."""
    callbacks = callbacks_of(trainer)
    for other in callbacks[: callbacks.index(callback)]:
        if averages(other):
            name, average = type(callback).__name__, type(other).__name__
            raise ValueError(
                f"{average} stands before {name} and would copy the module without what {name} puts in, and average "
                f"one tensor with another: put {name} before it in Trainer(callbacks=[...])."
            )


def refuse_other_copies(trainer: Trainer, module: nn.Module, prefix: str, owner: str) -> None:
    """Raise a ``ValueError`` if an averaging callback has copied the module when what now stands below ``prefix`` was
    another; for ``on_fit_start`` of the callback that put it there.
    """
    for callback, copied in averaged_copies(trainer):
        now, then = (_shapes(of, prefix) for of in (module, copied))
        if now != then:
            average = type(callback).__name__
            raise ValueError(
                f"{average} has copied the module before {owner} was done with it, and would average one tensor with "
                f"another: build all layers in __init__, and put {average} last in Trainer(callbacks=[...])."
            )


def _shapes(module: nn.Module, prefix: str) -> dict[str, torch.Size]:
    named = [(name.replace("_orig_mod.", ""), p.shape) for name, p in module.named_parameters()]
    return {name: shape for name, shape in named if name.startswith(f"{prefix}.")}
