"""What needs the class means first, nearest means and residuals: sums of a second pass, against those of the first.

Shapes: N samples, D features, C classes, R directions spanned by the class means.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import (
    ClassSums,
    GlobalMean,
    check_batch,
    class_means,
    feature_mean,
    to_float64,
)
from lightning_feat.functional.common.directions import FLOAT32_ROUNDING, between_class_directions


class ClassCenters(NamedTuple):
    """The class means of a finished first pass, and the directions they span; made once, used for every batch."""

    origin: Tensor  # (D,) global mean
    offsets: Tensor  # (C, D) class means minus origin; zero for a class without samples
    seen: Tensor  # (C,) bool, the classes with samples
    projection: Tensor  # (R, D) pseudo-inverse of the offsets, up to a rotation on its left


class CenterSums(NamedTuple):
    """Sums of a second pass, against fixed centers. They add like :class:`ClassSums`."""

    samples: Tensor  # () samples
    mismatches: Tensor  # () samples whose classifier and nearest class mean disagree; nan where no logits were given
    hits: Tensor  # () samples whose nearest class mean is that of their own class
    projected: (
        Tensor  # (C,) sum over the samples of a class of the squared norm of projection @ (features - class mean)
    )
    residual_squares: Tensor  # (C,) sum over the samples of a class of their squared distance to the class mean


def class_centers(
    totals: ClassSums, global_mean: GlobalMean = "classes", rounding: float = FLOAT32_ROUNDING
) -> ClassCenters:
    """Fix the centers of a second pass from the totals of the first.

    The arguments, and the cost, are those of ``between_class_directions``.
    """
    value_R, direction_RD = between_class_directions(totals, global_mean, rounding)
    origin_D, seen_C = feature_mean(totals, global_mean), totals.counts > 0
    offset_CD = torch.where(seen_C[:, None], class_means(totals) - origin_D, 0.0)
    return ClassCenters(origin_D, offset_CD, seen_C, direction_RD / value_R[:, None])


def center_sums(
    features: Tensor, targets: Tensor, logits: Tensor | None, centers: ClassCenters, weights: Tensor | None = None
) -> CenterSums:
    """Sum a batch of the second pass, in float64.

    The nearest mean is sought among the classes that had samples in the first pass. Distances are taken around the
    global mean, where they do not cancel. Costs ``2 N D (C + R)`` operations and ``8 N (C + D + R)`` bytes.

    Args:
        features: ``(N, D)``.
        targets: ``(N,)`` class indices or ``(N, C)`` soft targets, as in :func:`class_sums`.
        logits: ``(N, C)`` what the classifier really put out, bias included; None leaves the mismatches nan.
        centers: from :func:`class_centers`.
        weights: ``(N,)`` factor of each sample; None counts every sample once.

    Raises:
        ValueError: if shapes do not fit.
    """
    num_classes = len(centers.seen)
    soft = check_batch(features, targets, num_classes, weights)
    if logits is not None and logits.shape != (len(features), num_classes):
        raise ValueError(f"logits must be ({len(features)}, {num_classes}), got {tuple(logits.shape)}")
    h_ND = to_float64(features) - centers.origin
    targets = targets.to(h_ND.device)
    weight_N = h_ND.new_ones(len(h_ND)) if weights is None else weights.to(h_ND)
    score_NC = torch.addmm(-0.5 * centers.offsets.square().sum(1), h_ND, centers.offsets.T)
    nearest_N = score_NC.masked_fill(~centers.seen, -torch.inf).argmax(1)
    if soft:
        member_NC = targets.double() * weight_N[:, None]
        hits = member_NC.gather(1, nearest_N[:, None]).sum()
        distance_NC = torch.cdist(
            h_ND @ centers.projection.T,
            centers.offsets @ centers.projection.T,
            compute_mode="donot_use_mm_for_euclid_dist",  # exact for the small distances of collapsed classes
        )
        projected_C = (member_NC * distance_NC.square()).sum(0)
        square_C = member_NC.T @ h_ND.square().sum(1) + member_NC.sum(0) * centers.offsets.square().sum(1)
        square_C = (square_C - 2 * (member_NC.T @ h_ND * centers.offsets).sum(1)).clamp(min=0)
    else:
        index_N = targets.long()
        hits = (weight_N * (nearest_N == index_N)).sum()
        residual_ND = h_ND - centers.offsets[index_N]
        projected_N = (residual_ND @ centers.projection.T).square().sum(1)
        projected_C = h_ND.new_zeros(num_classes).index_add_(0, index_N, weight_N * projected_N)
        square_N = residual_ND.square().sum(1)
        square_C = h_ND.new_zeros(num_classes).index_add_(0, index_N, weight_N * square_N)
    if len(centers.projection) == 0:  # no two class means apart: nothing is defined, and zero would read as collapse
        projected_C = torch.full_like(projected_C, torch.nan)
    mismatches = h_ND.new_full((), torch.nan)
    if logits is not None:
        mismatches = (weight_N * (logits.argmax(1).to(nearest_N.device) != nearest_N)).sum()
    return CenterSums(weight_N.sum(), mismatches, hits, projected_C, square_C)
