"""Functions of matrices whose gradient is defined where singular values coincide, as autograd's of ``svd`` is not.

Shapes: k the size of a matrix.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class OrthogonalFactor(torch.autograd.Function):
    """The orthogonal matrix ``(..., k, k)`` nearest to a matrix, its polar factor; differentiable once.

    Where the matrix is singular there are several such, and this is one; the gradient leaves out what it does not
    define.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        u, value, vh = torch.linalg.svd(matrix)
        ctx.save_for_backward(u, value, vh)
        return u @ vh

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        u, value, vh = ctx.saved_tensors
        turned = u.mT @ gradients[0] @ vh.mT
        both = value[..., :, None] + value[..., None, :]
        defined = both > torch.finfo(both.dtype).eps
        share = torch.where(defined, (turned - turned.mT) / torch.where(defined, both, 1.0), 0.0)
        return u @ share @ vh


class AngleOverSine(torch.autograd.Function):
    r"""The function :math:`\theta / \sin \theta`, of the angles with these cosines, of a symmetric matrix of cosines.

    It is ``(..., k, k)`` with eigenvalues in [0, 1] up to rounding, and the result has some in [1, pi / 2];
    differentiable once.
    """

    @staticmethod
    def forward(ctx: Any, cosines: Tensor) -> Tensor:
        cosine, vector = torch.linalg.eigh((cosines + cosines.mT) / 2)
        ctx.save_for_backward(cosine, vector)
        return (vector * _stretch(cosine)[..., None, :]) @ vector.mT

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        cosine, vector = ctx.saved_tensors
        value = _stretch(cosine)
        gap = cosine[..., :, None] - cosine[..., None, :]
        apart = gap.abs() > torch.finfo(gap.dtype).eps ** 0.5
        # Of a matrix function the derivative is made of divided differences (Daleckii and Krein).
        middle = (cosine[..., :, None] + cosine[..., None, :]) / 2
        quotient = (value[..., :, None] - value[..., None, :]) / torch.where(apart, gap, 1.0)
        slope = torch.where(apart, quotient, _stretch_slope(middle))
        turned = vector.mT @ gradients[0] @ vector
        found = vector @ (turned * slope) @ vector.mT
        return (found + found.mT) / 2


def _stretch(cosine: Tensor) -> Tensor:
    """``acos(c) / sqrt(1 - c^2)``; by its series where that is 0 / 0, to 1e-13."""
    off = 1 - cosine.clamp(-0.5, 1.5)
    near = off < 1e-3
    series = 1 + off / 3 + 2 * off**2 / 15 + 2 * off**3 / 35 + 8 * off**4 / 315
    safe = torch.where(near, 0.5, 1 - off)
    return torch.where(near, series, safe.acos() / (1 - safe.square()).sqrt())


def _stretch_slope(cosine: Tensor) -> Tensor:
    """Its derivative, ``(c f - 1) / (1 - c^2)``."""
    off = 1 - cosine.clamp(-0.5, 1.5)
    near = off < 1e-3
    series = -(1 / 3 + 4 * off / 15 + 6 * off**2 / 35 + 32 * off**3 / 315)
    safe = torch.where(near, 0.5, 1 - off)
    return torch.where(near, series, (safe * _stretch(safe) - 1) / (1 - safe.square()))
