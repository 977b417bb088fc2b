"""What heads put out in a training step, and what a loss made of it."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_feat.joints.features.last_layers import LossCall
from lightning_feat.joints.features.taps import find_layer

_ROUNDING = 1e-2  # of half precision, in logits as a share of their size


class HeadOutputs:
    """Keeps what each of several heads puts out, inside a ``with``; of one head nothing.

    Args:
        module: has the heads.
        heads: their dotted names.
    """

    def __init__(self, module: LightningModule, heads: Sequence[str]) -> None:
        self.names = heads if len(heads) > 1 else ()
        self._layers = [find_layer(module, name) for name in self.names]
        self._logits: list[list[Tensor]] = [[] for _ in self.names]
        self._handles: list[Any] = []

    def __enter__(self) -> "HeadOutputs":
        for layer, kept in zip(self._layers, self._logits, strict=True):
            self._handles.append(layer.register_forward_hook(_Keep(kept)))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def are_averaged_in(self, calls: Sequence[LossCall]) -> bool:
        """Whether a loss got the mean of the heads, but for a factor and a number for each sample, which softmax does
        not see; or each head had a loss of its own.
        """
        alone = [{name for name in self.names if _within(call.layers, name)} for call in calls]
        if all({name} in alone for name in self.names):
            return True
        means = [torch.stack(logits).mean(0) for logits in zip(*self._logits, strict=False) if _same_shape(logits)]
        return any(_is_multiple(call.predicted, mean) for call in calls for mean in means)


class _Keep:
    def __init__(self, kept: list[Tensor]) -> None:
        self.kept = kept

    def __call__(self, layer: Any, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self.kept.append(output.detach())


def _within(layers: frozenset[str], head: str) -> bool:
    return all(name == head or name.startswith(f"{head}.") for name in layers)


def _same_shape(logits: Sequence[Tensor]) -> bool:
    return len({tuple(part.shape) for part in logits}) == 1


def _is_multiple(predicted: Any, mean: Tensor) -> bool:
    if not isinstance(predicted, Tensor) or predicted.shape != mean.shape or mean.ndim < 2:
        return False
    dim = 1  # of the classes
    given, made = (part.double() - part.double().mean(dim, keepdim=True) for part in (predicted, mean))
    factor = (given * made).sum() / (made * made).sum().clamp(min=torch.finfo(torch.float64).tiny)
    off = (given - factor * made).norm() / given.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return bool(factor > 0) and bool(off < _ROUNDING)
