"""How far the directions of features tell the classes apart, and how much of their variety a class keeps.

Both look at directions alone: a feature that is zero has none and is left out. Both come from sums: those of two
disjoint sets of samples add up to those of their union for the class separation; for the variability they add up to
all pairs but those with one sample in each set.

Shapes: N samples, D features, C classes, S classes with samples, A and B samples in a block.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_feat.functional.common.class_sums import (
    ClassSums,
    accumulation_device,
    add_class_sums_,
    check_target_range,
    empty_class_sums,
    present_class_means,
    to_float64,
)
from lightning_feat.functional.common.directions import FLOAT32_ROUNDING
from lightning_feat.functional.common.looks import looks_are_forbidden, values_are_at_hand
from lightning_feat.functional.common.shapes import check_shapes

_BLOCK = 1024  # samples on either side of the cosines held at once: 8 MiB, and as many again for the angles


class PairAngleSums(NamedTuple):
    """Sums over pairs of different samples of one class. They add, entry by entry, over sets of pairs."""

    angles: Tensor  # (C,) sum of the angles between the features of a pair, in radians
    pairs: Tensor  # (C,) pairs


def add_direction_sums_(
    totals: ClassSums, features: Tensor, targets: Tensor, weights: Tensor | None = None
) -> ClassSums:
    """Add a batch to ``totals`` in place and return them. The arguments are those of :func:`direction_sums`."""
    unit_ND, length_N = _directions(features)
    has_direction_N = (length_N > 0).double()
    return add_class_sums_(
        totals, unit_ND, targets, has_direction_N if weights is None else has_direction_N * weights.to(unit_ND)
    )


def direction_sums(features: Tensor, targets: Tensor, num_classes: int, weights: Tensor | None = None) -> ClassSums:
    """``functional.common.class_sums`` of the features divided by their lengths, in float64.

    The arguments, and the errors, are those of ``class_sums``; soft targets count in part for several classes. A
    feature that is zero counts for none.
    """
    width = features.shape[-1] if features.ndim else 0
    totals = empty_class_sums(num_classes, width, accumulation_device(features.device))
    return add_direction_sums_(totals, features, targets, weights)


def class_separation_r2(totals: ClassSums, rounding: float = FLOAT32_ROUNDING) -> Tensor:
    r"""Class separation: the share of the variety of directions that lies between the classes.

    .. math:: R^2 = 1 - \frac{d_{within}}{d_{total}}, \quad
        d_{within} = \frac{1}{C} \sum_c \frac{1}{N_c^2} \sum_{a, b \in c} (1 - \cos(h_a, h_b)), \quad
        d_{total} = \frac{1}{C^2} \sum_{c, c'} \frac{1}{N_c N_{c'}} \sum_{a \in c, b \in c'} (1 - \cos(h_a, h_b))

    A sample with itself counts as a pair, and a class with itself, as in the source: Kornblith, Chen, Lee, Norouzi,
    "Why do better loss functions lead to less transferable features?", NeurIPS 2021, arXiv 2010.16402. With the means
    :math:`m_c` of the unit features both are sums over classes: :math:`1 - \overline{\lVert m_c \rVert^2}` and
    :math:`1 - \lVert \overline{m_c} \rVert^2`.

    Args:
        totals: from :func:`direction_sums`, not from ``class_sums``. Classes without samples are left out.
        rounding: relative rounding of the features, ``functional.common.directions.rounding_of`` their dtype.

    Returns:
        Scalar, float64, in [0, 1]: one where each class has one direction of its own, zero where the class means agree.
        nan without samples, or where all directions are the same up to rounding.

    Raises:
        ValueError: if the sums are not those of unit features.

    Example:
        >>> features = torch.tensor([[2.0, 0.0], [9.0, 0.0], [0.0, 1.0], [0.0, 5.0]])
        >>> class_separation_r2(direction_sums(features, torch.tensor([0, 0, 1, 1]), num_classes=2))
        tensor(1., dtype=torch.float64)
    """
    off = (totals.squares - totals.counts).abs()
    if (off > 1e-9 * totals.counts).any():  # rounding of float64 leaves 1e-15; nan passes, and comes out as nan
        raise ValueError(
            "class_separation_r2 needs the sums of features of length one, and the mean squared lengths here are up to "
            f"{float(off.max() / totals.counts.max()):.2g} off one: make the sums with direction_sums."
        )
    mean_SD = present_class_means(totals)
    within = 1 - mean_SD.square().sum(1).mean()
    total = 1 - mean_SD.mean(0).square().sum()
    spread = total > max(1e-14, rounding**2)  # below it is none
    # Zero divided by zero would have no gradient, also where it is not chosen.
    return torch.where(spread, 1 - within / torch.where(spread, total, 1.0), torch.nan)


def pair_angle_sums(
    features: Tensor, targets: Tensor, num_classes: int, weights: Tensor | None = None
) -> PairAngleSums:
    """Angles between all pairs of samples of one class, summed for each class, in float64.

    Computed in blocks: at most ``N (N_c + 1024) D`` products and 32 MiB beside the features in float64, with N_c the
    size of the largest class. Up to 1024 samples nothing waits for the device. For larger data measure a
    :func:`sample_of_each_class`.

    Args:
        features: ``(N, D)``, any floating dtype; N may be zero.
        targets: ``(N,)`` class indices in ``[0, num_classes)``; soft targets belong to no class and are refused.
        num_classes: number of classes C, counting those absent.
        weights: ``(N,)``, zero to leave a sample out, else one; None counts all. A feature that is zero is left out.

    Raises:
        ValueError: if shapes or dtypes do not fit, or a class index is out of range (checked on the CPU alone).
    """
    if features.ndim != 2 or targets.shape != features.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"pair_angle_sums needs features (N, D) and integer targets (N,), got {tuple(features.shape)} and "
            f"{tuple(targets.shape)} {targets.dtype}: pool feature maps first, and give class indices for soft targets."
        )
    unit_ND, length_N = _directions(features)
    target_N = targets.to(unit_ND.device).long()
    if values_are_at_hand(target_N):
        check_target_range(target_N, num_classes)
    counts_N = length_N > 0
    if weights is not None:
        counts_N = counts_N & (weights.to(unit_ND.device) > 0)
    target_N, order_N = target_N.sort(stable=True)
    unit_ND, counts_N = unit_ND[order_N], counts_N[order_N]
    angle_C, pairs_C = unit_ND.new_zeros(num_classes), unit_ND.new_zeros(num_classes)
    place_N = torch.arange(len(target_N), device=unit_ND.device)
    for a in range(0, len(target_N), _BLOCK):
        rows = slice(a, a + _BLOCK)
        last = target_N[rows][-1:]
        # Sorted by class: what follows the class of the last row shares no class with any row of the block.
        to_the_end = a + _BLOCK >= len(target_N) or looks_are_forbidden()
        end = len(target_N) if to_the_end else int(torch.searchsorted(target_N, last, right=True))
        for b in range(a, end, _BLOCK):
            columns = slice(b, min(b + _BLOCK, end))
            pair_AB = (target_N[rows, None] == target_N[columns]) & (place_N[rows, None] < place_N[columns])
            pair_AB &= counts_N[rows, None] & counts_N[columns]
            angle_AB = _angles(unit_ND[rows] @ unit_ND[columns].T)
            angle_C.index_add_(0, target_N[rows], torch.where(pair_AB, angle_AB, 0.0).sum(1))
            pairs_C.index_add_(0, target_N[rows], pair_AB.sum(1).double())
    return PairAngleSums(angle_C, pairs_C)


def _angles(cosines: Tensor) -> Tensor:
    """Their angles in radians; at 0 and at pi, where the slope has no bound, the gradient is zero."""
    end = cosines.abs() >= 1
    return torch.where(end, torch.pi * (cosines < 0).to(cosines.dtype), torch.where(end, 0.0, cosines).acos())


def within_class_variability(totals: PairAngleSums) -> Tensor:
    """Mean angle between two samples of the same class, averaged over classes, in degrees: scalar, float64.

    Zero where each class has a single direction, 90 for directions at random in a wide space. A sample with itself is
    no pair. Classes without a pair are left out; nan where there is none. Source: the variability of Wang, Li, Zhang,
    ICCV 2023, arXiv 2308.01547.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])  # 90, 90 and 180 degrees
        >>> within_class_variability(pair_angle_sums(features, torch.tensor([0, 0, 0]), num_classes=1)).round()
        tensor(120., dtype=torch.float64)
    """
    seen_C = totals.pairs > 0
    return (totals.angles[seen_C] / totals.pairs[seen_C]).mean().rad2deg()


def sample_of_each_class(targets: Tensor, most: int, seed: int = 0, indices: Tensor | None = None) -> Tensor:
    """Places, ascending, of at most ``most`` samples of each class, chosen as if at random by the index of a sample.

    The choice from a union is the choice from the choices of its parts, so that batches and processes can each keep
    their own; it depends on the indices, not on the order of the samples.

    Args:
        targets: ``(N,)`` class indices.
        most: samples to keep of each class.
        seed: of the choice.
        indices: ``(N,)`` number of each sample in its data set, below 2^31; None counts from zero.

    Example:
        >>> sample_of_each_class(torch.tensor([7, 7, 3, 7, 3, 3]), most=1)
        tensor([0, 5])
    """
    check_shapes(targets=(targets, "N", int))
    if most < 1 or targets.ndim != 1:
        raise ValueError(f"most={most} must be at least 1 and targets (N,) class indices, got {tuple(targets.shape)}")
    index_N = torch.arange(len(targets), device=targets.device) if indices is None else indices.to(targets.device)
    order_N = _scatter(index_N, seed).argsort(stable=True)
    order_N = order_N[targets[order_N].argsort(stable=True)]  # by class, within it by lot
    sorted_N = targets[order_N].contiguous()
    first_N = torch.searchsorted(sorted_N, sorted_N)
    return order_N[torch.arange(len(targets), device=targets.device) - first_N < most].sort().values


def _directions(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features of length one, float64, and their lengths before; zero stays zero."""
    h_ND = to_float64(features)
    if h_ND.ndim != 2:
        raise ValueError(f"features must be (N, D), got {tuple(features.shape)}: pool or flatten feature maps first.")
    length_N: Tensor = vector_norm(h_ND, dim=1)
    return h_ND / torch.where(length_N > 0, length_N, 1.0)[:, None], length_N


def _scatter(index_N: Tensor, seed: int) -> Tensor:
    """A lot for each index, the same on every machine: multiplications modulo the prime 2^31 - 1, bits mixed between.

    Both factors are primitive roots of that prime; L'Ecuyer, Math. Comp. 68 (1999), lists them.
    """
    prime = 2**31 - 1
    lot_N = (index_N.long() + 1) % prime * 1583458089 % prime
    lot_N = (lot_N ^ (lot_N >> 15)) + (seed * 40014 + 1) % prime
    lot_N = lot_N % prime * 784588716 % prime
    lot_N = (lot_N ^ (lot_N >> 13)) % prime
    return lot_N * 1583458089 % prime
