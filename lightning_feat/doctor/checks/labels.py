"""Which targets the loss of a training step was made of, seen from outside.

Shapes: N samples, C classes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, nll_loss
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_ROUNDING = 1e-3  # of half precision, in a target that sums to one


class TargetEar(TorchFunctionMode):
    """Notes the targets that functions of PyTorch get while it is active.

    Attributes:
        hard: class indices ``(N,)`` that cross entropy was given.
        soft: ``(N, C)``, rows that sum to one, given to any function together with something of the same shape that has
            a gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hard: list[Tensor] = []
        self.soft: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (cross_entropy, nll_loss):
            target = kwargs.get("target", args[1] if len(args) > 1 else None)
            if isinstance(target, Tensor) and not target.is_floating_point() and target.ndim == 1:
                self.hard.append(target.detach().clone())
        self._hear_soft([leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])
        return func(*args, **kwargs)

    def _hear_soft(self, tensors: list[Tensor]) -> None:
        shapes = {t.shape for t in tensors if t.requires_grad and t.ndim == 2}
        for t in tensors:
            if t.shape in shapes and not t.requires_grad and t.is_floating_point() and t.shape[1] > 1 and t.numel():
                given = t.detach().float().abs()  # a loss written by hand may multiply by minus the target
                if bool(((given.sum(1) - 1).abs() < _ROUNDING).all()) and bool((t >= 0).all() or (t <= 0).all()):
                    self.soft.append(given)


def num_mixed(targets: Tensor, ear: TargetEar) -> int:
    """How many samples of a batch with ``targets`` ``(N,)`` were mixed with another before the loss saw them; 0 if
    none.

    Mixed are rows of a soft target with two classes above a rest that is the same in all rows, and, where the loss is a
    sum of two cross entropies, samples whose class differs in the second. Smoothed labels are not mixed, nor is what a
    teacher gives. Two samples of one class cannot be told from one.
    """
    targets = targets.cpu()
    most = 0
    for soft_NC in ear.soft:
        if len(soft_NC) == len(targets):
            most = max(most, _mixed_rows(soft_NC.cpu(), targets))
    orders = [hard.cpu() for hard in ear.hard if hard.shape == targets.shape]
    for hard in orders:
        same_labels = torch.equal(hard.sort().values, targets.sort().values)
        if same_labels and any(torch.equal(other, targets) for other in orders):
            most = max(most, int((hard != targets).sum()))
    return most


def differ(targets: Tensor, ear: TargetEar) -> bool:
    """Whether the loss was made of class indices for as many samples, none of which are these ``(N,)``."""
    targets = targets.cpu()
    hard = [t.cpu() for t in ear.hard if t.shape == targets.shape]
    return bool(hard) and not any(torch.equal(t, targets) for t in hard)


def _mixed_rows(soft_NC: Tensor, targets: Tensor) -> int:
    if soft_NC.shape[1] == 2:
        # One class is always above the other. Few different values: labels, smoothed or mixed, and no teacher.
        if len(soft_NC.round(decimals=4).unique()) > 6:
            return 0
        own = soft_NC.gather(1, targets[:, None].clamp(0, 1))[:, 0]
        return int((own < own.max() - _ROUNDING).sum())
    lowest_N = soft_NC.amin(1)
    if lowest_N.max() - lowest_N.min() > _ROUNDING:
        return 0  # what classes get that are not meant is no constant: a teacher
    peaks_N = (soft_NC > lowest_N.max() + _ROUNDING).sum(1)
    return int((peaks_N == 2).sum()) if bool((peaks_N <= 2).all()) else 0
