"""Angles between all pairs of a stack of subspaces, in memory that does not grow with the square of their number.

Shapes: C classes, k dimensions of a subspace, D features, P = C (C - 1) / 2 pairs, B classes in a block.
"""

import torch
from torch import Tensor

from lightning_feat.functional.grassmann.subspaces import principal_angles, svdvals_or_nan

_BLOCK_ELEMENTS = 2**24  # float64 entries of the (B, C, k, k) cosines held at once: 128 MiB
_NEAR = 0.9995  # cosine up to which its rounding of 2e-16 leaves an angle right to 1e-14


@torch.no_grad()
def pairwise_principal_angles(basis: Tensor) -> Tensor:
    """Principal angles of every pair of subspaces, ``(P, k)``, ascending, in radians, pairs in the order of ``pdist``.

    Those of ``principal_angles``, in float64: from the cosines alone where no angle is small, else from the sines too.
    Not differentiable. ``P * k * 8`` bytes and ``P`` singular value decompositions of k x k
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
        cosine_Pk = svdvals_or_nan(cosines[i, j])
        angle_Pk = cosine_Pk.clamp(max=1).acos()
        if k:
            near = (cosine_Pk[:, 0] > _NEAR).nonzero()[:, 0]
            for part in near.split(max(1, _BLOCK_ELEMENTS // max(1, here_BkD[0].numel()))):
                angle_Pk[part] = principal_angles(rows[first + i[part]], rows[first + j[part]])
        angles.append(angle_Pk)
    return torch.cat(angles)
