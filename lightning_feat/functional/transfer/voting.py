"""Classes of new samples by their nearest neighbours among labelled ones.

Shapes: N labelled samples, M new ones, D features, C classes, K neighbours, B new samples in a block.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_feat.functional.common.class_sums import check_target_range
from lightning_feat.functional.common.lengths import tamed
from lightning_feat.functional.common.shapes import check_shapes

_BLOCK = 2**24  # cosines held at once: 64 MiB in float32


def neighbour_votes(
    features: Tensor,
    targets: Tensor,
    queries: Tensor,
    num_classes: int,
    num_neighbours: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    r"""Votes of the labelled samples of largest cosine: each of K neighbours adds :math:`\exp(s / \tau)` to its class.

    The weighted k-NN classifier of instance discrimination (Wu, Xiong, Yu, Lin, "Unsupervised feature learning via
    non-parametric instance discrimination", CVPR 2018, arXiv 1805.01978, with K = 200; DINO takes 20, both
    :math:`\tau` = 0.07). Nothing is fitted. In float32 at least and in blocks: ``2 M N D`` operations, and 64 MiB
    beside the features.

    Args:
        features: ``(N, D)``; one of length zero has cosine zero with all others.
        targets: ``(N,)`` class indices.
        queries: ``(M, D)``.
        num_classes: C.
        num_neighbours: K; all where there are no more.
        temperature: :math:`\tau`; infinite lets all neighbours count the same.

    Returns:
        ``(M, C)`` shares of the votes, each row with sum one; nan without labelled samples, or where a query is not
        finite.

    Raises:
        ValueError: if shapes or class indices do not fit, a labelled feature is not finite, K is below one or the
            temperature not above zero.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> votes = neighbour_votes(features, torch.tensor([0, 0, 1]), torch.tensor([[2.0, 0.1]]), 2, 3, float("inf"))
        >>> votes
        tensor([[0.6667, 0.3333]])
    """
    check_shapes(features=(features, "ND"), targets=(targets, "N", int), queries=(queries, "MD"))
    check_target_range(targets, num_classes)
    if num_neighbours < 1 or temperature <= 0:
        raise ValueError(f"{num_neighbours=} must be at least one, and {temperature=} above zero.")
    if not features.isfinite().all():
        raise ValueError("labelled features are NaN or infinite: leave these samples out.")
    unit_ND, unit_MD = _unit(features), _unit(queries)
    kept = min(num_neighbours, len(unit_ND))
    votes_MC = unit_MD.new_full((len(unit_MD), num_classes), torch.nan)
    step = max(1, _BLOCK // max(1, len(unit_ND)))
    for first in range(0, len(unit_MD) if kept else 0, step):
        rows = slice(first, first + step)
        cosine_BK, index_BK = (unit_MD[rows] @ unit_ND.T).topk(kept, dim=1, sorted=False)
        share_BK = (cosine_BK / temperature).softmax(1)
        block_BC = share_BK.new_zeros(len(share_BK), num_classes)
        votes_MC[rows] = block_BC.scatter_add_(1, targets[index_BK].long(), share_BK)
    return votes_MC


def _unit(features: Tensor) -> Tensor:
    wide = features.detach().to(torch.promote_types(features.dtype, torch.float32))
    return normalize(tamed(wide)[0], dim=1)
