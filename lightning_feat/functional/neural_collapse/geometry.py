"""What features and classifier converge to where it is not a simplex: unequal classes, no bias, ReLU, mixup.

All results hold for free features ("unconstrained features model"): every sample's feature is a parameter with its own
weight decay. In float64. A squared length of zero means that the class has collapsed onto the origin.

Shapes: C classes (``counts`` holds their samples), D features, N samples.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import matrix_norm

from lightning_feat.functional.common.class_sums import to_float64
from lightning_feat.functional.common.shapes import check_shapes
from lightning_feat.functional.neural_collapse.means import cosine_matrix, gram_error, simplex_gram


class OrthogonalFrame(NamedTuple):
    """Squared lengths in a frame of orthogonal vectors; classifier row and class mean of a class are parallel."""

    weights: Tensor  # (C,) squared norms of the rows of the classifier (the product of all linear layers)
    means: Tensor  # (C,) squared norms of the class means, not centred
    logits: Tensor  # (C,) logit of a sample for its own class; the others are zero


class NonnegativeFrame(NamedTuple):
    """Cross-entropy on non-negative features: orthogonal class means, and a classifier that is centred over classes."""

    margins: Tensor  # (C,) logit of a sample for its own class, less that for any other
    means: Tensor  # (C,) squared norms of the class means, which are orthogonal
    weight_gram: Tensor  # (C, C) inner products of the rows of the classifier


class SignedFrame(NamedTuple):
    """Cross-entropy on features of any sign: inner products at the optimum."""

    logits: Tensor  # (C, C) in row k the logits of a sample of class k; each row sums to zero
    means: Tensor  # (C, C) inner products of the class means
    weights: Tensor  # (C, C) inner products of the rows of the classifier


def _checked_counts(counts: Tensor, *decays: float) -> Tensor:
    if counts.ndim != 1 or len(counts) < 2 or bool((counts <= 0).any()):
        raise ValueError(f"counts must be the samples of at least two classes, all above zero, got {counts.tolist()}")
    if min(decays) <= 0:
        raise ValueError(f"weight and feature decay must be above zero, got {decays}: without them there is no optimum")
    return to_float64(counts)


def orthogonal_frame_error(vectors: Tensor) -> Tensor:
    """Frobenius distance of the Gram matrix of ``(C, D)`` to the identity, both scaled to unit norm; not centred."""
    check_shapes(vectors=(vectors, "CD"))
    return general_frame_error(vectors, torch.ones(len(vectors)))


def general_frame_error(vectors: Tensor, squared_lengths: Tensor) -> Tensor:
    """The same against orthogonal vectors of given squared lengths ``(C,)``, such as :class:`OrthogonalFrame` holds."""
    check_shapes(vectors=(vectors, "CD"), squared_lengths=(squared_lengths, "C"))
    vectors = to_float64(vectors)
    return gram_error(vectors @ vectors.T, torch.diag(to_float64(squared_lengths)).to(vectors.device))


def mse_orthogonal_frame(
    counts: Tensor, weight_decay: float, feature_decay: float, num_layers: int = 1
) -> OrthogonalFrame:
    r"""Optimum of the squared error without bias, for ``D >= C``: class lengths grow with class size.

    .. math:: \tfrac{1}{2N} \lVert W_M \cdots W_1 H - Y \rVert^2 + \tfrac{\lambda_W}{2} \sum_l \lVert W_l \rVert^2
              + \tfrac{\lambda_H}{2} \lVert H \rVert^2

    with ``num_layers`` M, Y one-hot. Source: Dang et al., "Neural collapse in deep linear networks: from balanced to
    imbalanced data", ICML 2023.

    Example:
        >>> mse_orthogonal_frame(torch.tensor([40, 10]), weight_decay=0.01, feature_decay=1e-3).logits
        tensor([0.9750, 0.9500], dtype=torch.float64)
    """
    n_C = _checked_counts(counts, weight_decay, feature_decay)
    if num_layers < 1:
        raise ValueError(f"num_layers={num_layers}: at least one linear layer, the classifier itself")
    depth, size = num_layers, float(n_C.sum())
    # Per class, x^M = weight / (N lambda_H) minimises 1 / (x^M + 1) + slope x. The first term is steepest at
    # x^M = (M - 1) / (M + 1); the largest root lies between there and where M / x^(M+1) = slope.
    slope_C = depth * size * (size * weight_decay**depth * feature_decay) ** (1 / depth) / n_C
    low_C = torch.full_like(n_C, ((depth - 1) / (depth + 1)) ** (1 / depth))
    high_C = (depth / slope_C) ** (1 / (depth + 1)) + low_C
    for _ in range(200):  # halves the bracket down to the last bit
        x_C = (low_C + high_C) / 2
        above = depth * x_C ** (depth - 1) / (x_C**depth + 1) ** 2 > slope_C
        low_C, high_C = torch.where(above, x_C, low_C), torch.where(above, high_C, x_C)
    weight_C = size * feature_decay * ((low_C + high_C) / 2) ** depth
    weight_C = torch.where(n_C > mse_collapse_count(int(n_C.sum()), weight_decay, feature_decay, depth), weight_C, 0.0)
    ridge_C = weight_C + size * feature_decay
    return OrthogonalFrame(weight_C, weight_C / ridge_C.square(), weight_C / ridge_C)


def mse_collapse_count(num_samples: int, weight_decay: float, feature_decay: float, num_layers: int = 1) -> float:
    """Samples up to which a class collapses to zero in :func:`mse_orthogonal_frame`; one layer: ``N^2 l_W l_H``."""
    depth = num_layers
    slope = depth * num_samples * (num_samples * weight_decay**depth * feature_decay) ** (1 / depth)
    return slope * depth / (depth - 1) ** ((depth - 1) / depth)


def ce_nonnegative_frame(counts: Tensor, weight_decay: float, feature_decay: float) -> NonnegativeFrame:
    r"""Optimum of cross-entropy without bias over non-negative features, ``D >= C``: small classes have longer means.

    .. math:: \tfrac1N \sum_i \mathrm{CE}(W h_i) + \tfrac{\lambda_W}{2} \lVert W \rVert^2
              + \tfrac{\lambda_H}{2} \sum_i \lVert h_i \rVert^2, \quad h_i \ge 0

    The structure is that of Dang et al., ICML 2024; the lengths are derived here from the stationarity of this loss.
    """
    n_C = _checked_counts(counts, weight_decay, feature_decay)
    k, size = len(n_C), float(n_C.sum())
    ratio_C = (n_C * k / ((k - 1) * size**2 * weight_decay * feature_decay)).sqrt()
    margin_C = ((k - 1) * (ratio_C - 1)).clamp(min=1).log()  # below one: the class has collapsed, its margin is zero
    mean_C = margin_C * ((k - 1) * weight_decay / (k * n_C * feature_decay)).sqrt()
    factor_C = margin_C * (n_C * k * feature_decay / ((k - 1) * weight_decay)).sqrt()
    centering = simplex_gram(k, n_C.device)
    return NonnegativeFrame(margin_C, mean_C, centering @ torch.diag(factor_C) @ centering)


def ce_nonnegative_collapse_count(
    num_samples: int, num_classes: int, weight_decay: float, feature_decay: float
) -> float:
    """Samples up to which a class collapses to zero in :func:`ce_nonnegative_frame`; of two classes at least."""
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be at least 2: no optimum exists for one class")
    return num_samples**2 * weight_decay * feature_decay * num_classes / (num_classes - 1)


def ce_frame(
    counts: Tensor, weight_decay: float, feature_decay: float, max_steps: int = 100_000, tolerance: float = 1e-13
) -> SignedFrame:
    r"""Optimum of cross-entropy without bias over features of any sign, ``D >= C``, at any decay and class sizes.

    The loss is that of :func:`ce_nonnegative_frame` without ``h >= 0``. It has no closed form, but the same minimum as
    a convex problem in the logits: with :math:`Z` the columns of logits of all samples,

    .. math:: \min_{W H = Z} \tfrac{\lambda_W}{2} \lVert W \rVert^2 + \tfrac{\lambda_H}{2} \lVert H \rVert^2
              = \sqrt{\lambda_W \lambda_H} \, \lVert Z \rVert_* .

    Samples of one class share a column, so that it has ``(C, C)`` unknowns; solved by accelerated proximal steps, each
    with an SVD of that size. Equal classes give a simplex; with a vanishing decay it tends to :func:`seli_grams`.
    Source of the convex form: Srebro, Rennie, Jaakkola, "Maximum-margin matrix factorization", NeurIPS 2004.

    Args:
        counts: ``(C,)`` samples in each class.
        weight_decay: as there.
        feature_decay: as there.
        max_steps: a few hundred do, thousands where the decays are small.
        tolerance: stop where a step is shorter than this share of the solution.

    Raises:
        ValueError: if a decay is not above zero, or there is no convergence within ``max_steps``.

    Example:
        >>> frame = ce_frame(torch.tensor([10, 10, 10]), weight_decay=5e-3, feature_decay=5e-4)
        >>> cosine_matrix(frame.weights)[0].round(decimals=6)
        tensor([ 1.0000, -0.5000, -0.5000], dtype=torch.float64)
    """
    n_C = _checked_counts(counts, weight_decay, feature_decay)
    size, price = float(n_C.sum()), math.sqrt(weight_decay * feature_decay)
    root_C, eye_CC = n_C.sqrt(), torch.eye(len(n_C), dtype=n_C.dtype, device=n_C.device)
    # Scaled by the roots of the counts, a column of a class stands for all its samples. The curvature of the loss in
    # these columns is at most 1 / (2 N), so that 2 N is a step that never overshoots.
    step, momentum = 2 * size, 1.0
    column_CC = ahead_CC = torch.zeros_like(eye_CC)
    for _ in range(max_steps):
        slope_CC = ((ahead_CC / root_C).softmax(0) - eye_CC) * root_C / size
        left_CR, value_R, right_RC = torch.linalg.svd(ahead_CC - step * slope_CC)
        value_R = (value_R - step * price).clamp(min=0)
        new_CC = (left_CR * value_R) @ right_RC
        moved_CC = new_CC - column_CC
        if bool(matrix_norm(new_CC - ahead_CC) <= tolerance * matrix_norm(new_CC)):
            break
        if bool(((ahead_CC - new_CC) * moved_CC).sum() > 0):  # momentum points uphill: start it anew
            momentum = 1.0
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        column_CC, ahead_CC = new_CC, new_CC + (momentum - 1) / following * moved_CC
        momentum = following
    else:
        raise ValueError(
            f"ce_frame did not settle to tolerance={tolerance} in max_steps={max_steps} with decays {weight_decay} and "
            f"{feature_decay}: allow more steps, or a larger tolerance."
        )
    ratio = math.sqrt(feature_decay / weight_decay)
    weight_CC = ratio * (left_CR * value_R) @ left_CR.T
    mean_CC = (right_RC.T * value_R) @ right_RC / ratio / torch.outer(root_C, root_C)
    return SignedFrame((new_CC / root_C).T, mean_CC, weight_CC)


def ce_merge_count(num_samples: int, weight_decay: float, feature_decay: float) -> float:
    r"""Samples up to which classes of one size merge under :func:`ce_frame`: minority collapse, ``N^2 l_W l_H``.

    Two or more classes with that many samples each then have one classifier row and one mean in common. Where they are
    merged, the slope along their differences is ``sqrt(n) / N``, and the price of a difference
    ``sqrt(l_W l_H)``; derived here. The effect: Fang, He, Long, Su, PNAS 2021.
    """
    return num_samples**2 * weight_decay * feature_decay


def seli_grams(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices ``(C, C)`` of classifier and class means, up to scale, for cross-entropy as the decay vanishes.

    Features may have any sign; logits tend to the one-hot targets minus their mean ("simplex-encoded labels").
    Compare with :func:`~lightning_feat.functional.neural_collapse.gram_error`; at finite decay the geometry differs,
    and with unequal classes it is reached slowly. Source: Thrampoulidis et al., "Imbalance trouble", NeurIPS 2022.
    """
    weight_CR, mean_CR = seli_vectors(counts)
    return weight_CR @ weight_CR.T, mean_CR @ mean_CR.T


