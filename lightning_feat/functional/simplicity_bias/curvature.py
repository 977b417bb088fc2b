"""The largest eigenvalue of a matrix that is known by its products alone, such as the Hessian of a loss."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class TopEigenvalue(NamedTuple):
    """What power iteration found."""

    value: Tensor  # scalar, float64: the largest eigenvalue, not the largest in size; nan where a product is not finite
    products: int  # how many it took
    converged: bool


@torch.no_grad()
def top_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, max_products: int = 100, tolerance: float = 0.01
) -> TopEigenvalue:
    r"""The largest eigenvalue of a symmetric matrix H, by power iteration.

    :math:`v \leftarrow Hv / \lVert Hv \rVert` tends to the eigenvector of the eigenvalue that is largest in size, and
    :math:`\lambda = v^T H v` to that. Where it is negative, or two of opposite signs compete, the iteration goes on
    with :math:`H + sI`, s being the size found, whose eigenvalues have one sign. It ends when :math:`\lVert Hv -
    \lambda v \rVert \le \text{tolerance} \cdot \lvert \lambda \rvert`; the value is then off by the square of that
    over the gap to the next eigenvalue.

    Args:
        product: gives ``H v`` for ``v`` ``(P,)``.
        start: ``(P,)`` floating, not along an eigenvector of another eigenvalue: drawn at random, say.
        max_products: bound on the products, for each of the two iterations.
        tolerance: of the residual.

    Raises:
        ValueError: if ``start`` is no vector, or zero, or a number is out of range.

    Example:
        >>> matrix = torch.diag(torch.tensor([-3.0, 1.0, 2.0]))
        >>> round(float(top_eigenvalue(lambda v: matrix @ v, torch.ones(3), tolerance=1e-4).value), 4)
        2.0
    """
    if start.ndim != 1 or not start.is_floating_point() or (start.numel() and not start.any()):
        raise ValueError(f"start must be a floating vector (P,), not zero, got {start.dtype} {tuple(start.shape)}.")
    if max_products < 1 or not tolerance > 0:
        raise ValueError(f"{max_products=} must be at least 1, {tolerance=} above zero.")
    if not start.numel():
        return TopEigenvalue(torch.tensor(torch.nan, dtype=torch.float64), 0, False)
    value, size, used, settled = _power(product, start, 0.0, max_products, tolerance)
    if not value >= 0 or not settled:  # nan too
        if value != value:
            return TopEigenvalue(torch.tensor(torch.nan, dtype=torch.float64), used, False)
        value, _, more, settled = _power(product, start, size, max_products, tolerance)
        used += more
    return TopEigenvalue(torch.tensor(value, dtype=torch.float64), used, settled)


def _power(
    product: Callable[[Tensor], Tensor], start: Tensor, shift: float, max_products: int, tolerance: float
) -> tuple[float, float, int, bool]:
    """Eigenvalue, the size of the last product, products, and whether it has settled; of H, shifted on the way."""
    v = start / start.norm()
    value = size = torch.nan
    for used in range(1, max_products + 1):
        hv = product(v)
        value = float(torch.dot(v.double(), hv.double()))
        size = float(hv.double().norm())
        residual = float((hv.double() - value * v.double()).norm())
        if size != size or size == float("inf"):
            return torch.nan, size, used, False
        # Zero is an eigenvalue too: then the product vanishes against the shift.
        if residual <= tolerance * abs(value) or size + shift == 0 or (value == 0 and residual == 0):
            return value, size, used, True
        moved = hv + shift * v
        length = moved.double().norm()
        if length == 0:
            return value, size, used, True
        v = (moved / length).to(start.dtype)
    return value, size, max_products, False
