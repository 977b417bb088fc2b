"""How class subspaces lie to one another, and how far they have moved; from a basis (C, k, D) with orthonormal rows.

Shapes: C classes, k dimensions of a subspace, D features, P pairs of classes.
"""

import torch
from torch import Tensor

from lightning_feat.functional.grassmann import geodesic_distance, principal_angles
from lightning_feat.functional.grassmann.angles import pairwise_principal_angles

_BLOCK_BYTES = 64 * 2**20  # of the bases of the pairs that are compared at once


@torch.no_grad()
def subspace_angles(basis: Tensor, max_pairs: int = 10_000, seed: int = 0) -> Tensor:
    """Principal angles between class subspaces ``(P, k)``, ascending in each pair, in radians.

    Of all ``C (C - 1) / 2`` pairs where these are at most ``max_pairs`` (up to 141 classes by default); else of
    ``max_pairs`` different pairs, drawn by ``seed`` without touching the global random numbers, the same ones at every
    call. The smallest angle of a sample is not the smallest of all.
    """
    num_classes = len(basis)
    all_pairs = num_classes * (num_classes - 1) // 2
    if max_pairs < 1:
        raise ValueError(f"max_pairs={max_pairs} must be at least 1.")
    if all_pairs <= max_pairs:
        return pairwise_principal_angles(basis)
    lots_P = _distinct(all_pairs, max_pairs, torch.Generator().manual_seed(seed))
    first_P, second_P = (place.to(basis.device) for place in _pair_of(lots_P))
    block = max(1, _BLOCK_BYTES // (basis[0].numel() * basis.element_size()))
    angles = [
        principal_angles(basis[i], basis[j]) for i, j in zip(first_P.split(block), second_P.split(block), strict=True)
    ]
    return torch.cat(angles)


@torch.no_grad()
def subspace_distances(basis: Tensor, start: Tensor) -> Tensor:
    """Geodesic distance of each class subspace from where it started, ``(C,)``, in radians: at most sqrt(k) pi / 2."""
    if basis.shape != start.shape:
        raise ValueError(f"the subspaces have shape {tuple(basis.shape)} but started as {tuple(start.shape)}.")
    block = max(1, _BLOCK_BYTES // (basis[0].numel() * basis.element_size()))
    pairs = zip(basis.split(block), start.split(block), strict=True)
    return torch.cat([geodesic_distance(now, then.to(now)) for now, then in pairs])


def _distinct(size: int, number: int, generator: torch.Generator) -> Tensor:
    """``number`` different integers below ``size``, ascending, in memory that does not grow with ``size``."""
    if size <= 4 * number:
        return torch.randperm(size, generator=generator)[:number].sort().values
    drawn = torch.randint(size, (2 * number,), generator=generator).unique()  # at least 7 / 4 of number, but for luck
    while len(drawn) < number:
        drawn = torch.cat([drawn, torch.randint(size, (number,), generator=generator)]).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)[:number]].sort().values


def _pair_of(lots_P: Tensor) -> tuple[Tensor, Tensor]:
    """The pair ``(i, j)``, i < j, that stands at place ``j (j - 1) / 2 + i`` of all pairs."""
    j_P = ((1 + (1 + 8 * lots_P.double()).sqrt()) / 2).floor().long()
    j_P = j_P - (j_P * (j_P - 1) // 2 > lots_P).long()  # rounding at a whole number
    j_P = j_P + (j_P * (j_P + 1) // 2 <= lots_P).long()
    return lots_P - j_P * (j_P - 1) // 2, j_P
