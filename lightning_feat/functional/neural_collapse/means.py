"""NC2, the figure that class means or classifier rows make; on a Grassmann head, the figure of its subspaces.

The functions of ``vectors`` take any ``(S, D)``: :func:`centered_class_means` or the rows of a classifier. What they
compare with is what you give: centre class means first; classifier rows are commonly taken as they are. Every value is
a float64 scalar, unchanged when all vectors are rotated or scaled together, nan for fewer than two vectors or zeros.
Random directions already come near a simplex when D is much larger than S (S = 10, D = 512: an ETF error of 0.13), so
compare with the value at the start of training.

Shapes: S vectors, D features, P = S (S - 1) / 2 pairs, C class subspaces of k dimensions.
"""

import torch
from torch import Tensor
from torch.linalg import matrix_norm, vector_norm

from lightning_feat.functional.common.class_sums import to_float64
from lightning_feat.functional.common.shapes import check_shapes
from lightning_feat.functional.neural_collapse.pairs import PairStatistics, pair_statistics


def _normalized(vectors: Tensor) -> Tensor:
    check_shapes(vectors=(vectors, "SD"))
    v_SD = to_float64(vectors)
    unit_SD: Tensor = v_SD / vector_norm(v_SD, dim=1, keepdim=True)
    return unit_SD


def cosine_matrix(vectors: Tensor) -> Tensor:
    """Cosines between all vectors, ``(S, S)``."""
    unit_SD = _normalized(vectors)
    return unit_SD @ unit_SD.T


def gram_error(gram: Tensor, target: Tensor) -> Tensor:
    """Frobenius distance of two matrices scaled to unit norm: zero where proportional, at most 2, nan if empty."""
    check_shapes(gram=(gram, "AB"), target=(target, "AB"))
    gram, target = to_float64(gram), to_float64(target)
    if gram.numel() == 0:
        return gram.new_full((), torch.nan)
    error: Tensor = matrix_norm(gram / matrix_norm(gram) - target / matrix_norm(target))
    return error


def simplex_gram(num_classes: int, device: torch.device | None = None) -> Tensor:
    """Gram matrix of a simplex, ``(C, C)`` float64: ``I - 1/C``, the projection away from the vector of ones."""
    return torch.eye(num_classes, dtype=torch.float64, device=device) - 1 / max(num_classes, 1)


def nc2_etf_error(vectors: Tensor) -> Tensor:
    r"""Distance to a simplex: :math:`\lVert G / \lVert G \rVert_F - (I - 11^\top/S) / \sqrt{S-1} \rVert_F`, with
    :math:`G = V V^\top`. It cannot reach zero when ``D < S - 1``. Source: Zhu et al., NeurIPS 2021.
    """
    check_shapes(vectors=(vectors, "SD"))
    v_SD = to_float64(vectors)
    return gram_error(v_SD @ v_SD.T, simplex_gram(len(v_SD), v_SD.device))


def nc2_equinorm(vectors: Tensor) -> Tensor:
    """Standard deviation (over S - 1) of the norms over their mean. Source: Papyan, Han, Donoho, PNAS 2020."""
    check_shapes(vectors=(vectors, "SD"))
    norm_S: Tensor = vector_norm(to_float64(vectors), dim=1)
    return norm_S.std() / norm_S.mean() if len(norm_S) > 1 else norm_S.new_full((), torch.nan)


def _over_pairs(vectors: Tensor, kind: str) -> PairStatistics:
    check_shapes(vectors=(vectors, "SD"))
    return pair_statistics(to_float64(vectors), [kind])[kind]


def nc2_equiangularity(vectors: Tensor) -> Tensor:
    """Mean over pairs of ``|cos + 1 / (S - 1)|``: how far from the widest equal angles. Source: Papyan, Han, Donoho.

    Not to be read when ``D < S - 1``: no simplex fits there, see :func:`nc2_log_distance_mean`.
    """
    return _over_pairs(vectors, "off_simplex").mean


def nc2_cosine_std(vectors: Tensor) -> Tensor:
    """Standard deviation (over P) of the cosines of pairs: how far from equal angles, however wide they are."""
    return _over_pairs(vectors, "cosine").std


def nc2_distance_mean(vectors: Tensor) -> Tensor:
    """Mean over pairs of the distance of the normalised vectors (generalised NC2, for any D). Wu and Papyan, 2024."""
    return _over_pairs(vectors, "chord").mean


