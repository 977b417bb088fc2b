"""Which samples lie nearest to each other, by the angle between their features."""

import torch
from torch import Tensor

from lightning_feat.functional.common.lengths import tamed
from lightning_feat.functional.common.shapes import check_shapes

_BLOCK = 2**22  # products held at once: 16 MiB in float32


def nearest_neighbours(features: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The samples of largest cosine with each sample, itself left out.

    In float32 at least and in blocks: ``2 N^2 D`` operations, and 16 MiB beside the features. Neither features nor
    classes are centred. A sample of length zero has cosine zero with all others.

    Args:
        features: ``(N, D)``.
        most: of each sample; fewer where there are no more, K in all.

    Returns:
        Their indices and their cosines, ``(N, K)`` each, the nearest first.

    Raises:
        ValueError: if the shape does not fit, or ``most`` is below one.

    Example:
        >>> nearest_neighbours(torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 1.0]]), 1)[0].flatten()
        tensor([2, 2, 0])
    """
    check_shapes(features=(features, "ND"))
    if most < 1:
        raise ValueError(f"most={most}: give at least one neighbour.")
    wide = torch.promote_types(features.dtype, torch.float32)
    unit_ND = torch.nn.functional.normalize(tamed(features.detach().to(wide))[0], dim=1)
    size = len(unit_ND)
    kept = min(most, max(0, size - 1))
    index_NK = torch.zeros(size, kept, dtype=torch.long, device=features.device)
    cosine_NK = torch.zeros(size, kept, dtype=wide, device=features.device)
    step = max(1, _BLOCK // max(1, size))
    for first in range(0, size, step):
        rows = slice(first, min(first + step, size))
        cosine_BN = unit_ND[rows] @ unit_ND.T
        here = torch.arange(rows.start, rows.stop, device=features.device)
        cosine_BN[here - first, here] = -torch.inf
        cosine_NK[rows], index_NK[rows] = cosine_BN.topk(kept, dim=1)
    return index_NK, cosine_NK


def neighbour_accuracy(neighbours: Tensor, targets: Tensor) -> Tensor:
    """Share of samples whose class is that of most of their neighbours; of equally many, the class of the nearest one
    decides. Scalar, float64; nan without samples or neighbours.

    Args:
        neighbours: ``(N, K)`` as ``nearest_neighbours`` gives them.
        targets: ``(N,)`` class indices.

    Raises:
        ValueError: if the shapes do not fit, or there is no such neighbour.
    """
    check_shapes(neighbours=(neighbours, "NK", int), targets=(targets, "N", int))
    if neighbours.numel() == 0:
        return torch.tensor(torch.nan, dtype=torch.float64, device=targets.device)
    if int(neighbours.min()) < 0 or int(neighbours.max()) >= len(targets):
        raise ValueError(
            f"neighbours lie between {int(neighbours.min())} and {int(neighbours.max())}, of {len(targets)} samples."
        )
    class_NK = targets[neighbours]
    votes_NK = (class_NK[:, :, None] == class_NK[:, None, :]).sum(2)
    chosen_N = class_NK.gather(1, votes_NK.argmax(1, keepdim=True))[:, 0]  # the first of the largest is the nearest
    return (chosen_N == targets).double().mean()
