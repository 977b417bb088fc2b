"""Subspaces as classes: logits, angles and distances, and bases kept orthonormal.

Shapes: N samples, C classes, D features, k dimensions of a subspace. A stack of subspaces is a basis (C, k, D),
contiguous, with orthonormal rows; any orthogonal mix of the k rows of a class is another basis of the same subspace.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.functional import normalize as unit_length

from lightning_feat.functional.common.lengths import tamed
from lightning_feat.functional.common.precision import full_precision
from lightning_feat.functional.common.shapes import check_shapes
from lightning_feat.functional.grassmann.geodesic import geodesic_

__all__ = [
    "chordal_distance",
    "geodesic_",
    "geodesic_distance",
    "orthonormality_error",
    "polar_projection",
    "principal_angles",
    "random_basis",
    "subspace_logits",
    "tangent_projection",
]


def subspace_logits(features: Tensor, basis: Tensor, scale: float | Tensor = 25.0, *, normalize: bool = True) -> Tensor:
    r"""Logit of class c: the length of the projection of the unit feature on the subspace of c, times ``scale``.

    .. math:: l_c = \gamma \lVert S_c x / \lVert x \rVert \rVert_2 \in [0, \gamma]

    Only the subspace counts, not the basis of it. The norm is not differentiable at zero: there, and for a feature that
    is zero, the gradient is zero. Source: Wang, Li, Zhang, ICCV 2023, arXiv 2308.01547; the scale of 25 is theirs.

    Args:
        features: ``(N, D)``, any floating dtype; half precision is brought to that of ``basis`` first.
        basis: ``(C, k, D)``, orthonormal rows.
        scale: largest possible logit; a tensor may be learned.
        normalize: divide each feature by its length first.

    Returns:
        ``(N, C)``, never negative; in float32 at least, because a squared length in half precision may overflow. Under
        autocast only the product with the basis is in half precision.

    Raises:
        ValueError: if the shapes are not ``(N, D)`` and ``(C, k, D)``.

    Cost: that of a linear layer with ``C k`` outputs.

    Example:
        >>> basis = torch.eye(3)[None, :2]  # the xy plane
        >>> subspace_logits(torch.tensor([[0.0, 2.0, 0.0], [0.0, 3.0, 4.0]]), basis, scale=10.0)
        tensor([[10.],
                [ 6.]])
    """
    if features.ndim != 2 or basis.ndim != 3 or features.shape[1] != basis.shape[2]:
        raise ValueError(
            f"subspace_logits needs features (N, D) and basis (C, k, D), got {tuple(features.shape)} and "
            f"{tuple(basis.shape)}: pool or flatten feature maps first, and store a basis as rows."
        )
    exact = torch.promote_types(basis.dtype, torch.float32)
    x_ND = features.to(exact)
    if normalize:
        x_ND = unit_length(tamed(x_ND)[0])
    parts_NCk = linear(x_ND.to(basis.dtype), basis.flatten(0, 1)).view(features.shape[0], *basis.shape[:2])
    logits_NC: Tensor = torch.linalg.vector_norm(parts_NCk.to(exact), dim=2)
    return logits_NC * scale


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Principal angles between subspaces, ascending, in radians, each in [0, pi / 2].

    From the singular values of both the cosines ``a b^T`` and the sines (what of the smaller space lies outside the
    larger), so that angles near zero are as accurate as those near a right angle: arccos alone turns a rounding of
    1e-16 into an angle of 1e-8. Source: Björck, Golub, "Numerical methods for computing angles between linear
    subspaces", Math. Comp. 27 (1973).

    Args:
        a: ``(..., k, D)``, orthonormal rows.
        b: ``(..., l, D)``, orthonormal rows; leading dimensions broadcast.

    Returns:
        ``(..., min(k, l))``, in float32 at least. Differentiable where the angles are distinct and not zero; else some
        subgradient.

    Example:
        >>> principal_angles(torch.eye(3)[:1], torch.tensor([[0.6, 0.8, 0.0]])).cos()
        tensor([0.6000])
    """
    small, large = _smaller_first(a, b)
    with full_precision(a.device):
        cosines = svdvals_or_nan(small @ large.mT)  # descending, so the angles ascend
        sines = svdvals_or_nan(_outside(small, large)).flip(-1)
    return torch.atan2(sines, cosines)


def svdvals_or_nan(matrices: Tensor) -> Tensor:
    """Singular values ``(..., k)`` in float32 at least, nan where a matrix is not finite: ``svdvals`` would raise."""
    check_shapes(matrices=(matrices, "*AB"))
    matrices = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    finite = matrices.isfinite().all(-1).all(-1)[..., None]
    values = torch.linalg.svdvals(torch.where(finite[..., None], matrices, 0.0))
    return torch.where(finite, values, torch.nan)


def geodesic_distance(a: Tensor, b: Tensor) -> Tensor:
    """Length of the shortest path between subspaces: root of the sum of squared principal angles, in radians.

    Shapes as in :func:`principal_angles`, without the last dimension; zero where one space contains the other.
    """
    distance: Tensor = torch.linalg.vector_norm(principal_angles(a, b), dim=-1)
    return distance