def nc2_distance_var(vectors: Tensor) -> Tensor:
    """Variance (over P) over pairs of the distance of the normalised vectors; zero at equal angles."""
    return _over_pairs(vectors, "chord").variance


def nc2_log_distance_mean(vectors: Tensor) -> Tensor:
    """Mean over pairs of ``log(1 / distance)`` of the normalised vectors: the lower, the more evenly spread.

    Source: Liu et al., "Generalizing and decoupling neural collapse", ICLR 2023.
    """
    return -_over_pairs(vectors, "log_chord").mean


def _squared_chordal_distances(basis: Tensor) -> Tensor:
    basis_CkD = to_float64(basis)
    if basis_CkD.ndim != 3:
        raise ValueError(f"a basis must be (C, k, D), got {tuple(basis.shape)}: store a basis as rows.")
    if basis_CkD.numel() == 0:  # no pair of subspaces with a distance
        return basis_CkD.new_zeros(0)
    _, k, width = basis_CkD.shape
    rows_ND = basis_CkD.reshape(-1, width)
    blocks = [  # a block of classes at a time: all at once would hold (C k)^2 products
        (part.reshape(-1, width) @ rows_ND.T).square().reshape(len(part), k, len(basis_CkD), k).sum((1, 3))
        for part in torch.split(basis_CkD, 64)
    ]
    overlap_CC = torch.cat(blocks)
    row_P, column_P = torch.triu_indices(len(overlap_CC), len(overlap_CC), 1, device=overlap_CC.device)
    return (k - overlap_CC[row_P, column_P]).clamp(min=0)


def nc2_subspace_chordal_cv(basis: Tensor) -> Tensor:
    """Standard deviation (over P) over mean of the chordal distances of all pairs of subspaces; zero at equal angles.

    The chordal distance is ``||P_i - P_j||_F / sqrt(2)`` of the projectors: the same for any bases of the subspaces.

    Args:
        basis: ``(C, k, D)``, orthonormal rows.
    """
    squared_P = _squared_chordal_distances(basis)
    same = squared_P <= 0  # there the gradient is zero, on every version of torch
    distance_P = torch.where(same, 0.0, torch.where(same, 1.0, squared_P).sqrt())
    nan = distance_P.new_full((), torch.nan)
    return distance_P.std(correction=0) / distance_P.mean() if len(distance_P) else nan


def nc2_subspace_spread(basis: Tensor) -> Tensor:
    """Mean squared chordal distance over the largest that it can be; 1 where the subspaces fill the space evenly.

    The largest is the simplex bound ``k (D - k) / D * C / (C - 1)`` of Conway, Hardin and Sloane (1996), or k (all
    subspaces orthogonal) where ``C k <= D`` leaves room for it.

    Args:
        basis: ``(C, k, D)``, orthonormal rows.
    """
    distance_P = _squared_chordal_distances(basis)
    num_classes, k, width = basis.shape
    simplex = k * (width - k) / max(width, 1) * num_classes / max(num_classes - 1, 1)
    return distance_P.mean() / min(k, simplex) if simplex else distance_P.new_full((), torch.nan)


def nc3_subspace_angle(basis: Tensor, means: Tensor) -> Tensor:
    """Mean angle in degrees between a class mean, as it is (not centred), and the subspace of its class.

    Args:
        basis: ``(C, k, D)``, orthonormal rows.
        means: ``(C, D)`` class means; rows that are nan (no samples) or zero are left out.
    """
    check_shapes(basis=(basis, "CkD"), means=(means, "CD"))
    basis_CkD, mean_CD = to_float64(basis), to_float64(means)
    counted = vector_norm(mean_CD, dim=1) > 0  # left out before the angle, whose gradient is not defined at zero
    basis_CkD, mean_CD = basis_CkD[counted], mean_CD[counted]
    inside_Ck = torch.einsum("ckd,cd->ck", basis_CkD, mean_CD)
    outside_CD = mean_CD - torch.einsum("ckd,ck->cd", basis_CkD, inside_Ck)
    # atan2 and not acos, which loses half the digits at small angles
    angle_C = torch.atan2(vector_norm(outside_CD, dim=1), vector_norm(inside_Ck, dim=1)).rad2deg()
    return angle_C.mean()
