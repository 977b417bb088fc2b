"""The directions that class means span, told from those that are nothing but the rounding of the features.

A network leaves some directions of its features empty: one behind a LayerNorm, all but k behind a bottleneck of width
k. What is found there is the rounding of the dtype that the features were computed in, and a pseudo-inverse would blow
it up until it hides all else.

Shapes: D features, S classes with samples, R directions spanned by their means, R < S; m the smaller of S and D.
"""

import math

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import (
    ClassSums,
    GlobalMean,
    centered_class_means,
    present_class_means,
)
from lightning_feat.functional.common.shapes import check_shapes

# What accumulates in a LayerNorm, or in a product as wide as a network's, is up to 1.3 times the bound that
# between_class_directions makes of a single eps (widths 64 to 384, 100 to 1000 classes); half precision is rounded but
# once, where it is stored, and stays below 0.3 times.
_ROUNDINGS = 16
# Eigenvalues of a Gram matrix are right to 2e-16 of the largest: singular values below 1e-2 of it are sought again.
_LARGE = 1e-4
_EPS = torch.finfo(torch.float64).eps


def rounding_of(dtype: torch.dtype) -> float:
    """Relative size below which a direction of features of this dtype is taken for rounding.

    That is one eps of the dtype where it is a half precision, as such features are computed in float32 and rounded
    once, and 16 of the dtype that they are computed in else.

    Example:
        >>> [f"{rounding_of(dtype):.1e}" for dtype in (torch.float64, torch.float32, torch.bfloat16)]
        ['3.6e-15', '1.9e-06', '7.8e-03']
    """
    if not dtype.is_floating_point:  # what is made of whole numbers
        dtype = torch.float32
    computed = torch.promote_types(dtype, torch.float32)
    return max(torch.finfo(dtype).eps, _ROUNDINGS * torch.finfo(computed).eps)


FLOAT32_ROUNDING = rounding_of(torch.float32)


def between_class_directions(
    totals: ClassSums, global_mean: GlobalMean = "classes", rounding: float = FLOAT32_ROUNDING
) -> tuple[Tensor, Tensor]:
    """Singular values ``(R,)`` and orthonormal directions ``(R, D)`` of the centred class means, largest first.

    Centred means are linearly dependent, so at most ``S - 1`` directions are kept, whatever rounding puts into the next
    one; fewer where class means coincide or leave directions empty, up to the rounding of the features: two classes
    count as apart where their means differ, in float32, by some 5e-6 of their length. R is zero where nothing can be
    said: fewer than two classes, no features, or means that are not finite. Costs the eigenvectors of a Gram matrix of
    the smaller of S and D.

    Args:
        totals: sums of the features.
        global_mean: what class means are centred by.
        rounding: relative rounding of the features, :func:`rounding_of` their dtype.
    """
    mean_SD = centered_class_means(totals, global_mean)
    size, width = mean_SD.shape
    if size < 2 or width == 0 or not mean_SD.isfinite().all():
        return mean_SD.new_zeros(0), mean_SD.new_zeros(0, width)
    value_R, direction_RD = thin_svd(mean_SD)
    value_R, direction_RD = value_R[: size - 1], direction_RD[: size - 1]
    # Entries with errors of some share of their size make errors of this size along a direction, and more in the
    # worst of all directions where there are many.
    squares_D = present_class_means(totals).square().sum(0)
    off_R = rounding * (1 + math.sqrt(width / size)) * (direction_RD.square() @ squares_D).sqrt()
    kept = value_R > off_R
    return value_R[kept], direction_RD[kept]


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, largest first, and right singular vectors ``(r, D)`` of a float64 ``(S, D)`` matrix.

    Those below the rounding of the largest are left out, so r is the rank. By the eigenvectors of the smaller Gram
    matrix, a third of the time of an SVD or less. What a Gram matrix does not resolve, singular values below 1e-2 of
    the largest, is sought again in what is left of the matrix in their directions, so that all are as right as those
    of an SVD.

    Raises:
        ValueError: if a value is not finite.
    """
    check_shapes(matrix=(matrix, "SD"))
    if not matrix.isfinite().all():
        raise ValueError("thin_svd needs a matrix of finite numbers: leave the rows with NaN or inf out.")
    return _thin_svd(matrix, None)


def _thin_svd(matrix: Tensor, floor: Tensor | None) -> tuple[Tensor, Tensor]:
    if matrix.numel() == 0:
        return matrix.new_zeros(0), matrix.new_zeros(0, matrix.shape[1])
    wide = matrix.shape[0] <= matrix.shape[1]
    square_m, vector_mm = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    square_m, vector_mm = square_m.flip(0), vector_mm.flip(1)
    floor = _EPS * max(matrix.shape) * square_m[:1].clamp(min=0).sqrt() if floor is None else floor
    number = int((square_m > (_LARGE * square_m[0]).maximum(floor.square()[0])).sum())
    if number == 0:
        return matrix.new_zeros(0), matrix.new_zeros(0, matrix.shape[1])
    value_r, large_mr = square_m[:number].sqrt(), vector_mm[:, :number]
    direction_rD = (large_mr.T @ matrix) / value_r[:, None] if wide else large_mr.T
    if number == len(square_m):
        return value_r, direction_rD
    small_ms = vector_mm[:, number:]
    if wide:
        rest_sD = small_ms.T @ matrix
        rest_sD = rest_sD - rest_sD @ direction_rD.T @ direction_rD  # of which rounding has left a trace
        rest_value, rest_direction = _thin_svd(rest_sD, floor)
    else:
        rest_value, rest_direction = _thin_svd(matrix @ small_ms, floor)
        rest_direction = rest_direction @ small_ms.T
    return torch.cat([value_r, rest_value]), torch.cat([direction_rD, rest_direction])
