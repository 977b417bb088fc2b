"""What a classifier follows where one block of its inputs comes from another sample: counts that add up.

Shapes: N samples, C classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import check_target_range
from lightning_feat.functional.common.shapes import check_shapes


def block_mask(block: Tensor | slice | Sequence[Any] | str | int, shape: Sequence[int]) -> Tensor:
    """Mask, bool, of one input of ``shape``: True where the block is.

    Args:
        block: a mask that is broadcast to the shape, or an index as arrays take it: a slice, a position, a tuple of
            both, or the same as a string, such as ``":, :, 8:"`` for the right part of an image ``(C, H, W)``.
        shape: of one input, without the samples.

    Raises:
        ValueError: if it does not fit the shape, or holds nothing.

    Example:
        >>> block_mask("1:", (3,)), block_mask((slice(None), 0), (2, 2))
        (tensor([False,  True,  True]), tensor([[ True, False],
                [ True, False]]))
    """
    mask = torch.zeros(*shape, dtype=torch.bool)
    try:
        if isinstance(block, Tensor):
            if block.dtype != torch.bool:
                raise ValueError(f"block must be bool, True where the block is, got {block.dtype}.")
            if not block.ndim:
                raise ValueError("block is one truth for all: give a mask, or an index.")
            mask = mask.to(block.device) | block
        else:
            mask[_index(block)] = True
    except (IndexError, TypeError, RuntimeError) as error:
        raise ValueError(f"block {block!r} does not fit an input of shape {tuple(shape)}: {error}.") from None
    if mask.shape != tuple(shape) or not mask.any():
        why = "holds nothing" if mask.shape == tuple(shape) else "has more dimensions than there are"
        raise ValueError(f"block {block!r} {why} in an input of shape {tuple(shape)}.")
    return mask


def _index(block: slice | Sequence[Any] | str | int) -> Any:
    if isinstance(block, str):
        return tuple(_parsed(part.strip(), block) for part in block.split(","))
    if isinstance(block, (tuple, list)):
        return tuple(_parsed(part.strip(), part) if isinstance(part, str) else part for part in block)
    return block


def _parsed(part: str, block: str) -> Any:
    if part == "...":
        return ...
    try:
        ends = [int(end) if end.strip() else None for end in part.split(":")]
    except ValueError:
        ends = []
    if not 0 < len(ends) <= 3 or ends == [None]:
        raise ValueError(f"block {block!r} is no index: write it as in brackets, such as '0:2' or ':, :, 8:'.")
    return ends[0] if len(ends) == 1 else slice(*ends)


def crossed_counts(predictions: Tensor, feature: Tensor, num_classes: int) -> Tensor:
    """How often each class was predicted where the feature stood for each class: ``(C, C)`` int64, a row for each class
    of the feature. Those of batches, and of processes, add up.

    Args:
        predictions: ``(N,)`` predicted classes.
        feature: ``(N,)`` class that the feature stands for: that of the sample which lent the block.
        num_classes: number of classes C.

    Raises:
        ValueError: if shapes or classes do not fit.
    """
    check_shapes(predictions=(predictions, "N", int), feature=(feature, "N", int))
    for classes in (predictions, feature):
        check_target_range(classes, num_classes)
    cell_N = feature.long() * num_classes + predictions.long()
    return cell_N.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def reliance_of_counts(counts: Tensor) -> Tensor:
    r"""How far predictions follow a feature, from ``crossed_counts``: 0 as by chance, 1 always.

    .. math:: R = \Big(\frac1C \sum_s P(\hat y = s \mid s) - \frac1C\Big) \Big/ \Big(1 - \frac1C\Big)

    This is ``feature_reliance`` with each class of the feature counting the same, so that a classifier which ignores
    the feature has zero whatever the shares of the classes.

    Args:
        counts: ``(C, C)``, whole numbers.

    Returns:
        Scalar, float64; over the classes that the feature had, nan where these are fewer than two.

    Raises:
        ValueError: if the counts are not ``(C, C)`` whole numbers, zero or more.

    Example:
        >>> reliance_of_counts(torch.tensor([[30, 0], [0, 10]])), reliance_of_counts(torch.tensor([[9, 21], [3, 7]]))
        (tensor(1., dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    check_shapes(counts=(counts, "CC", int))
    if (counts < 0).any():
        raise ValueError(f"a count is {int(counts.min())}: counts are zero or more.")
    number_C = counts.sum(1)
    there_C = number_C > 0
    classes = there_C.sum()
    agreement = (counts.diagonal().double() / number_C.clamp(min=1)).sum() / classes
    chance = 1 / classes.double()
    value = (agreement - chance) / (1 - chance)
    return torch.where(classes > 1, value, torch.nan)