def chordal_distance(a: Tensor, b: Tensor) -> Tensor:
    """Root of the sum of squared sines of the principal angles, in [0, sqrt(min(k, l))].

    For k = l this is the Frobenius distance of the projectors over the square root of two. No SVD is needed. Shapes as
    in :func:`principal_angles`, without the last dimension; zero where one space contains the other.
    """
    small, large = _smaller_first(a, b)
    with full_precision(a.device):
        distance: Tensor = torch.linalg.vector_norm(_outside(small, large), dim=(-2, -1))
    return distance


def orthonormality_error(basis: Tensor) -> Tensor:
    """Largest entry of ``abs(S S^T - I)`` for each subspace: ``(..., k, D)`` to ``(...)``; zero is orthonormal.

    In float32 at least. A float32 basis has about 1e-6 of it from rounding alone; one rounded to bfloat16 4e-3.
    """
    check_shapes(basis=(basis, "*kD"))
    rows = basis.to(torch.promote_types(basis.dtype, torch.float32))
    with full_precision(basis.device):
        gram = rows @ rows.mT
    if gram.numel() == 0:
        return gram.new_zeros(gram.shape[:-2])
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().amax((-2, -1))


@torch.no_grad()
def polar_projection(basis: Tensor) -> Tensor:
    """Nearest orthonormal basis, in the Frobenius norm, of the subspace that the rows span.

    It is ``(S S^T)^(-1/2) S``. Of all orthonormal bases it turns the rows least, so that an optimizer's buffers stay
    aligned; a QR would flip their signs. For repairs, loading and averaging: computed in float64, not differentiable,
    and it waits for the device. On a device without float64 it runs on the CPU.

    Args:
        basis: ``(..., k, D)``, any floating dtype; rows linearly independent.

    Returns:
        Contiguous, same shape, dtype and device.

    Raises:
        ValueError: if a value is not finite, or the rows of some subspace are linearly dependent in their own dtype.

    Example:
        >>> polar_projection(torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.5, 0.0]]]))
        tensor([[[1., 0., 0.],
                 [0., 1., 0.]]])
    """
    check_shapes(basis=(basis, "*kD"))
    if basis.numel() == 0:
        return basis.clone(memory_format=torch.contiguous_format)
    if not bool(basis.isfinite().all()):
        raise ValueError("polar_projection got a basis with NaN or inf: lower the learning rate, or load another.")
    rows = (basis.cpu() if basis.device.type == "mps" else basis).double().contiguous()
    # Twice: a Gram matrix squares the condition number, so a basis far off is only brought near by the first pass.
    for tolerance in (10 * torch.finfo(basis.dtype).eps, 0.0):
        eigenvalues, vectors = torch.linalg.eigh(rows @ rows.mT)
        # Squared singular values: what float64 resolves in their ratio bounds what can be asked of the rows.
        smallest = max(tolerance**2, 10 * rows.shape[-2] * torch.finfo(torch.float64).eps) if tolerance else 0.0
        dependent = (eigenvalues[..., 0] <= smallest * eigenvalues[..., -1]).flatten()
        if bool(dependent.any()):
            raise ValueError(
                f"polar_projection: the rows of {int(dependent.sum())} of {len(dependent)} subspaces are linearly "
                f"dependent (first: {int(dependent.int().argmax())}), so they span less than {rows.shape[-2]} "
                "dimensions: lower subspace_dim or draw these anew with random_basis."
            )
        rows = (vectors * eigenvalues.rsqrt().unsqueeze(-2)) @ vectors.mT @ rows
    return rows.to(device=basis.device, dtype=basis.dtype)


def random_basis(
    num_classes: int,
    subspace_dim: int,
    num_features: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw independent subspaces from the uniform (Haar) distribution, with uniform bases: ``(C, k, D)``, contiguous.

    Raises:
        ValueError: if ``subspace_dim`` is not in 1 ... ``num_features``, or the dtype is narrower than float32.

    Example:
        >>> random_basis(10, 4, 16, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([10, 4, 16])
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not 1 <= subspace_dim <= num_features:
        raise ValueError(f"random_basis needs 1 <= subspace_dim <= {num_features} features, got {subspace_dim}.")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"random_basis draws float32 or float64, got {dtype}: a basis in half precision is not one.")
    normal_CDk = torch.randn(num_classes, num_features, subspace_dim, generator=generator, dtype=dtype, device=device)
    q_CDk, r_Ckk = torch.linalg.qr(normal_CDk)
    # The signs that QR picks are not random; with a positive diagonal of R the basis is uniform too. QR gives columns
    # in memory, which safetensors refuses to save.
    basis: Tensor = (q_CDk * r_Ckk.diagonal(dim1=1, dim2=2).sign()[:, None]).mT.contiguous()
    return basis


def tangent_projection(basis: Tensor, vector: Tensor) -> Tensor:
    """Part of ``vector`` that turns the subspace: ``V - (V S^T) S``, orthogonal to every row of ``basis``.

    Both ``(..., k, D)``; differentiable. It makes a Riemannian gradient of a Euclidean one.
    """
    check_shapes(basis=(basis, "*kD"), vector=(vector, "*kD"))
    with full_precision(basis.device):
        return _outside(vector, basis)


def _outside(vector: Tensor, basis: Tensor) -> Tensor:
    return vector - (vector @ basis.mT) @ basis


def _smaller_first(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    check_shapes(a=(a, "*kD"), b=(b, "*lD"))
    exact = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return (a.to(exact), b.to(exact)) if a.shape[-2] <= b.shape[-2] else (b.to(exact), a.to(exact))
