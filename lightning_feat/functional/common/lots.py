"""A seeded draw that looks at the index of a sample alone, so that it is the same however batches and processes share
the samples.
"""

import torch
from torch import Tensor

from lightning_feat.functional.common.shapes import check_shapes

_PRIME = 2**31 - 1


def lots(indices: Tensor, seed: int) -> Tensor:
    """A number for each index that looks drawn, ``(N,)`` int64; the same index always has the same.

    A permutation of 1 to 2^31 - 2 by two multiplications, with a shift between that breaks their lattice.
    """
    check_shapes(indices=(indices, "N", int))
    lot = (indices.long() + 1 + seed % 65521 * 7919) % _PRIME * 1583458089 % _PRIME
    lot = lot ^ (lot >> 13)
    return lot * 784588716 % _PRIME * 2**22 + indices.long() % 2**22  # the rest only breaks ties


def lowest_lots(indices: Tensor, most: int, seed: int) -> Tensor:
    """Which rows to keep, ``(n,)`` places in ascending order of ``indices``: of a union they are those of its parts.

    Args:
        indices: ``(N,)`` of the rows, in the whole data.
        most: how many.
        seed: of the draw.

    Example:
        >>> kept = lowest_lots(torch.arange(100), 10, seed=0)
        >>> parts = [p[lowest_lots(p, 10, seed=0)] for p in torch.arange(100).split(33)]
        >>> union = torch.cat(parts)
        >>> torch.equal(union[lowest_lots(union, 10, seed=0)], kept)
        True
    """
    check_shapes(indices=(indices, "N", int))
    if len(indices) > most:
        places = lots(indices, seed).argsort()[:most]
    else:
        places = torch.arange(len(indices), device=indices.device)
    return places[indices[places].argsort()]
