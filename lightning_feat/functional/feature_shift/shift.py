"""How far the features of a network have moved from those of a reference, as measures and as penalties.

The reference is the network at the start of fine-tuning, or the same network without its prompts. A *shift* is taken
token by token: positions of a map and tokens of a sequence are both called tokens here.

Shapes: N samples, T tokens, D features, R tokens of all samples that count, J layers (or pairs of blocks).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_feat.functional.common.lengths import length, tamed


class ShiftSums(NamedTuple):
    """Sums over tokens, float64. Those of two disjoint sets of tokens add up to those of their union."""

    counts: Tensor  # () tokens
    distances: Tensor  # () sum of the distances of features to their reference
    lengths: Tensor  # () sum of the lengths of the reference features
    cosines: Tensor  # () sum of one minus the cosine of features and reference


def relative_shift(
    features: Tensor, reference: Tensor, mask: Tensor | None = None, reference_mask: Tensor | None = None
) -> Tensor:
    r"""Mean distance of features to their reference, as a share of the mean length of the reference.

    .. math:: s = \frac{\sum_r \lVert z_r - z^0_r \rVert_2}{\sum_r \lVert z^0_r \rVert_2}

    over the tokens r that count. Dimensionless: layers of different widths and scales compare. Zero where nothing has
    moved, one where the distance is as large as the reference. For prompts, this is the feature shift of a block by its
    definition, the change of the output that the prompts bring (Yang et al., "RESTORE", arXiv 2403.06136). The
    normalisation by the length is ours; the released code takes a ratio of Gram norms of the prompts instead.

    The gradient is that of a length: of bounded size however near zero, and zero at zero. As a penalty it is a
    group-lasso over tokens, which pulls with the same force at any distance.

    Args:
        features: ``(..., D)``, any floating dtype; computed in float32 at least, also inside autocast.
        reference: of the same shape, commonly without gradient.
        mask: ``(...)`` bool, the tokens that count; None for all.
        reference_mask: where the reference has other tokens (no prompts, say), those of it that count: as many as
            ``mask`` leaves, in the same order. None where ``mask`` is meant for both.

    Returns:
        Scalar; nan where no token counts, inf or nan where the reference is zero.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> start = torch.tensor([[3.0, 4.0], [0.0, 5.0]])  # lengths 5 and 5
        >>> relative_shift(start + torch.tensor([0.0, 1.0]), start)
        tensor(0.2000)
    """
    z_RD, reference_RD, weight_R = _tokens(features, reference, mask, reference_mask)
    return _sum(length(z_RD - reference_RD), weight_R) / _sum(length(reference_RD), weight_R)


def relative_shift_by_sample(features: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """:func:`relative_shift` of each sample over its own tokens, ``(N,)``.

    Args:
        features: ``(N, D)`` or ``(N, ..., D)``.
        reference: of the same shape.
        mask: ``(N, ...)`` bool, the tokens that count.

    Example:
        >>> start = torch.tensor([[[3.0, 4.0], [0.0, 5.0]], [[1.0, 0.0], [9.0, 9.0]]])
        >>> mask = torch.tensor([[True, True], [True, False]])  # the last token is padding
        >>> relative_shift_by_sample(start * 1.5, start, mask)
        tensor([0.5000, 0.5000])
    """
    z, reference_, weight = _tokens(features, reference, mask, None)
    distance, start = length(z - reference_), length(reference_)
    if weight is not None:
        distance, start = (torch.where(weight, value, 0.0) for value in (distance, start))
    tokens = math.prod(distance.shape[1:])  # not -1, which no samples leave open
    return distance.reshape(len(z), tokens).sum(1) / start.reshape(len(z), tokens).sum(1)


def shift_sums(
    features: Tensor, reference: Tensor, mask: Tensor | None = None, reference_mask: Tensor | None = None
) -> ShiftSums:
    """Sum a batch into what :func:`shift_measures` needs; arguments as in :func:`relative_shift`.

    Distances are taken in float32 (float64 for such features) and added in float64, so that the value of an epoch does
    not depend on how it is cut into batches.
    """
    z_RD, reference_RD, weight_R = _tokens(features.detach(), reference.detach(), mask, reference_mask)
    columns = (
        torch.ones(z_RD.shape[:-1], device=z_RD.device),
        length(z_RD - reference_RD),
        length(reference_RD),
        _one_minus_cosine(z_RD, reference_RD),
    )
    # MPS has no float64.
    wide = torch.float32 if z_RD.device.type == "mps" else torch.float64
    return ShiftSums(*(_sum(column.to(wide), weight_R) for column in columns))


def shift_measures(totals: ShiftSums) -> dict[str, Tensor]:
    """``relative``, see :func:`relative_shift`, and ``cosine``, see :func:`cosine_shift`, of everything summed."""
    return {"relative": totals.distances / totals.lengths, "cosine": totals.cosines / totals.counts}


def cosine_shift(
    features: Tensor, reference: Tensor, mask: Tensor | None = None, reference_mask: Tensor | None = None
) -> Tensor:
    r"""One minus the cosine of features and reference, averaged over tokens: in [0, 2], blind to lengths.

    Computed as :math:`\lVert u - u^0 \rVert^2 / 2` of the unit vectors: exactly zero where nothing has moved, and exact
    for small angles, where ``1 - cosine`` keeps nothing but rounding. The gradient at zero is zero. Arguments as in
    :func:`relative_shift`.

    Example:
        >>> cosine_shift(torch.tensor([[0.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        tensor(0.5000)
    """
    z_RD, reference_RD, weight_R = _tokens(features, reference, mask, reference_mask)
    return _mean(_one_minus_cosine(z_RD, reference_RD), weight_R)


def feature_distillation(
    features: Tensor, reference: Tensor, mask: Tensor | None = None, reference_mask: Tensor | None = None
) -> Tensor:
    r"""Mean squared distance of features to their reference, :math:`\frac1R \sum_r \lVert z_r - z^0_r \rVert^2`.

    In the squared unit of the features, so that its weight depends on the layer. The square of a distance, not divided
    by the width. Source: the hint of Romero et al., "FitNets", ICLR 2015, with the network's own start as teacher and
    no regressor between. Arguments as in :func:`relative_shift`.

    Example:
        >>> feature_distillation(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2, 2))
        tensor(13.)
    """
    z_RD, reference_RD, weight_R = _tokens(features, reference, mask, reference_mask)
    return _mean((z_RD - reference_RD).square().sum(-1), weight_R)


def l2_sp(weights: Sequence[Tensor], start: Sequence[Tensor | None]) -> Tensor:
    r"""Half the squared distance of the weights to their start, :math:`\frac12 \sum_w \lVert w - w^0 \rVert^2`.

    Times :math:`\alpha` it is the L2-SP penalty, whose gradient is :math:`\alpha (w - w^0)`; it takes the place of
    weight decay, which would pull to zero. New weights have no start and are pulled to zero, with a weight of their own
    (:math:`\beta`): call it once for each kind. Source: Li, Grandvalet, Davoine, "Explicit inductive bias for transfer
    learning with convolutional networks", ICML 2018, arXiv 1802.01483.

    Args:
        weights: of any shapes; computed in float32 at least.
        start: of the same shapes, in the same order; None for zero.

    Returns:
        Scalar, a sum over all entries; zero for no weights.

    Example:
        >>> l2_sp([torch.tensor([1.0, 2.0]), torch.tensor([2.0])], [torch.tensor([1.0, 0.0]), None])
        tensor(4.)
    """
    if len(weights) != len(start):
        raise ValueError(f"{len(weights)} weights, but {len(start)} starts: give one for each, None for zero.")
    total = torch.zeros(()) if not weights else weights[0].new_zeros((), dtype=_at_least_float32(weights[0].dtype))
    for weight, origin in zip(weights, start, strict=True):
        wide = weight.to(_at_least_float32(weight.dtype))
        total = total + (wide if origin is None else wide - origin.to(wide)).square().sum() / 2
    return total


def shift_discrepancy(text_shifts: Tensor, image_shifts: Tensor) -> Tensor:
    """Distance of the shifts of two towers, block by block: ``|s_t - s_v|``, ``(J,)``.

    Args:
        text_shifts: ``(J,)`` shift of each block of the text tower, by :func:`relative_shift` or by any other measure
            without a unit.
        image_shifts: ``(J,)`` of the image tower, by the same measure.

    Example:
        >>> shift_discrepancy(torch.tensor([0.5, 0.25]), torch.tensor([0.25, 0.25]))
        tensor([0.2500, 0.0000])
    """
    _check_blocks(text_shifts, image_shifts)
    return (text_shifts - image_shifts).abs()


def shift_consistency_loss(text_shifts: Tensor, image_shifts: Tensor) -> Tensor:
    r"""Penalty on towers that shift by different amounts, :math:`\sum_j (s_t(j) - s_v(j))^2`; both sides get gradients.

    A sum over blocks, not a mean. Nothing in it says how far both may go: two towers that shift much and alike have
    none of it. Source: Yang et al., "RESTORE", arXiv 2403.06136; weight 1 there. Arguments as in
    :func:`shift_discrepancy`.

    Example:
        >>> shift_consistency_loss(torch.tensor([0.5, 0.25]), torch.tensor([0.25, 0.25]))
        tensor(0.0625)
    """
    _check_blocks(text_shifts, image_shifts)
    return (text_shifts - image_shifts).square().sum()


def _check_blocks(text_shifts: Tensor, image_shifts: Tensor) -> None:
    if text_shifts.ndim != 1 or text_shifts.shape != image_shifts.shape:
        raise ValueError(
            f"need the shifts (J,) of as many text blocks as image blocks, got {tuple(text_shifts.shape)} and "
            f"{tuple(image_shifts.shape)}: name as many layers of the one tower as of the other."
        )


def _tokens(
    features: Tensor, reference: Tensor, mask: Tensor | None, reference_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features and reference of one shape in float32 at least, and which tokens count."""
    if mask is not None and mask.shape != features.shape[:-1]:
        raise ValueError(
            f"the mask {tuple(mask.shape)} does not fit features {tuple(features.shape)}: it needs one entry for each "
            "token."
        )
    if reference_mask is not None:
        if reference_mask.shape != reference.shape[:-1]:
            raise ValueError(
                f"the reference_mask {tuple(reference_mask.shape)} does not fit a reference {tuple(reference.shape)}."
            )
        features = features.flatten(0, -2) if mask is None else features[mask]
        reference, mask = reference[reference_mask], None
    if features.shape != reference.shape or features.ndim < 2:
        raise ValueError(
            f"features {tuple(features.shape)} and reference {tuple(reference.shape)} must be (..., D) and of one "
            "shape: mark the tokens that both have by mask and reference_mask."
        )
    dtype = _at_least_float32(torch.promote_types(features.dtype, reference.dtype))
    return features.to(dtype), reference.to(dtype), mask


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _one_minus_cosine(features: Tensor, reference: Tensor) -> Tensor:
    return (normalize(tamed(features)[0], dim=-1) - normalize(tamed(reference)[0], dim=-1)).square().sum(-1) / 2


def _sum(values: Tensor, counts: Tensor | None) -> Tensor:
    # By where and not by product: what stands in padding may be NaN.
    return values.sum() if counts is None else torch.where(counts, values, 0.0).sum()


def _mean(values: Tensor, counts: Tensor | None) -> Tensor:
    return values.mean() if counts is None else _sum(values, counts) / counts.sum()
