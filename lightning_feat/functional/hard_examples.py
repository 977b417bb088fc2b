"""Which examples are hard by one number each: what clustering the outputs is compared with.

Shapes: N examples, C classes.
"""

import torch
from torch import Tensor


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
    if losses.shape != targets.shape or losses.isnan().any():
        raise ValueError(
            f"losses {tuple(losses.shape)} must give one number for each of the {len(targets)} examples, none NaN."
        )
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
    generator = torch.Generator().manual_seed(seed)
    return highest_losses(torch.rand(len(targets), generator=generator).to(targets.device), targets, per_class)


def misclassified(logits: Tensor, targets: Tensor) -> Tensor:
    """Mask ``(N,)`` of the examples whose highest logit is not that of their class; logits are ``(N, C)``."""
    return logits.argmax(1) != targets
