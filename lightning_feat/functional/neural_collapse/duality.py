"""NC3, NC4 and NC0: how far the classifier is the class means in another guise. NC5: what lies outside all classes.

Every value is a float64 scalar, nan where the data define none. ``weight`` is the classifier ``(C, D)`` and ``means``
:func:`centered_class_means`, with the same classes in the same order: leave out the rows of classes without samples.

Shapes: C classes, D features, N samples, q directions kept.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_feat.functional.common.class_sums import ClassSums, present_class_means, to_float64
from lightning_feat.functional.common.directions import FLOAT32_ROUNDING
from lightning_feat.functional.common.second_pass import CenterSums
from lightning_feat.functional.common.shapes import check_shapes
from lightning_feat.functional.neural_collapse.means import gram_error, simplex_gram


def nc0(weight: Tensor) -> Tensor:
    """Squared norm of the sum of the classifier rows; decays with the weight decay of SGD, not with that of AdamW.

    Takes the whole classifier, classes without samples included: the theorem is about the sum of all rows.
    Source: "NC0", ICLR 2026, arXiv 2602.16642.
    """
    check_shapes(weight=(weight, "CD"))
    return to_float64(weight).sum(0).square().sum()


def nc0_relative(weight: Tensor) -> Tensor:
    """:func:`nc0` over its largest value for rows of these norms in the mean square, ``C sum ||w_c||^2``; in [0, 1]."""
    check_shapes(weight=(weight, "CD"))
    return nc0(weight) / (len(weight) * to_float64(weight).square().sum())


def nc3(weight: Tensor, means: Tensor) -> Tensor:
    r"""Self-duality: :math:`\lVert W / \lVert W \rVert_F - M / \lVert M \rVert_F \rVert_F`, in [0, 2], W as it is.

    Papyan, Han, Donoho (PNAS 2020) plot its square, :func:`nc3_squared`, in [0, 4].
    """
    check_shapes(weight=(weight, "CD"), means=(means, "CD"))
    return gram_error(weight, means)


def nc3_squared(weight: Tensor, means: Tensor) -> Tensor:
    """The square of :func:`nc3`."""
    return nc3(weight, means).square()


def nc3_centered_weight(weight: Tensor, means: Tensor) -> Tensor:
    """:func:`nc3` of the classifier minus the mean of its rows, a shift that changes no softmax.

    Weight decay centres the rows by itself; after training with AdamW they stay off, and the plain form stays high.
    """
    check_shapes(weight=(weight, "CD"), means=(means, "CD"))
    weight = to_float64(weight)
    return nc3(weight - weight.mean(0), means)


def nc3_cosine(weight: Tensor, means: Tensor) -> Tensor:
    """Mean over classes of the cosine between the classifier row and the centred class mean; 1 at self-duality."""
    check_shapes(weight=(weight, "CD"), means=(means, "CD"))
    return torch.cosine_similarity(to_float64(weight), to_float64(means), eps=0.0).mean()


def nc3_duality_error(weight: Tensor, means: Tensor) -> Tensor:
    r""":math:`\lVert W M^\top / \lVert W M^\top \rVert_F - (I - 11^\top/C)/\sqrt{C-1} \rVert_F`: NC2 with NC3.

    Source: Zhu et al., NeurIPS 2021.
    """
    check_shapes(weight=(weight, "CD"), means=(means, "CD"))
    product_CC = to_float64(weight) @ to_float64(means).T
    return gram_error(product_CC, simplex_gram(len(product_CC), product_CC.device))


def nc3_uniform_duality_var(weight: Tensor, means: Tensor) -> Tensor:
    """Variance (over C - 1) over classes of the inner product of classifier row and centred class mean.

    Source: Wu and Papyan, "Linguistic collapse", 2024.
    """
    check_shapes(weight=(weight, "CD"), means=(means, "CD"))
    product_C = (to_float64(weight) * to_float64(means)).sum(1)
    return product_C.var() if len(product_C) > 1 else product_C.new_full((), torch.nan)


def bias_duality(weight: Tensor, bias: Tensor, global_mean: Tensor) -> Tensor:
    """Norm of ``W mu + b``, small where the bias undoes the global mean ``(D,)``; in the units of the logits."""
    check_shapes(weight=(weight, "CD"), bias=(bias, "C"), global_mean=(global_mean, "D"))
    logit_norm: Tensor = vector_norm(to_float64(weight) @ to_float64(global_mean) + to_float64(bias))
    return logit_norm


def nc4_mismatch(residuals: CenterSums) -> Tensor:
    """Share of samples where the classifier's choice is not the nearest class mean.

    Pass the true logits to :func:`center_sums`; some published code leaves out the bias.
    """
    return residuals.mismatches / residuals.samples


def ncc_accuracy(residuals: CenterSums) -> Tensor:
    """Share of samples whose nearest class mean is that of their own class; by shares where targets are soft."""
    return residuals.hits / residuals.samples


def nc5_orthogonality(totals: ClassSums, outside_mean: Tensor) -> Tensor:
    """Mean over classes of ``|cos|`` between the class mean, not centred, and the mean ``(D,)`` of foreign features.

    Zero where what is out of distribution is orthogonal to all classes. Depends on the origin of the features.
    Source: Ben Ammar et al., "NECO", ICLR 2024.
    """
    check_shapes(sums=(totals.sums, "CD"), outside_mean=(outside_mean, "D"))
    mean_SD = present_class_means(totals)
    return torch.cosine_similarity(mean_SD, to_float64(outside_mean)[None], eps=0.0).abs().mean()


class NecoSubspace(NamedTuple):
    """Standardisation and principal directions of known features, to score others by."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,) standard deviation; one where a feature never varies
    directions: Tensor  # (q, D) orthonormal, largest variance first


