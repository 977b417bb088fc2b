"""Angles between all pairs of a stack of subspaces, in memory that does not grow with the square of their number.

Shapes: C classes, k dimensions of a subspace, D features, P = C (C - 1) / 2 pairs, B classes in a block.
"""

import torch
from torch import Tensor

from lightning_feat.functional.grassmann.subspaces import svdvals_or_nan

_BLOCK_ELEMENTS = 2**24  # float64 entries of the (B, C, k, k) cosines held at once: 128 MiB


@torch.no_grad()
def pairwise_principal_angles(basis: Tensor) -> Tensor:
    """Principal angles of every pair of subspaces, ``(P, k)``, ascending, in radians, pairs in the order of ``pdist``.

    From the cosines alone, in float64: an angle below 1e-7 rad may come out as zero. Not differentiable; see
    ``principal_angles`` for single pairs. ``P * k * 8`` bytes and ``P`` singular value decompositions of k x k
    matrices: 4 MB and some seconds on a CPU at C = 1000, k = 8.

    Args:
        basis: ``(C, k, D)``, orthonormal rows.
    """
    num_classes, k, _ = basis.shape
    rows = (basis.cpu() if basis.device.type == "mps" else basis).double()
    block = max(1, _BLOCK_ELEMENTS // max(1, num_classes * k * k))
    angles = [rows.new_zeros(0, k)]
    for first in range(0, num_classes, block):
        here_BkD = rows[first : first + block]
        cosines = torch.einsum("bkd,cld->bckl", here_BkD, rows[first:])
        i, j = torch.triu_indices(len(here_BkD), cosines.shape[1], 1, device=rows.device)
        angles.append(svdvals_or_nan(cosines[i, j]).clamp(max=1).acos())
    return torch.cat(angles)
