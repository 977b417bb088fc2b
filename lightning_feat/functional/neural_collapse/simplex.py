"""Prototypes at the corners of a simplex: C unit vectors that are as far from each other as C directions can be.

Their cosines are all ``-1 / (C - 1)``, a "simplex equiangular tight frame" (ETF). Class means and classifier converge
to one in neural collapse; here it is built beforehand. It needs ``D >= C - 1`` dimensions.

Shapes: N samples, D features, C classes, R = C - 1.
"""

import torch
from torch import Tensor

from lightning_feat.functional.common.lengths import tamed
from lightning_feat.functional.common.shapes import check_shapes

_ZERO_LENGTH = 1e-8  # features shorter than this have no direction; the bound is that of Yang et al., NeurIPS 2022
_SPARSE_TOLERANCE = 1e-7  # of the cosines: near what float32 prototypes keep
_SPARSE_ROUNDS = 5000


def simplex_prototypes(num_classes: int, num_features: int, seed: int = 0) -> Tensor:
    r"""A simplex in a uniformly random position, ``(C, D)`` float64 on the CPU, unit rows that sum to zero.

    .. math:: E = \sqrt{C / (C - 1)}\; B Q^\top, \qquad B B^\top = I - 11^\top / C, \quad Q^\top Q = I

    with B ``(C, C - 1)``, and Q ``(D, C - 1)`` random. For ``D >= C`` this is the ETF of Yang et al., NeurIPS 2022,
    arXiv 2203.09081 (B Q^T there is P^T less its mean); that form needs one dimension more than a simplex has.

    Args:
        num_classes: C, at least two.
        num_features: D, at least ``C - 1``.
        seed: of a generator of its own, so that the random numbers of a run stay what they are.

    Raises:
        ValueError: if there are fewer than two classes, or too few dimensions for them.

    Example:
        >>> prototypes = simplex_prototypes(num_classes=5, num_features=4)
        >>> (prototypes @ prototypes.T)[0]
        tensor([ 1.0000, -0.2500, -0.2500, -0.2500, -0.2500], dtype=torch.float64)
    """
    _check_sizes(num_classes, num_features)
    corner_CR = _corners(num_classes)
    generator = torch.Generator().manual_seed(seed)
    noise_DR = torch.randn(num_features, num_classes - 1, dtype=torch.float64, generator=generator, device="cpu")
    q_DR, r_RR = torch.linalg.qr(noise_DR)
    q_DR = q_DR * r_RR.diagonal().sign()  # so that it is uniform, and the same from any LAPACK
    return corner_CR @ q_DR.T


def sparse_simplex_prototypes(num_classes: int, num_features: int, sparsity: float = 0.6, seed: int = 0) -> Tensor:
    """A simplex of which a random share ``sparsity`` of the entries is zero: ``(C, D)`` float64, unit rows.

    Each class then looks at few of the features only. The idea and the share of 0.6 are those of Xiao et al., FedLoGe,
    ICLR 2024, who spread what masking has left by gradient steps on the nearest angles, and come close to a simplex.
    Here the zeros and the simplex are both met, by alternating projections (Tropp et al., "Designing structured tight
    frames via an alternating projection method", IEEE Trans. Inf. Theory 2005): cosines are right to 1e-7.

    Raises:
        ValueError: as :func:`simplex_prototypes`, and where no simplex has so many zeros. Every column must sum to
            zero, so that the entries which are left meet the ``C (C - 1) / 2`` angles only for a sparsity up to about
            ``1 - 1 / C - (C - 1) / (2 D)``; near this bound the search may fail as well.

    Cost: an SVD ``(D, C)`` per round, tens to thousands of them: once, when the head is made.
    """
    _check_sizes(num_classes, num_features)
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} is the share of zeros among the entries: it must lie in [0, 1).")
    limit = 1 - 1 / num_classes - (num_classes - 1) / (2 * num_features)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_classes * num_features, generator=generator, device="cpu")
    keep_CD = (order >= round(sparsity * order.numel())).view(num_classes, num_features)
    corner_CR = _corners(num_classes)
    gram_CC = corner_CR @ corner_CR.T
    e_CD = simplex_prototypes(num_classes, num_features, seed) * keep_CD
    for _ in range(_SPARSE_ROUNDS):
        if (e_CD @ e_CD.T - gram_CC).abs().max() < _SPARSE_TOLERANCE:
            return e_CD / torch.linalg.vector_norm(e_CD, dim=1, keepdim=True)
        u_DR, _, vh_RR = torch.linalg.svd(e_CD.T @ corner_CR, full_matrices=False)
        e_CD = (corner_CR @ (u_DR @ vh_RR).T) * keep_CD  # the nearest simplex, then the nearest with the zeros
    raise ValueError(
        f"no simplex of {num_classes} classes in {num_features} features was found with sparsity={sparsity}: lower it "
        f"(the bound is near {max(limit, 0.0):.2f}), or leave the simplex dense."
    )


def prototype_cosines(features: Tensor, prototypes: Tensor) -> Tensor:
    """Inner products ``(N, C)`` of the features ``(N, D)``, divided by their lengths, with the prototypes ``(C, D)``.

    Cosines, for unit prototypes. In float32 at least, under autocast too. A feature shorter than 1e-8 has no direction:
    its cosines and its gradient are zero.
    """
    if features.ndim != 2 or prototypes.ndim != 2 or features.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"features (N, D) and prototypes (C, D) are needed, got {tuple(features.shape)} and "
            f"{tuple(prototypes.shape)}: pool or flatten feature maps first."
        )
    with torch.autocast(features.device.type, enabled=False):
        unit_ND = directions(features, prototypes.dtype)
        return unit_ND @ prototypes.to(unit_ND.dtype).T


def directions(features: Tensor, at_least: torch.dtype = torch.float32) -> Tensor:
    """Features ``(..., D)`` divided by their lengths, in float32 at least; those shorter than 1e-8 become zero."""
    check_shapes(features=(features, "*D"))
    dtype = torch.promote_types(torch.promote_types(features.dtype, torch.float32), at_least)
    exact = features.to(dtype)
    exact, size = tamed(exact)
    length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    # Clamped alone, a feature of zero would get the gradient of its cosines times 1e8.
    return torch.where(length * size > _ZERO_LENGTH, exact / length.clamp(min=_ZERO_LENGTH), 0.0)


def _check_sizes(num_classes: int, num_features: int) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: a simplex has at least two corners.")
    if num_features < num_classes - 1:
        raise ValueError(
            f"{num_features} features have no room for a simplex of {num_classes} classes, which needs at least "
            f"{num_classes - 1}: put a Linear(..., {num_classes}) before it, or keep a learned classifier."
        )


def _corners(num_classes: int) -> Tensor:
    """``(C, C - 1)``: unit rows with cosines ``-1 / (C - 1)``, from Helmert's orthonormal contrasts."""
    size = torch.arange(1, num_classes, dtype=torch.float64, device="cpu")  # column j weighs j classes against the next
    contrast_CR = torch.ones(num_classes, num_classes - 1, dtype=torch.float64, device="cpu").triu()
    contrast_CR[1:] -= torch.diag(size)
    contrast_CR = contrast_CR / (size * (size + 1)).sqrt()
    return contrast_CR * (num_classes / (num_classes - 1)) ** 0.5
