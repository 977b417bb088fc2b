"""Callbacks that average weights: the copies they keep, and what they must be a copy of.

Lightning pairs the tensors of such a copy with those of the module by their position, and says nothing where there are
more on one side.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_feat.joints.run.twins import callbacks_of

WhichWeights: TypeAlias = Literal["current", "averaged"]

_MOST_EPOCHS = 1000  # that an averaging callback is asked about


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


def refuse_no_average(trainer: Trainer, reader: Callback) -> None:
    """Raise a ``ValueError`` if no callback of the trainer keeps an average for ``reader`` to look at at the end of an
    epoch, or if it is brought up to date only after that; for ``on_fit_start``.
    """
    everyone = callbacks_of(trainer)
    callbacks = [callback for callback in everyone if averages(callback)]
    shown = next((callback for callback in callbacks if shows_average(callback)), None)
    if shown is not None:
        if everyone.index(shown) > everyone.index(reader) and _updates_at_epoch_ends(trainer, shown):
            average, who = type(shown).__name__, type(reader).__name__
            raise ValueError(
                f"{reader.state_key}: weights='averaged', but {average} averages at the end of an epoch and has its "
                f"turn after {who}, which would see the average of an epoch before: put {average} before {who} in "
                "Trainer(callbacks=[...])."
            )
        return
    if callbacks:
        raise ValueError(
            f"{reader.state_key}: weights='averaged', but {type(callbacks[0]).__name__} has no average before its run "
            "ends, and puts it into the module then: take weights='current', or EMAWeightAveraging."
        )
    raise ValueError(
        f"{reader.state_key}: weights='averaged', but no callback averages weights: add EMAWeightAveraging or another "
        "WeightAveraging to the Trainer, or take weights='current'."
    )


def _updates_at_epoch_ends(trainer: Trainer, average: Any) -> bool:
    """Whether a ``WeightAveraging`` takes the weights in at the end of any epoch, and not after steps alone."""
    last = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else _MOST_EPOCHS
    return any(average.should_update(epoch_idx=epoch) for epoch in range(min(last, _MOST_EPOCHS)))


@contextmanager
def with_weights(trainer: Trainer, module: nn.Module, which: WhichWeights) -> Iterator[None]:
    """Inside, the module has its ``current`` parameters and buffers, or those that are ``averaged``: what
    ``WeightAveraging`` validates and saves, class subspaces projected back to their manifold. Afterwards they are bit
    for bit what they were.
    """
    if which == "current":
        yield
        return
    copied = next(copied for callback, copied in averaged_copies(trainer) if shows_average(callback))
    now, average = _tensors(module), _tensors(copied)
    if {name: t.shape for name, t in now.items()} != {name: t.shape for name, t in average.items()}:
        raise RuntimeError("the averaged copy of the module has other parameters or buffers than the module itself.")
    before = {name: tensor.detach().clone() for name, tensor in now.items()}
    try:
        _write(now, average)
        for part in module.modules():
            project = getattr(part, "project_", None)  # a mean of orthonormal bases is none
            if callable(project):
                project()
        yield
    finally:
        _write(now, before)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    # With all names of a shared one, as a copy need not share what the module shares.
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in named}


def _write(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.data.copy_(values[name].data)


def holds_average(trainer: Trainer, callback: Callback) -> bool:
    """In ``on_train_end``: whether a callback before this one has put its average into the module already."""
    callbacks = callbacks_of(trainer)
    return any(averages(other) for other in callbacks[: callbacks.index(callback)])


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
