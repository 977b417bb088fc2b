"""Lengths of vectors of any size: squares overflow in float32 from 1e19 on, and vanish below 1e-23."""

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_feat.functional.common.shapes import check_shapes

_SMALLEST, _LARGEST = 1e-10, 1e15


def tamed(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors ``(..., D)`` divided by a number each, ``(..., 1)``, and that number, so that they can be squared.

    It is the largest entry where that is beyond 1e15 or below 1e-10, else one: ordinary vectors, zeros, and what is not
    finite stay bit for bit. The number gets no gradient, so it is for what the length cancels from, or is multiplied
    back to.

    Example:
        >>> tamed(torch.tensor([[3.0, 4.0], [0.0, 2e30]]))[0]
        tensor([[3., 4.],
                [0., 1.]])
    """
    check_shapes(vectors=(vectors, "*D"))
    if vectors.shape[-1] == 0:
        return vectors, vectors.new_ones(*vectors.shape[:-1], 1)
    largest = vectors.detach().abs().amax(-1, keepdim=True)
    extreme = (largest > _LARGEST) & largest.isfinite() | (largest < _SMALLEST) & (largest > 0)
    size = torch.where(extreme, largest, 1.0)
    return vectors / size, size


def length(vectors: Tensor) -> Tensor:
    """Euclidean lengths ``(...)`` of vectors ``(..., D)``, right wherever they fit the dtype; zero has gradient zero.

    Example:
        >>> length(torch.tensor([[3e30, 4e30]])) / 1e30
        tensor([5.])
    """
    moderate, size = tamed(vectors)
    lengths: Tensor = vector_norm(moderate, dim=-1) * size[..., 0]
    return lengths