def neco_subspace(
    totals: ClassSums, moment: Tensor, subspace_dim: int, rounding: float = FLOAT32_ROUNDING
) -> NecoSubspace:
    """Principal directions of the standardised features, from sums alone; nan without samples or where not finite.

    A feature that varies by no more than the relative ``rounding`` of its size (see ``rounding_of``) counts as
    constant.

    Raises:
        ValueError: if ``subspace_dim`` is not between 1 and D.
    """
    check_shapes(sums=(totals.sums, "CD"), moment=(moment, "DD"))
    width = len(moment)
    if not 1 <= subspace_dim <= width:
        raise ValueError(f"subspace_dim={subspace_dim}: choose from 1 to the width of the features, {width}")
    mean_D = totals.sums.sum(0) / totals.counts.sum()
    covariance_DD = moment / totals.counts.sum() - torch.outer(mean_D, mean_D)
    variance_D = covariance_DD.diagonal()
    # 100 eps: what is left of a difference of two float64 sums
    off_D = (rounding**2 + 100 * torch.finfo(torch.float64).eps) * moment.diagonal() / totals.counts.sum()
    scale_D = torch.where(variance_D > off_D, variance_D, 1.0).sqrt()
    if not covariance_DD.isfinite().all():  # eigh would raise
        return NecoSubspace(mean_D, scale_D, covariance_DD.new_full((subspace_dim, width), torch.nan))
    _, vector_DD = torch.linalg.eigh(covariance_DD / torch.outer(scale_D, scale_D))
    return NecoSubspace(mean_D, scale_D, vector_DD.flip(1)[:, :subspace_dim].T)


def neco_scores(features: Tensor, subspace: NecoSubspace, logits: Tensor | None = None) -> Tensor:
    """Share of each standardised feature vector that lies in the principal subspace, ``(N,)``; low means foreign.

    Between 0 and 1, or times the largest logit where ``logits`` ``(N, C)`` are given, as the authors do in places.
    """
    check_shapes(features=(features, "ND"), mean=(subspace.mean, "D"), logits=(logits, "NC"))
    z_ND = (to_float64(features) - subspace.mean) / subspace.scale
    score_N: Tensor = vector_norm(z_ND @ subspace.directions.T, dim=1) / vector_norm(z_ND, dim=1)
    return score_N if logits is None else score_N * to_float64(logits).amax(1)