def seli_vectors(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the classifier and class means ``(C, C - 1)`` that have the Gram matrices of :func:`seli_grams`, up to
    scale and one rotation of both; their products are the logits, the same as those of a simplex.

    Example:
        >>> weight, mean = seli_vectors(torch.tensor([30, 30, 30]))
        >>> (weight @ mean.T).round(decimals=3)
        tensor([[ 0.6670, -0.3330, -0.3330],
                [-0.3330,  0.6670, -0.3330],
                [-0.3330, -0.3330,  0.6670]], dtype=torch.float64)
    """
    n_C = _checked_counts(counts, 1.0)
    centering = simplex_gram(len(n_C), n_C.device)
    # Z = (I - 1/C) Y has Z Z^T = (I - 1/C) diag(counts) (I - 1/C) = V L^2 V^T, with one zero eigenvalue, that of ones.
    value_C, vector_CC = torch.linalg.eigh(centering @ torch.diag(n_C) @ centering)
    root_R, vector_CR = value_C[1:].sqrt(), vector_CC[:, 1:]
    return vector_CR * root_R.sqrt(), centering @ (vector_CR / root_R.sqrt())


def minority_cosine(vectors: Tensor, minority: Tensor) -> Tensor:
    """Mean cosine between the classifier rows (or means) of the classes marked in ``minority`` ``(C,)``.

    It tends to one in minority collapse: Fang, He, Long, Su, PNAS 2021. Nan for fewer than two such classes.
    """
    check_shapes(vectors=(vectors, "CD"), minority=(minority, "C", bool))
    chosen = cosine_matrix(vectors[minority.to(vectors.device)])
    row_P, column_P = torch.triu_indices(len(chosen), len(chosen), 1, device=chosen.device)
    return chosen[row_P, column_P].mean()


def free_features(weight: Tensor, targets: Tensor, feature_decay: float, max_steps: int = 100) -> Tensor:
    r"""Features ``(N, D)`` that minimise ``cross_entropy(weight @ h, targets) + feature_decay / 2 ||h||^2``.

    What a network with free features would put out for mixed targets under a fixed classifier, such as a simplex. For a
    mix of two classes with shares s and 1 - s the two logits differ by ``log(s / (1 - s))`` as the decay vanishes.

    Args:
        weight: ``(C, D)`` fixed classifier, no bias.
        targets: ``(N, C)`` soft targets, rows that sum to one.
        feature_decay: above zero.
        max_steps: of Newton's method, which takes about ten.

    Raises:
        ValueError: if ``feature_decay`` is not above zero, the shapes do not fit, or a value is not finite.
    """
    check_shapes(weight=(weight, "CD"), targets=(targets, "NC"))
    if feature_decay <= 0:
        raise ValueError(f"feature_decay={feature_decay} must be above zero: without it mixed classes have no optimum")
    if weight.ndim != 2 or targets.ndim != 2 or targets.shape[1] != len(weight):
        raise ValueError(
            f"weight must be (C, D) and targets must be (N, {len(weight)}) soft targets, got {tuple(weight.shape)} and "
            f"{tuple(targets.shape)}"
        )
    w_CD, y_NC = to_float64(weight), to_float64(targets)
    if not (w_CD.isfinite().all() and y_NC.isfinite().all()):
        raise ValueError("weight or targets hold NaN or inf: there is no optimum to find")
    h_ND = w_CD.new_zeros(len(y_NC), w_CD.shape[1])
    ridge_DD = feature_decay * torch.eye(w_CD.shape[1], dtype=w_CD.dtype, device=w_CD.device)

    def objective(h_ND: Tensor) -> Tensor:
        return -(y_NC * (h_ND @ w_CD.T).log_softmax(1)).sum(1) + feature_decay / 2 * h_ND.square().sum(1)

    for _ in range(max_steps):
        share_NC = (h_ND @ w_CD.T).softmax(1)
        slope_ND = (share_NC - y_NC) @ w_CD + feature_decay * h_ND
        if slope_ND.numel() == 0 or slope_ND.abs().max() < 1e-13 * max(1.0, math.sqrt(float(w_CD.square().sum()))):
            break
        centered_NCD = w_CD - (share_NC @ w_CD)[:, None]
        curvature_NDD = torch.einsum("nc,ncd,nce->nde", share_NC, centered_NCD, centered_NCD) + ridge_DD
        step_ND = torch.linalg.solve(curvature_NDD, slope_ND)
        gain_N, start_N = (slope_ND * step_ND).sum(1), objective(h_ND)
        length_N = torch.ones_like(gain_N)
        for _ in range(40):  # halve the step of each sample until it falls by a fair part of what the slope promises
            enough = objective(h_ND - length_N[:, None] * step_ND) <= start_N - 1e-4 * length_N * gain_N + 1e-15
            length_N = torch.where(enough, length_N, length_N / 2)
        h_ND = h_ND - length_N[:, None] * step_ND
    return h_ND
