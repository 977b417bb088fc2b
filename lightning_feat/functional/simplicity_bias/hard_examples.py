"""Which examples are hard by one number each: what clustering the outputs is compared with.

Shapes: N examples, C classes.
"""

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import check_target_range
from lightning_feat.functional.common.shapes import check_shapes


def highest_losses(losses: Tensor, targets: Tensor, per_class: Tensor) -> Tensor:
    """Mask ``(N,)`` of the examples with the highest losses, ``per_class[c]`` of class c; of equal ones the first.

    Args:
        losses: ``(N,)`` floating, none NaN.
        targets: ``(N,)`` class indices.
        per_class: ``(C,)`` whole numbers; a class with fewer examples gives all it has.

    Raises:
        ValueError: if a loss is NaN, or the lengths do not fit.

    Example:
        >>> highest_losses(torch.tensor([1.0, 3.0, 2.0, 0.5]), torch.tensor([0, 0, 0, 1]), torch.tensor([2, 1]))
        tensor([False,  True,  True,  True])
    """
    check_shapes(losses=(losses, "N"), targets=(targets, "N", int), per_class=(per_class, "C", int))
    if losses.isnan().any():
        raise ValueError(f"{int(losses.isnan().sum())} of {len(losses)} losses are NaN: an order needs numbers.")
    if len(targets) and int(targets.min()) < 0:
        raise ValueError(f"a target is {int(targets.min())}: class indices begin at 0.")
    if len(per_class) and int(per_class.min()) < 0:
        raise ValueError(f"per_class has {int(per_class.min())}: give how many examples of each class, 0 or more.")
    targets = targets.long()  # as an index, uint8 is a mask
    count_C = targets.bincount(minlength=len(per_class))
    if len(count_C) != len(per_class):
        raise ValueError(f"per_class has {len(per_class)} numbers, but there is a target {len(count_C) - 1}.")
    order_N = losses.argsort(descending=True, stable=True)
    order_N = order_N[targets[order_N].argsort(stable=True)]  # class by class, the highest loss first
    place_N = torch.arange(len(targets), device=targets.device) - (count_C.cumsum(0) - count_C)[targets[order_N]]
    chosen_N = torch.zeros_like(targets, dtype=torch.bool)
    chosen_N[order_N] = place_N < per_class.to(targets.device)[targets[order_N]]
    return chosen_N


def random_examples(targets: Tensor, per_class: Tensor, seed: int = 0) -> Tensor:
    """Mask ``(N,)`` of ``per_class[c]`` examples of each class c, drawn at random; the same on every device."""
    check_shapes(targets=(targets, "N", int), per_class=(per_class, "C", int))
    generator = torch.Generator().manual_seed(seed)
    return highest_losses(torch.rand(len(targets), generator=generator).to(targets.device), targets, per_class)


def misclassified(logits: Tensor, targets: Tensor) -> Tensor:
    """Mask ``(N,)`` of the examples whose highest logit is not that of their class; logits are ``(N, C)``."""
    check_shapes(logits=(logits, "NC"), targets=(targets, "N", int))
    check_target_range(targets, logits.shape[1])
    return logits.argmax(1) != targets
