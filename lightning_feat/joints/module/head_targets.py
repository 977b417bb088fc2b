"""What targets and losses say of a head: whether it tells classes apart, one of which is right."""

from typing import Any

import torch
from torch import Tensor

from lightning_feat.joints.features.batches import targets_of
from lightning_feat.joints.features.last_layers import LossCall

_ROUNDING = 1e-2  # of half precision, in a row of shares that sums to one


def kind_of_targets(call: LossCall) -> str | None:
    """What the targets of a loss are that are no classes, one of which is right, in words; None where they may be."""
    target = call.target.detach() if isinstance(call.target, Tensor) else torch.zeros(0)
    if call.function == "multilabel_margin_loss":
        return "the targets of multilabel_margin_loss are several at once"
    if target.is_floating_point() and target.ndim == 2 and target.shape[1] > 1:
        if _not_one(target):  # one-hot or soft labels sum to one
            return f"the targets of {call.function} are several at once, or none, or no classes"
    elif target.is_floating_point() and target.numel():
        return f"the targets of {call.function} are numbers, no classes"
    return None


def kind_in_batch(batch: Any, num_classes: int | None) -> str | None:
    """What the targets of a batch are that are no classes, for a loss that is not known; None where they may be."""
    try:
        target = targets_of(batch).detach()
    except ValueError:
        return None
    if target.is_complex() or not target.numel():
        return None
    if target.ndim == 2 and target.shape[1] == num_classes and num_classes > 1:
        zero_or_one = bool(((target == 0) | (target == 1)).all())
        of_classes = target.is_floating_point() or target.dtype == torch.bool or (zero_or_one and num_classes > 2)
        return "the targets in the batch are several at once, or none" if of_classes and _not_one(target) else None
    if target.is_floating_point() and target.numel() == len(target) and bool((target != target.round()).any()):
        return "the targets in the batch are numbers, no classes"  # whole ones may be indices as a table holds them
    return None


def lacks_logarithms(call: LossCall) -> bool:
    """Whether ``nll_loss`` got what are no logarithms of shares that sum to one."""
    predicted = call.predicted
    if call.function != "nll_loss" or not isinstance(predicted, Tensor) or predicted.ndim < 2:
        return False
    return bool((predicted.float().logsumexp(1).abs() > _ROUNDING).any())


def _not_one(rows: Tensor) -> bool:
    return bool(((rows.float().sum(1) - 1).abs() > _ROUNDING).any())
