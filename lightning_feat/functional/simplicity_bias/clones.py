"""Clones of data that keep the low-order statistics of each class and are otherwise Gaussian.

Shapes: N samples, D numbers in each, C classes.
"""

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import check_target_range
from lightning_feat.functional.common.shapes import check_shapes


@torch.no_grad()
def gaussian_clones(
    features: Tensor, targets: Tensor, num_classes: int, shrinkage: float | None = None, seed: int = 0
) -> Tensor:
    r"""For each sample a draw from a Gaussian with the mean and the covariance of its class.

    With :math:`\mu_c` the mean and :math:`S_c` the covariance (over :math:`N_c`) of the samples of class c, the draws
    of that class are

    .. math:: N\Big(\mu_c, \ (1 - \gamma) S_c + \gamma \frac{\operatorname{tr} S_c}{D} I\Big)

    A shrinkage :math:`\gamma` of 1 keeps of each class the mean and how far its samples spread, and nothing of where:
    the isotropic clone. No matrix of :math:`D^2` is formed: a combination of the centred samples with normal
    coefficients has the covariance of these samples.

    Source: Refinetti, Ingrosso, Goldt, "Neural networks trained with SGD learn distributions of increasing complexity",
    ICML 2023, arXiv 2211.11567, who train on the data and test on such clones: a network first treats both alike. The
    shrinkage is ours: there are thousands of samples of each class there.

    Args:
        features: ``(N, D)`` floating, all numbers of an input, say.
        targets: ``(N,)`` class indices; the draws have the same.
        num_classes: number of classes C.
        shrinkage: in [0, 1]; None takes for each class what ``ledoit_wolf_shrinkage`` gives.
        seed: of a generator of its own on the CPU, so that every device has the same draws.

    Returns:
        ``(N, D)``, at least float32. Of a class with one sample the draw is its mean; where a sample of a class is not
        finite, the draws are not.

    Raises:
        ValueError: if shapes, class indices or the shrinkage do not fit.

    Cost: ``2 D sum(N_c^2)`` flops.

    Example:
        >>> features = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3.0])
        >>> clones = gaussian_clones(features, torch.zeros(3000, dtype=torch.long), num_classes=1)
        >>> clones.std(0).round().tolist()
        [1.0, 3.0]
    """
    check_shapes(features=(features, "ND"), targets=(targets, "N", int))
    check_target_range(targets, num_classes)
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage={shrinkage}: give a number in [0, 1], or None.")
    generator = torch.Generator().manual_seed(seed)
    clones = torch.empty_like(features, dtype=torch.promote_types(features.dtype, torch.float32))
    size = features.shape[1]
    for label in range(num_classes):
        rows = (targets == label).nonzero()[:, 0]
        if not len(rows):
            continue
        x = features[rows].double()
        mean = x.mean(0)
        x = x - mean
        share = float(ledoit_wolf_shrinkage(x)) if shrinkage is None else shrinkage
        drawn = [torch.randn(len(x), n, generator=generator, dtype=torch.float64).to(x.device) for n in (len(x), size)]
        spread = (x / max(size * len(x), 1) ** 0.5).norm()  # the root of the mean variance
        along = drawn[0] @ (x / len(x) ** 0.5)
        clones[rows] = (mean + (1 - share) ** 0.5 * along + share**0.5 * spread * drawn[1]).to(clones.dtype)
    return clones


@torch.no_grad()
def ledoit_wolf_shrinkage(centred: Tensor) -> Tensor:
    r"""How far to shrink a covariance towards a multiple of the identity, for the least expected squared error.

    With rows :math:`x_i` whose mean is zero, :math:`S = \frac1N \sum x_i x_i^T`, :math:`m = \operatorname{tr} S / D`
    and Frobenius norms,

    .. math:: \gamma = \min\Big(1, \ \frac{\frac{1}{N^2} \sum_i \lVert x_i \rVert^4 - \frac1N \lVert S \rVert^2}
              {\lVert S - m I \rVert^2}\Big)

    Source: Ledoit, Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", Journal of
    Multivariate Analysis 88 (2004).

    Args:
        centred: ``(N, D)`` floating.

    Returns:
        Scalar, float64, in [0, 1]; 1 where S is a multiple of the identity already, 0 for no samples.

    Example:
        >>> ledoit_wolf_shrinkage(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        tensor(0., dtype=torch.float64)
    """
    check_shapes(centred=(centred, "ND"))
    x = centred.double()
    if not x.numel():
        return x.new_zeros(())
    x = x / x.abs().max().clamp(min=torch.finfo(torch.float64).tiny)  # fourth powers leave the range of float64
    samples, size = x.shape
    gram = x @ x.T if samples < size else x.T @ x
    square_of_s = gram.square().sum() / samples**2
    mean = x.square().sum() / samples / size
    distance = square_of_s - size * mean.square()
    error = x.square().sum(1).square().sum() / samples**2 - square_of_s / samples
    # Zero but for rounding: S is the multiple that it would be shrunk to.
    if distance <= 1e-14 * square_of_s:
        return torch.ones_like(distance)
    return (error.clamp(min=0) / distance).clamp(max=1)
