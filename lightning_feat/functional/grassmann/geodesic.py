r"""One step along a Grassmann geodesic, in place, for what a Euclidean optimizer made of a stack of subspaces.

Shapes: C classes, B classes in a block, k dimensions of a subspace, D features. A basis is (C, k, D), orthonormal rows.

The formula. Let X (k, D) be the start, R = (X X^T)^(-1/2) and X' = R X its repaired basis, Delta the displacement,
A = Delta X'^T its part inside the subspace, T = Delta - A X' the tangent part, and H = T T^T = Delta Delta^T - A A^T.
With the thin SVD T = V diag(sigma) U^T the geodesic that leaves X' along T ends in

.. math:: V \cos(\Sigma) V^T X' + V \sin(\Sigma) U^T
          = \cos(\sqrt H) X' + \frac{\sin \sqrt H}{\sqrt H} T
          = (c - s A) R X + s \Delta, \qquad H = V \Sigma^2 V^T,

with c and s the two functions of H. Both are entire in H (power series without square roots), so that neither an
eigenvector nor a singular value is ever needed, and equal or vanishing angles are nothing special. All of G = X X^T,
Delta X^T and Delta Delta^T is one Gram matrix of the stacked rows [X; Delta].
"""

import functools
import itertools
import math

import torch
from torch import Tensor

from lightning_feat.functional.common.precision import full_precision
from lightning_feat.functional.common.shapes import check_shapes

# Terms of the two series: for |H| <= 1 the first one left out is 1 / 12! = 2e-9 or 1 / 18! = 2e-16 at most.
_DEGREE = {torch.float32: 5, torch.float64: 8}
# Rounding moves H by eps |H|, so a turn of t radians leaves the end orthonormal to eps t^2 only: 2e-2 for 512 rad in
# float32, from which the next repair brings it to 1e-6, and 4e-9 for 4096 rad in float64.
_MAX_DOUBLINGS = {torch.float32: 9, torch.float64: 12}
_BLOCK_BYTES = 6 * 2**20  # rows [X; Delta] of a block: 4 to 8 MiB are level on a CPU with 32 MiB of cache
_ACCELERATOR_BLOCK_BYTES = 256 * 2**20  # a block costs launches, so few of them, but no second copy of a large head
_LARGE_INSIDE = 1.0  # radians; below, what cancels in H is a few roundings of one


