"""How evenly directions of features fill the sphere, and how close those lie that belong together.

All look at directions alone: features are divided by their lengths. A feature of length zero stays at the origin.

Shapes: N samples, D features, B samples in a block.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_feat.functional.common.class_sums import ClassSums, to_float64
from lightning_feat.functional.common.lengths import tamed
from lightning_feat.functional.common.shapes import check_shapes
from lightning_feat.functional.spectrum.moments import MomentSums, covariance, covariance_spectrum

_BLOCK = 2**21  # cosines held at once: 16 MiB in float64
_FLOOR = 1e-8  # of a distance in a logarithm, as in DINOv2


def wasserstein_uniformity(features: Tensor) -> Tensor:
    r"""Distance of the directions from an even spread over the sphere: zero is even, and less is better.

    The 2-Wasserstein distance between two normal distributions, that with the mean :math:`\mu` and covariance
    :math:`\Sigma` of the unit features and that with mean zero and covariance :math:`I / D`:

    .. math:: W_2^2 = \lVert \mu \rVert^2 + 1 + \mathrm{tr}\, \Sigma - \frac{2}{\sqrt D} \mathrm{tr}\, \Sigma^{1/2}
        = \lVert \mu \rVert^2 + \sum_k (s_k - 1 / \sqrt D)^2

    with the roots :math:`s_k` of the eigenvalues of :math:`\Sigma`. Unlike :func:`gaussian_uniformity` it tells when
    directions of the space are empty; the largest value is :math:`\sqrt 2`, that of one point. A loss: differentiable,
    also with fewer samples than features. Source: Fang et al., "Rethinking the uniformity metric in self-supervised
    learning", ICLR 2024, arXiv 2403.00642.

    Args:
        features: ``(N, D)``; in float32 at least.

    Returns:
        Scalar; nan without samples.

    Raises:
        ValueError: if the shape does not fit.

    Example:
        >>> eye = torch.eye(3)
        >>> wasserstein_uniformity(torch.cat([eye, -eye]))
        tensor(0.)
    """
    unit_ND = _unit(features)
    if unit_ND.numel() == 0:
        return unit_ND.sum() * torch.nan
    size, width = unit_ND.shape
    mean_D = unit_ND.mean(0)
    if not unit_ND.detach().isfinite().all():
        return mean_D.sum() * torch.nan
    root_K = torch.linalg.svdvals(unit_ND - mean_D) / math.sqrt(size)
    return _distance(mean_D, root_K, width)


def wasserstein_uniformity_of_sums(totals: MomentSums) -> Tensor:
    """:func:`wasserstein_uniformity` over all that was summed.

    Args:
        totals: from ``moment_sums`` of features of length one.

    Returns:
        Scalar, float64; nan without samples, or where a feature was not finite.

    Raises:
        ValueError: if the features were longer than one.
    """
    spectrum_D = covariance_spectrum(totals)
    if not len(spectrum_D) or spectrum_D.isnan().any():
        return totals.samples * torch.nan
    square = totals.products.diagonal().sum() / totals.samples
    if square > 1 + 1e-6:
        raise ValueError(
            f"wasserstein_uniformity needs the sums of features of length one, and their mean squared length here is "
            f"{float(square):.4g}: divide them by their lengths."
        )
    return _distance(totals.sums / totals.samples, spectrum_D.sqrt(), len(spectrum_D))


def _distance(mean_D: Tensor, root_K: Tensor, width: int) -> Tensor:
    even = 1 / math.sqrt(width)
    square = mean_D.square().sum() + (root_K - even).square().sum() + (width - len(root_K)) / width
    apart = square > 0  # the root has no gradient at zero
    return torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)


def gaussian_uniformity(features: Tensor, t: float = 2.0) -> Tensor:
    r"""Logarithm of the mean Gaussian potential, :math:`\log \mathrm{mean}_{i \ne j} \exp(-t \lVert z_i - z_j
    \rVert^2)` of the unit features: less is more even, and zero is one point.

    A loss: differentiable. In blocks: ``N^2 D`` operations, and 16 MiB beside the features where no gradient is asked.
    Source: Wang and Isola, "Understanding contrastive representation learning through alignment and uniformity on the
    hypersphere", ICML 2020, arXiv 2005.10242.

    Args:
        features: ``(N, D)``; in float32 at least.
        t: how narrow the Gaussian is; the paper's is 2.

    Returns:
        Scalar; nan with fewer than two samples.

    Raises:
        ValueError: if the shape does not fit, or t is not above zero.

    Example:
        >>> gaussian_uniformity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]))
        tensor(-8.)
    """
    unit_ND = _unit(features)
    if t <= 0:
        raise ValueError(f"{t=} must be above zero.")
    size = len(unit_ND)
    if size < 2:
        return unit_ND.sum() * torch.nan
    sums = []
    square_N = unit_ND.square().sum(1)  # zero where the feature is
    for rows, cosine_BN, itself_BN in _cosine_blocks(unit_ND):
        potential_BN = -t * (square_N[rows, None] + square_N - 2 * cosine_BN)
        sums.append(potential_BN.masked_fill(itself_BN, -torch.inf).flatten().logsumexp(0))
    return torch.stack(sums).logsumexp(0) - math.log(size * (size - 1))


def alignment(features: Tensor, positives: Tensor, power: float = 2.0) -> Tensor:
    r"""Mean distance between the directions of two views, :math:`\mathrm{mean}_i \lVert z_i - z'_i \rVert^{power}`.

    A loss: differentiable. Source: that of :func:`gaussian_uniformity`, with a power of 2.

    Args:
        features: ``(N, D)``; in float32 at least.
        positives: ``(N, D)``, the other view of each sample.
        power: of the distance, one or more.

    Returns:
        Scalar; nan without samples.

    Raises:
        ValueError: if the shapes do not fit, or the power is below one.

    Example:
        >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(2.)
    """
    check_shapes(features=(features, "ND"), positives=(positives, "ND"))
    if power < 1:
        raise ValueError(f"{power=} must be at least one.")
    square_N = (_unit(features) - _unit(positives)).square().sum(1)
    if power == 2:
        return square_N.mean()
    apart = square_N > 0
    return torch.where(apart, torch.where(apart, square_N, 1.0) ** (power / 2), 0.0).mean()


def tolerance(totals: ClassSums) -> Tensor:
    """Mean cosine between two samples of one class: how much a training lets differ what belongs together.

    Over all pairs of different samples of one class. The source divides by the pairs of different classes too, which
    multiplies the value by the chance that two samples share a class: Wang and Liu, "Understanding the behaviour of
    contrastive loss", CVPR 2021, arXiv 2012.09740. The mean squared distance of such pairs, their alignment, is two
    minus twice this value.

    Args:
        totals: from ``functional.transfer.direction_sums``.

    Returns:
        Scalar, float64, in [-1, 1]; nan without two samples of one class.

    Example:
        >>> from lightning_feat.functional.transfer import direction_sums
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> tolerance(direction_sums(features, torch.tensor([0, 0, 0]), num_classes=1))
        tensor(0.3333, dtype=torch.float64)
    """
    pairs = (totals.counts * (totals.counts - 1)).sum()
    cosines = (totals.sums.square().sum(1) - totals.squares).sum()
    return torch.where(pairs > 0, cosines / torch.where(pairs > 0, pairs, 1.0), torch.nan)


def koleo(features: Tensor) -> Tensor:
    r"""Kozachenko-Leonenko spread, :math:`-\mathrm{mean}_i \log \min_{j \ne i} \lVert z_i - z_j \rVert` of the unit
    features: less is more even.

    A loss: differentiable by way of the nearest neighbours. Samples that coincide count as 1e-8 apart. ``N^2 D``
    operations in blocks, and 16 MiB beside the features. Source: Sablayrolles et al., "Spreading vectors for similarity
    search", ICLR 2019, arXiv 1806.03198; DINOv2 takes a weight of 0.1.

    Args:
        features: ``(N, D)``; in float32 at least.

    Returns:
        Scalar; nan with fewer than two samples.

    Raises:
        ValueError: if the shape does not fit.

    Example:
        >>> koleo(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]))
        tensor(-0.6931)
    """
    unit_ND = _unit(features)
    size = len(unit_ND)
    if size < 2:
        return unit_ND.sum() * torch.nan
    with torch.no_grad():
        nearest = [
            cosine_BN.masked_fill(itself_BN, -torch.inf).argmax(1)
            for _, cosine_BN, itself_BN in _cosine_blocks(unit_ND.detach())
        ]
    square_N = (unit_ND - unit_ND[torch.cat(nearest)]).square().sum(1)
    apart = square_N > _FLOOR**2
    distance_N = torch.where(apart, torch.where(apart, square_N, 1.0).sqrt(), _FLOOR)
    return distance_N.log().mean().neg() + 0.0 * unit_ND.sum()


def hyperspherical_energy(directions: Tensor, power: float = 1.0) -> Tensor:
    r"""Mean energy of directions that repel one another, :math:`\mathrm{mean}_{i \ne j} \lVert z_i - z_j
    \rVert^{-power}`: less is more diverse.

    Of the rows of a weight it tells how diverse a layer's neurons are (Liu et al., "Learning towards minimum
    hyperspherical energy", NeurIPS 2018, arXiv 1805.09298); of the centred columns of a feature matrix, how diverse its
    channels are. Directions that coincide count as 1e-8 apart, and make it huge. A loss: differentiable.

    Args:
        directions: ``(N, D)``.
        power: of the distance, above zero.

    Returns:
        Scalar, float64; nan with fewer than two directions.

    Raises:
        ValueError: if the shape does not fit, or the power is not above zero.

    Example:
        >>> hyperspherical_energy(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]))
        tensor(0.5000, dtype=torch.float64)
    """
    unit_ND = _unit(to_float64(directions))  # distances of directions that nearly coincide
    if power <= 0:
        raise ValueError(f"{power=} must be above zero.")
    size = len(unit_ND)
    if size < 2:
        return unit_ND.sum() * torch.nan
    total = unit_ND.new_zeros(())
    square_N = unit_ND.square().sum(1)
    for rows, cosine_BN, itself_BN in _cosine_blocks(unit_ND):
        square_BN = (square_N[rows, None] + square_N - 2 * cosine_BN).clamp(min=_FLOOR**2)
        total = total + (square_BN ** (-power / 2)).masked_fill(itself_BN, 0.0).sum()
    return total / (size * (size - 1))


def channel_energy(totals: MomentSums) -> Tensor:
    """:func:`hyperspherical_energy` of the channels: how alike the features of a layer are to one another.

    A channel is a column of the centred feature matrix, and the cosine of two of them their correlation over the
    samples. Channels that never change are left out.

    Args:
        totals: from ``moment_sums``.

    Returns:
        Scalar, float64; nan with fewer than two channels that change, or where a feature was not finite.

    Example:
        >>> features = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> from lightning_feat.functional.spectrum import moment_sums
        >>> channel_energy(moment_sums(features))  # uncorrelated: a right angle
        tensor(0.7071, dtype=torch.float64)
    """
    matrix_DD = covariance(totals)
    width = len(matrix_DD)
    if width == 0 or not matrix_DD.isfinite().all():
        return totals.samples * torch.nan
    size = totals.products.diagonal() / totals.samples
    changes = matrix_DD.diagonal() > width * torch.finfo(torch.float64).eps * size
    matrix_DD = matrix_DD[changes][:, changes]
    value_D, vector_DD = torch.linalg.eigh(matrix_DD)
    return hyperspherical_energy(vector_DD * value_D.clamp(min=0).sqrt())  # rows with these products


def _unit(features: Tensor) -> Tensor:
    check_shapes(features=(features, "ND"))
    return normalize(tamed(features.to(torch.promote_types(features.dtype, torch.float32)))[0], dim=1)


def _cosine_blocks(unit_ND: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their cosines with all samples ``(B, N)``, and which of these are those of a sample with itself."""
    size = len(unit_ND)
    step = max(1, _BLOCK // size)
    every = torch.arange(size, device=unit_ND.device)
    for first in range(0, size, step):
        rows = slice(first, first + step)
        yield rows, unit_ND[rows] @ unit_ND.T, every[rows, None] == every
