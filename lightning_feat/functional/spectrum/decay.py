"""How fast a spectrum falls. Shapes: K values, the largest first."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import to_float64
from lightning_feat.functional.common.shapes import check_shapes


class SpectralDecay(NamedTuple):
    """A power law fitted to a spectrum."""

    exponent: Tensor  # () alpha of values that fall as index to the power of minus alpha
    r_squared: Tensor  # () share of the variance of the logarithms that the law explains, weighted as the fit


def spectral_decay(spectrum: Tensor, first: int = 1, last: int | None = None) -> SpectralDecay:
    r"""Exponent of the power law :math:`\lambda_i \propto i^{-\alpha}` that fits the values ``first`` to ``last`` best.

    Least squares of the logarithms, the i-th with weight 1/i so that each octave of indices counts the same. Of the
    eigenvalues of a covariance, one is the smoothest code that keeps the fine differences of its inputs (Stringer et
    al., "High-dimensional geometry of population responses in visual cortex", Nature 2019, which fits the values 11 to
    500), and features near one tend to serve best for linear probes (Agrawal et al., "alpha-ReQ", NeurIPS 2022). A
    spectrum that ends in a cliff is no power law: look at ``r_squared``.

    Args:
        spectrum: ``(K,)``, the largest first.
        first: index of the first value that counts, from one.
        last: index of the last one; None for the last above zero.

    Returns:
        Both float64; nan with fewer than three values above zero to fit; ``r_squared`` is nan where they are equal.

    Raises:
        ValueError: if the shape or the range does not fit, or values rise or lie below zero.

    Example:
        >>> alpha, _ = spectral_decay(torch.arange(1, 65, dtype=torch.float64) ** -1.5)
        >>> print(f"{alpha:.6f}")
        1.500000
    """
    check_shapes(spectrum=(spectrum, "K"))
    last = len(spectrum) if last is None else last
    if first < 1 or last < first:
        raise ValueError(f"{first=} and {last=}: indices from one, the last not before the first.")
    value_K = to_float64(spectrum)
    if (value_K < 0).any() or (value_K[1:] > value_K[:-1]).any():
        raise ValueError("a spectrum holds no value below zero, and the largest first: sort and clamp it.")
    nan = value_K.new_full((), torch.nan)
    positive = 0 if value_K.isnan().any() else int((value_K > 0).sum())
    fitted = value_K[first - 1 : min(last, positive)]
    if len(fitted) < 3:
        return SpectralDecay(nan, nan)
    index = torch.arange(first, first + len(fitted), dtype=torch.float64, device=value_K.device)
    weight = 1 / index / (1 / index).sum()
    x, y = index.log(), fitted.log()
    x, y = x - (weight * x).sum(), y - (weight * y).sum()
    slope = (weight * x * y).sum() / (weight * x * x).sum()
    varies = (weight * y * y).sum()
    off = (weight * (y - slope * x).square()).sum()
    flat = varies <= 1e-24  # logarithms that differ by rounding alone
    return SpectralDecay(-slope, torch.where(flat, nan, 1 - off / torch.where(flat, 1.0, varies)))