@torch.no_grad()
def geodesic_(moved: Tensor, start: Tensor, *, factor: float = 1.0, repair: bool = True) -> Tensor:
    r"""Overwrite ``moved`` by the end of the geodesic from ``start`` along the tangent part of ``moved - start``.

    Any optimizer that steps freely in the ambient space becomes a Riemannian one: keep a copy of the parameter, let the
    optimizer step, call this. The formula stands on top of the file. Of the displacement only the part orthogonal to
    the subspace counts; its singular values, times ``factor``, are the principal angles (radians) between start and
    end, until they pass pi / 2. The basis keeps its gauge (the trailing rotation of the formula), so that a momentum
    buffer in ambient coordinates stays aligned with it.

    It also repairs the basis: the inverse square root of the Gram matrix of ``start`` is folded into the small
    matrices, to third order in its error e (an e of 1e-3 leaves 1e-9). Project a basis that is further off before.

    Args:
        moved: ``(C, k, D)``, start plus displacement, float32 or float64; overwritten. A class with a NaN or an inf
            comes out as NaN; one that did not move at all comes out equal to ``start``, element for element.
        start: ``(C, k, D)``, orthonormal rows; left as it is.
        factor: multiplies the displacement.
        repair: repair the basis. Without it an error of ``start`` stays and rounding adds to it, in float32 some 1e-7 a
            call; that spares a fifth of the time, so a caller may repair now and then.

    Returns:
        ``moved``.

    Raises:
        ValueError: if the shapes, devices or dtypes differ, the shape is not ``(C, k, D)``, or the dtype is narrower
            than float32.

    Cost: reads both once and writes ``moved`` once, in blocks of classes that stay in cache; ``12 k^2 D`` flops a
    class, which bound it on a CPU; 6 MiB of scratch there. At 1000 x 8 x 2048 in float32 on two cores copy, fused SGD
    and this took 41 ms, fused SGD alone 6.6 ms (medians on a machine with other load). On an accelerator nothing waits
    for the host. A class that turns by more than 512 rad in float32 (4096 in float64) comes out as NaN: with such a
    step, which only a diverged run takes, rounding decides where it ends.
    Source: Edelman, Arias, Smith, "The geometry of algorithms with orthogonality constraints", SIAM J. Matrix Anal.
    Appl. 20 (1998), theorem 2.3, for the geodesic; Wang, Li, Zhang, ICCV 2023, arXiv 2308.01547, for its use.

    Example:
        >>> start = torch.tensor([[[1.0, 0.0, 0.0]]])
        >>> geodesic_(start + torch.tensor([[[5.0, torch.pi / 2, 0.0]]]), start).abs().round()
        tensor([[[0., 1., 0.]]])
    """
    _check_pair(moved, start)
    num_classes, k, width = moved.shape
    if moved.numel() == 0:  # a rank that holds no class of a sharded head
        return moved
    block_bytes = _BLOCK_BYTES if moved.device.type == "cpu" else _ACCELERATOR_BLOCK_BYTES
    block = max(1, min(num_classes, block_bytes // (2 * k * width * moved.element_size())))
    rows = moved.new_empty(block, 2 * k, width)
    with full_precision(moved.device):
        for moved_BkD, start_BkD in zip(torch.split(moved, block), torch.split(start, block), strict=True):
            rows_BrD = rows[: len(moved_BkD)]  # r = 2 k: the start above, the displacement below
            rows_BrD[:, :k].copy_(start_BkD)
            torch.sub(moved_BkD, start_BkD, out=rows_BrD[:, k:])
            torch.bmm(_end_coefficients(rows_BrD, factor, repair), rows_BrD, out=moved_BkD)
    return moved


def _check_pair(moved: Tensor, start: Tensor) -> None:
    if moved.ndim != 3 or moved.shape != start.shape or moved.shape[1] > moved.shape[2]:
        raise ValueError(
            f"geodesic_ needs moved and start of one shape (C, k, D) with k <= D, got {tuple(moved.shape)} and "
            f"{tuple(start.shape)}: add a leading class dimension, and store a basis as rows."
        )
    if moved.dtype != start.dtype or moved.dtype not in (torch.float32, torch.float64) or moved.device != start.device:
        raise ValueError(
            f"geodesic_ needs moved and start both in float32 or float64 on one device, got {moved.dtype} on "
            f"{moved.device} and {start.dtype} on {start.device}: keep the basis in float32, since in half precision "
            "it is orthonormal to 4e-3 at best."
        )


def _may_look(tensor: Tensor) -> bool:
    """Whether to read a value and spare work by it; on an accelerator the reading would wait for all work before."""
    return tensor.device.type == "cpu"


def _end_coefficients(rows_BrD: Tensor, factor: float, repair: bool) -> Tensor:
    """Factors (B, k, 2 k) of X and of Delta in the end; may take what lies along X out of Delta in place."""
    k = rows_BrD.shape[1] // 2
    delta_BkD = rows_BrD[:, k:]
    gram_Bkr = torch.bmm(delta_BkD, rows_BrD.mT)
    # Bit for bit: a class that stays must not be repaired. NaN is not zero, so it goes on.
    still_B11 = gram_Bkr[:, :, k:].diagonal(dim1=1, dim2=2).sum(1)[:, None, None] == 0 if repair else None
    # On an accelerator reading a value would wait for all work before.
    largest = float(gram_Bkr.abs().amax()) if _may_look(rows_BrD) else torch.inf
    # H = Delta Delta^T - A A^T cancels where much of Delta lies inside the subspace. There take that part out of Delta
    # before H is formed, at the price of two more products.
    if not abs(factor) * largest <= _LARGE_INSIDE:
        delta_BkD.baddbmm_(gram_Bkr[:, :, :k], rows_BrD[:, :k], alpha=-1)
        gram_Bkr = torch.bmm(delta_BkD, rows_BrD.mT)
    inside_Bkk, outer_Bkk = gram_Bkr[:, :, :k], gram_Bkr[:, :, k:]
    repair_Bkk = _inverse_square_root(rows_BrD[:, :k]) if repair else None
    inside_Bkk = inside_Bkk if repair_Bkk is None else torch.bmm(inside_Bkk, repair_Bkk)
    inside_Bkk = inside_Bkk if factor == 1 else inside_Bkk * factor
    h_Bkk = torch.baddbmm(outer_Bkk, inside_Bkk, inside_Bkk.mT, beta=factor**2, alpha=-1)
    # In a usual step nothing is to be halved or doubled: the norm of H is at most its trace, and that k times the peak.
    is_small = factor**2 * k * largest <= 1
    ends_Bkr = _series(h_Bkk) if is_small else torch.cat(cos_and_sinc(h_Bkk), 2)
    of_start_Bkk, of_delta_Bkk = ends_Bkr[:, :, :k], ends_Bkr[:, :, k:]
    of_start_Bkk.baddbmm_(of_delta_Bkk, inside_Bkk, alpha=-1)
    if repair_Bkk is not None and still_B11 is not None:
        eye_kk = torch.eye(k, dtype=rows_BrD.dtype, device=rows_BrD.device)
        of_start_Bkk.copy_(torch.where(still_B11, eye_kk, torch.bmm(of_start_Bkk, repair_Bkk)))
    if factor != 1:
        of_delta_Bkk.mul_(factor)
    return ends_Bkr


def _inverse_square_root(x_BkD: Tensor) -> Tensor:
    """``(X X^T)^(-1/2)`` of nearly orthonormal rows, to third order in their error."""
    eye_kk = torch.eye(x_BkD.shape[1], dtype=x_BkD.dtype, device=x_BkD.device)
    error_Bkk = torch.bmm(x_BkD, x_BkD.mT) - eye_kk
    return torch.baddbmm(eye_kk - 0.5 * error_Bkk, error_Bkk, error_Bkk, alpha=0.375)


def cos_and_sinc(h: Tensor) -> tuple[Tensor, Tensor]:
    r"""Both of :math:`\cos \sqrt H` and :math:`\sin \sqrt H / \sqrt H` of symmetric matrices, without eigenvalues.

    Power series of :math:`H / 4^m`, then m doublings of the angle; m is chosen for each matrix by its Frobenius norm.
    The error is about :math:`1 + \lVert H \rVert` roundings, that of H itself. On a CPU the loop ends with the largest
    m; elsewhere it runs its full length, so that nothing waits for the device.

    Args:
        h: ``(B, k, k)``, symmetric and positive semidefinite up to rounding; square of the angles, in radians.

    Returns:
        Two tensors ``(B, k, k)``; NaN where the norm of H is above the square of 512 (float32) or 4096 (float64).
        Differentiable.

    Raises:
        ValueError: if ``h`` is neither float32 nor float64.
    """
    check_shapes(h=(h, "Bkk"))
    if h.dtype not in _DEGREE:
        raise ValueError(f"cos_and_sinc needs float32 or float64, got {h.dtype}: keep the basis in float32.")
    # Detached: the number of doublings is constant, but the gradient of log2 at zero would make NaN of that.
    norm_B11 = torch.linalg.vector_norm(h.detach(), dim=(1, 2), keepdim=True)
    if _may_look(h) and bool((norm_B11 <= 1).all()):  # angles of a usual step: nothing to halve or double
        cos, sinc = _series(h).tensor_split(2, -1)
        return cos, sinc
    most = _MAX_DOUBLINGS[h.dtype]
    doublings_B11 = (0.5 * norm_B11.log2()).ceil().clamp(min=0)
    doublings_B11 = torch.where(doublings_B11 > most, torch.nan, doublings_B11)
    h = h * torch.exp2(-2 * doublings_B11)
    cos, sinc = _series(h).tensor_split(2, -1)
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    for done in range(int(doublings_B11.nan_to_num().max()) if _may_look(h) else most):
        going_B11 = doublings_B11 > done
        # cos 2x = 1 - 2 sin^2 x: near 1 it keeps the digits that 2 cos^2 x - 1 would lose, factor 4 at each doubling.
        cos, sinc = (
            torch.where(going_B11, eye - 2 * (h @ (sinc @ sinc)), cos),
            torch.where(going_B11, sinc @ cos, sinc),
        )
        h = 4 * h
    return cos, sinc


def _series(h: Tensor) -> Tensor:
    """Both functions side by side, ``(B, k, 2 k)``, for norms up to 1, by Horner's rule."""
    *rest, last = _series_terms(h.shape[-1], h.dtype, h.device)
    both = last.expand(len(h), -1, -1)
    for term in reversed(rest):
        both = torch.baddbmm(term, h, both)
    return both


@functools.lru_cache(maxsize=8)
def _series_terms(k: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Of each power of H the two coefficients, times the identity, ``(k, 2 k)``: made once, they save small kernels."""
    with torch.inference_mode(False):
        eye = torch.eye(k, dtype=torch.float64)
        return [
            torch.cat([sign * eye / math.factorial(2 * n), sign * eye / math.factorial(2 * n + 1)], 1).to(device, dtype)
            for n, sign in zip(range(_DEGREE[dtype] + 1), itertools.cycle((1, -1)))
        ]
