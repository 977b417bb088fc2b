"""What puts vectors on paper: their place in a plane, and an order in which alike stands beside alike."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import to_float64
from lightning_feat.functional.common.shapes import check_shapes


class PrincipalCoordinates(NamedTuple):
    """Where samples lie along the directions of their largest spread."""

    coordinates: Tensor  # (N, K)
    shares: Tensor  # (K,) of the whole spread that each direction has, in [0, 1]; nan where there is none
    directions: Tensor  # (K, D) unit vectors; the entry of largest size is positive
    center: Tensor  # (D,) mean of the samples


def principal_coordinates(features: Tensor, dimensions: int = 2) -> PrincipalCoordinates:
    """Principal component analysis, by the eigenvectors of the ``(D, D)`` covariance or, where it is smaller, of the
    ``(N, N)`` Gram matrix, in float64. K is ``dimensions``, the last of them zero where there are no more directions.

    Args:
        features: ``(N, D)``.
        dimensions: K.

    Raises:
        ValueError: if the shape does not fit.
    """
    check_shapes(features=(features, "ND"))
    h_ND = to_float64(features)
    center_D = h_ND.mean(0) if len(h_ND) else h_ND.new_zeros(h_ND.shape[1])
    h_ND = h_ND - center_D
    n, d = h_ND.shape
    wide = n < d
    value_r, vector = torch.linalg.eigh(h_ND @ h_ND.T if wide else h_ND.T @ h_ND)
    kept = min(dimensions, len(value_r))
    value_K, vector = value_r.flip(0)[:kept].clamp(min=0), vector.flip(1)[:, :kept]
    direction_DK = torch.nn.functional.normalize(h_ND.T @ vector, dim=0) if wide else vector
    if direction_DK.numel():
        largest_K = direction_DK.abs().argmax(0, keepdim=True)
        direction_DK = direction_DK * direction_DK.gather(0, largest_K).sign()
    total = h_ND.square().sum()
    share_K = torch.where(total > 0, value_K / total, torch.nan)
    missing = dimensions - kept
    return PrincipalCoordinates(
        torch.nn.functional.pad(h_ND @ direction_DK, (0, missing)),
        torch.nn.functional.pad(share_K, (0, missing)),
        torch.nn.functional.pad(direction_DK.T, (0, 0, 0, missing)),
        center_D,
    )


def similarity_order(similarity: Tensor) -> Tensor:
    """An order ``(S,)`` in which what is alike stands close: that of the second eigenvector of the Laplacian.

    Source: Atkins, Boman, Hendrickson, "A spectral algorithm for seriation and the consecutive ones problem", SIAM J.
    Comput. 28 (1998). The first of the items stands in the first half.

    Args:
        similarity: ``(S, S)`` symmetric, larger where more alike; nan counts as the least.

    Example:
        >>> similarity_order(torch.tensor([[1.0, 0.0, 0.9], [0.0, 1.0, 0.3], [0.9, 0.3, 1.0]]))
        tensor([0, 2, 1])
    """
    check_shapes(similarity=(similarity, "SS"))
    size = len(similarity)
    if size < 3:
        return torch.arange(size)
    value_SS = to_float64(similarity)
    finite = value_SS[value_SS.isfinite()]
    least = finite.min() if len(finite) else value_SS.new_zeros(())
    weight_SS = (torch.where(value_SS.isfinite(), value_SS, least) - least).fill_diagonal_(0)
    laplacian_SS = torch.diag(weight_SS.sum(1)) - weight_SS
    place_S = torch.linalg.eigh(laplacian_SS).eigenvectors[:, 1]
    order_S = place_S.argsort(stable=True)
    first = int((order_S == 0).nonzero())
    return order_S.flip(0) if first > (size - 1) / 2 else order_S
