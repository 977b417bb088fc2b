r"""The Grassmann manifold of k-dimensional subspaces of R^n, for geoopt.

Shapes: n ambient dimensions, k dimensions of a subspace. As everywhere in geoopt a point is (..., n, k) with
orthonormal columns; ``functional.grassmann`` and the heads keep its transpose. A point x is one basis of many: the
manifold is the Stiefel manifold up to the right action x -> x O of orthogonal O (k, k), and a tangent vector u at x is
horizontal, x^T u = 0, and turns along: u -> u O. The methods commute with that action, ``retr`` as a subspace.
"""

import math

import torch
from geoopt.manifolds.base import Manifold
from geoopt.tensor import ManifoldTensor
from geoopt.utils import size2shape
from torch import Tensor

from lightning_feat.functional.grassmann import geodesic_distance, polar_projection, random_basis
from lightning_feat.functional.grassmann.geodesic import cos_and_sinc
from lightning_feat.functional.grassmann.smooth import AngleOverSine, OrthogonalFactor

__all__ = ["Grassmann"]


class Grassmann(Manifold):  # type: ignore[misc]  # geoopt is not typed
    r"""Subspaces, with the metric :math:`\langle u, v \rangle = \mathrm{tr}(u^T v)` on horizontal vectors.

    Exponential map, logarithm and parallel transport are exact. Moves keep the gauge of the basis (no column changes
    sign or place), so that what an optimizer remembers beside it stays aligned. Of a vector that should be tangent and
    is not, the tangent part is taken: the first momentum buffer of geoopt's ``RiemannianSGD`` is a raw gradient. In
    float32 or float64.
    Source: Edelman, Arias, Smith, SIAM J. Matrix Anal. Appl. 20 (1998); the logarithm by aligning the bases first:
    Bendokat, Zimmermann, Absil, "A Grassmann manifold handbook", Adv. Comput. Math. 50 (2024).

    Example:
        >>> manifold = Grassmann()
        >>> x = manifold.origin(3, 1)
        >>> y = manifold.expmap(x, torch.tensor([[0.0], [torch.pi / 4], [0.0]]))
        >>> manifold.dist(x, y)
        tensor(0.7854)
    """

    name = "Grassmann"
    ndim = 2
    reversible = False

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        ok, reason = super()._check_shape(shape, name)
        if ok and shape[-1] > shape[-2]:
            return False, f"`{name}` should have shape[-1] <= shape[-2], got {shape[-1]} </= {shape[-2]}"
        return ok, reason

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> tuple[bool, str | None]:
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        if not torch.allclose(x.mT @ x, eye.expand(*x.shape[:-2], -1, -1), atol=atol, rtol=rtol):
            return False, f"`X^T X != I` with atol={atol}, rtol={rtol}"
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        along = x.mT @ u
        if not torch.allclose(along, torch.zeros_like(along), atol=atol, rtol=rtol):
            return False, f"`X^T u != 0` with atol={atol}, rtol={rtol}"
        return True, None

    def projx(self, x: Tensor) -> Tensor:
        """Nearest orthonormal basis of the span of the columns (polar); not differentiable.

        Raises:
            ValueError: if the columns are linearly dependent or not finite.
        """
        return polar_projection(x.mT).mT.contiguous()

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Horizontal part of ``u``."""
        return u - x @ (x.mT @ u)

    egrad2rgrad = proju

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        return (u * (u if v is None else v)).sum((-2, -1), keepdim=keepdim)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Second-order retraction: the Q factor of ``x + u``, with the signs that keep the columns where they are."""
        q, r = torch.linalg.qr(x + self.proju(x, u))
        sign = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
        return (q * sign.unsqueeze(-2)).contiguous()

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        u = self.proju(x, u)
        cos, sinc = self._cos_and_sinc(u.mT @ u)
        return x @ cos + u @ sinc

    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Parallel transport of ``v`` along the geodesic of ``u``, however long, to ``expmap(x, u)``."""
        u, v = self.proju(x, u), self.proju(x, v)
        h = u.mT @ u
        _, sinc = self._cos_and_sinc(h)
        _, half_sinc = self._cos_and_sinc(h / 4)
        # With u = U sigma R^T: v + (U (cos - 1) - x R sin) U^T v, and (1 - cos t) / t^2 = sinc(t / 2)^2 / 2.
        return v - (x @ sinc + u @ (half_sinc @ half_sinc) / 2) @ (u.mT @ v)

    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.expmap(x, u), self.transp_follow_expmap(x, u, v)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Shortest tangent vector that leads from x to the subspace of y; its norm is the distance.

        ``expmap(x, logmap(x, y))`` is the basis of that subspace nearest to x, in general not y itself. Where an angle
        is pi / 2 there are several such vectors, and this is one. Differentiable once, also where angles coincide or
        are zero.
        """
        z = y @ OrthogonalFactor.apply(y.mT @ x)  # x^T z is symmetric: the cosines; z outside x: the sines
        return self.proju(x, z) @ AngleOverSine.apply(x.mT @ z)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        r"""Parallel transport of ``v`` from x to y along the shortest geodesic, in the gauge of y.

        With z = y W the basis of the subspace of y nearest to x, the transport to z is
        :math:`v - (x + z)(I + x^T z)^{-1} z^T v`, the formula of the sphere with matrices for numbers; right
        multiplication by :math:`W^T` brings it to y. Lengths and angles stay.
        """
        align = OrthogonalFactor.apply(y.mT @ x)
        z, v = y @ align, self.proju(x, v)
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        # x^T z has eigenvalues cos(angle) >= 0: nothing here is ill-conditioned
        moved = v - (x + z) @ torch.linalg.solve(eye + x.mT @ z, z.mT @ v)
        return moved @ align.mT

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Root of the sum of squared principal angles."""
        distance = geodesic_distance(x.mT, y.mT)
        return distance[..., None, None] if keepdim else distance

    def random(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Uniformly distributed (Haar) subspaces of shape ``size``, in a uniformly distributed basis."""
        shape = size2shape(*size)
        self._assert_check_shape(shape, "x")
        *batch, n, k = shape
        rows = random_basis(math.prod(batch), k, n, generator=generator, dtype=dtype, device=device)
        return ManifoldTensor(rows.mT.reshape(shape).contiguous(), manifold=self)

    def origin(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> Tensor:
        """The span of the first k unit vectors; ``seed`` is ignored, as in geoopt's Stiefel manifolds."""
        shape = size2shape(*size)
        self._assert_check_shape(shape, "x")
        eye = torch.eye(*shape[-2:], dtype=dtype, device=device)
        return ManifoldTensor(eye.expand(shape).contiguous(), manifold=self)

    @staticmethod
    def _cos_and_sinc(h: Tensor) -> tuple[Tensor, Tensor]:
        cos, sinc = cos_and_sinc(h.reshape(-1, *h.shape[-2:]))
        return cos.reshape(h.shape), sinc.reshape(h.shape)
