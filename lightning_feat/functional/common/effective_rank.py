"""How many directions a spread fills, as one number. Shapes: K values."""

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import to_float64
from lightning_feat.functional.common.shapes import check_shapes


def effective_rank(spectrum: Tensor, epsilon: float = 0.0) -> Tensor:
    r"""Exponential of the entropy of a spectrum, :math:`\exp(-\sum_k p_k \log p_k)` with
    :math:`p_k = s_k / \sum_j s_j`: between one and the number of values above zero.

    Of the singular values of a matrix it is the effective rank of Roy and Vetterli, "The effective rank: a measure of
    effective dimensionality", EUSIPCO 2007. Of the eigenvalues of a covariance, which are their squares, it is smaller:
    the field uses both, so say which.

    Args:
        spectrum: ``(..., K)``, none below zero.
        epsilon: added to each :math:`p_k`, which then no longer sum to one. Zero is the definition; RankMe's paper
            prints 1e-7 and others take up to 1e-5, by which many directions without features count for something.

    Returns:
        ``(...)``, float64; nan where the spectrum is zero or holds nan.

    Raises:
        ValueError: if a value is below zero.

    Example:
        >>> effective_rank(torch.tensor([1.0, 1.0, 1.0, 0.0]))
        tensor(3.0000, dtype=torch.float64)
    """
    check_shapes(spectrum=(spectrum, "*K"))
    if (spectrum < 0).any():
        raise ValueError(f"a spectrum holds no value below zero, got {float(spectrum.min()):.4g}: clamp it.")
    value_K = to_float64(spectrum)
    total = value_K.sum(-1, keepdim=True)
    share_K = value_K / total + epsilon
    positive = share_K > 0
    # A logarithm of zero would have no gradient, also where it is not chosen.
    terms_K = torch.where(positive, share_K * torch.where(positive, share_K, 1.0).log(), share_K)
    result: Tensor = terms_K.sum(-1).neg().exp()
    return torch.where(total[..., 0] > 0, result, torch.nan)
