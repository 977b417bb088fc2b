"""The laws of a Riemannian manifold, of a homogeneous space of the orthogonal group, and of geoopt's optimizers."""

import math

import geoopt
import pytest
import torch
from torch import Tensor

from lightning_feat.functional.grassmann import chordal_distance, geodesic_
from lightning_feat.manifolds import Grassmann

N, K = 9, 3
MANIFOLD = Grassmann()


def point(*batch: int, seed: int = 0, n: int = N, k: int = K) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.as_tensor(MANIFOLD.random(*batch, n, k, dtype=torch.float64, generator=generator)).detach()


def tangent(x: Tensor, length: float = 1.0, seed: int = 1) -> Tensor:
    """A random tangent vector at x whose largest singular value, the largest angle, is ``length``."""
    normal = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    u = MANIFOLD.proju(x, normal)
    return length * u / torch.linalg.matrix_norm(u, 2, keepdim=True)


def gap(x: Tensor, y: Tensor) -> Tensor:
    """Distance as subspaces, without any of the manifold's own angles."""
    return chordal_distance(x.mT, y.mT).max()


def close(a: Tensor, b: Tensor, atol: float = 1e-13) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)  # float64, numbers of about one


def test_projections_are_idempotent_and_land_on_the_manifold():
    x = point(4)
    far = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    on = MANIFOLD.projx(far)
    MANIFOLD.assert_check_point_on_manifold(on, atol=1e-14)
    assert on.is_contiguous()
    close(MANIFOLD.projx(on), on)
    assert gap(torch.linalg.qr(far).Q, on) < 1e-14  # the same subspace
    u = MANIFOLD.proju(x, far)
    MANIFOLD.assert_check_vector_on_tangent(x, u, atol=1e-14)
    close(MANIFOLD.proju(x, u), u)


def test_checks_refuse_what_is_not_on_the_manifold_and_say_why():
    x = point()
    with pytest.raises(ValueError, match=r"X\^T X != I"):
        MANIFOLD.assert_check_point_on_manifold(2 * x)
    with pytest.raises(ValueError, match=r"X\^T u != 0"):
        MANIFOLD.assert_check_vector_on_tangent(x, x)
    with pytest.raises(ValueError, match=r"shape\[-1\] <= shape\[-2\]"):
        MANIFOLD.random(2, 3)


def test_egrad2rgrad_gives_the_gradient_of_the_metric():
    x = point()
    a = torch.randn(N, N, generator=torch.Generator().manual_seed(0), dtype=x.dtype)

    def cost(x: Tensor) -> Tensor:
        return -(x.mT @ (a + a.T) @ x).trace()

    gradient = MANIFOLD.egrad2rgrad(x, torch.func.grad(cost)(x))
    u = tangent(x)
    _, slope = torch.func.jvp(
        lambda t: cost(MANIFOLD.expmap(x, t * u)), (torch.zeros(()).double(),), (torch.ones(()).double(),)
    )
    close(MANIFOLD.inner(x, gradient, u), slope, 1e-12)


@pytest.mark.parametrize("length", [1e-9, 0.5, 1.5, 20.0])
def test_expmap_is_the_svd_formula_and_the_step_of_functional(length):
    x = point(4)
    u = tangent(x, length)
    left, sigma, vt = torch.linalg.svd(u, full_matrices=False)
    expected = ((x @ vt.mT) * sigma.cos().unsqueeze(-2) + left * sigma.sin().unsqueeze(-2)) @ vt
    y = MANIFOLD.expmap(x, u)
    close(y, expected)
    MANIFOLD.assert_check_point_on_manifold(y, atol=1e-13)
    close(geodesic_((x + u).mT.contiguous(), x.mT.contiguous()).mT, y)


def test_expmap_is_a_geodesic_of_constant_speed():
    x = point(4)
    u = tangent(x, 1.5)
    for t in (0.25, 0.5, 1.0):
        close(MANIFOLD.dist(x, MANIFOLD.expmap(x, t * u)), t * MANIFOLD.norm(x, u))
    half, rest = MANIFOLD.expmap_transp(x, 0.5 * u, 0.5 * u)
    close(MANIFOLD.expmap(half, rest), MANIFOLD.expmap(x, u))


def test_expmap_has_a_gradient_at_zero_too():
    x = point(2, n=4, k=2)
    for u in (tangent(x, 0.4), tangent(x, 3.0), torch.zeros_like(x)):
        assert torch.autograd.gradcheck(MANIFOLD.expmap, (x, u.requires_grad_()))


def test_retraction_agrees_with_the_geodesic_to_second_order_in_subspace_and_basis():
    x = point(4)
    u = tangent(x)
    close(MANIFOLD.retr(x, 0 * u), x)
    subspace, basis = [], []
    for t in (1e-2, 5e-3):
        y = MANIFOLD.retr(x, t * u)
        MANIFOLD.assert_check_point_on_manifold(y, atol=1e-13)
        assert y.is_contiguous()
        subspace.append(gap(y, MANIFOLD.expmap(x, t * u)))
        basis.append((y - MANIFOLD.expmap(x, t * u)).norm())
    # Halving the step divides the error by 2^3 as subspaces (theory), by 2^2 as bases: the gauge of a QR is triangular.
    assert 7 < subspace[0] / subspace[1] < 9
    assert 3.5 < basis[0] / basis[1] < 4.5


@pytest.mark.parametrize("length", [1e-10, 1e-3, 0.7, 1.55])  # up to the injectivity radius pi / 2
def test_logmap_inverts_expmap_inside_the_injectivity_radius(length):
    x = point(4)
    u = tangent(x, length)
    y = MANIFOLD.expmap(x, u)
    # the cosine of 1.55 rad is 0.02, and the angles between columns are known to 1e-16 over that
    torch.testing.assert_close(MANIFOLD.logmap(x, y), u, rtol=1e-12, atol=1e-15)


def test_expmap_inverts_logmap_as_subspaces_and_its_length_is_the_distance():
    x, y = point(6), point(6, seed=5)
    u = MANIFOLD.logmap(x, y)
    MANIFOLD.assert_check_vector_on_tangent(x, u, atol=1e-13)
    assert gap(MANIFOLD.expmap(x, u), y) < 1e-13
    close(MANIFOLD.norm(x, u), MANIFOLD.dist(x, y))


def test_logmap_at_the_cut_locus_is_a_shortest_way():
    x, y = torch.eye(4, dtype=torch.float64)[:, :2], torch.eye(4, dtype=torch.float64)[:, 1:3]  # angles 0 and pi / 2
    u = MANIFOLD.logmap(x, y)
    close(MANIFOLD.norm(x, u), torch.tensor(math.pi / 2, dtype=torch.float64))
    assert gap(MANIFOLD.expmap(x, u), y) < 1e-15


@pytest.mark.parametrize("length", [1e-8, 0.6, 1.5])
def test_transport_along_the_shortest_geodesic_is_tangent_linear_and_keeps_inner_products(length):
    x = point(5)
    y = MANIFOLD.expmap(x, tangent(x, length)) @ point(5, seed=8, n=K)  # in another gauge
    v, w = tangent(x, seed=2), tangent(x, seed=3)
    moved_v, moved_w = MANIFOLD.transp(x, y, v), MANIFOLD.transp(x, y, w)
    MANIFOLD.assert_check_vector_on_tangent(y, moved_v, atol=1e-13)
    close(MANIFOLD.inner(y, moved_v, moved_w), MANIFOLD.inner(x, v, w))
    close(MANIFOLD.norm(y, moved_v), MANIFOLD.norm(x, v))
    close(MANIFOLD.transp(x, y, 2 * v - w), 2 * moved_v - moved_w)
    close(MANIFOLD.transp(y, x, moved_v), v)


def test_transport_carries_the_velocity_of_the_geodesic_to_its_end():
    x, y = point(5), point(5, seed=5)
    close(MANIFOLD.transp(x, y, MANIFOLD.logmap(x, y)), -MANIFOLD.logmap(y, x))


def test_tangent_part_is_taken_of_what_is_not_tangent():
    x, y = point(5), point(5, seed=5)
    u, v = tangent(x), tangent(x, seed=2)
    close(MANIFOLD.transp(x, y, v + 3 * x), MANIFOLD.transp(x, y, v))
    close(MANIFOLD.expmap(x, u + 3 * x), MANIFOLD.expmap(x, u))
    close(MANIFOLD.transp_follow_expmap(x, u + 3 * x, v - x), MANIFOLD.transp_follow_expmap(x, u, v))


def test_scaled_by_geoopt_distances_scale_and_maps_stay_inverse():
    scaled, x = geoopt.Scaled(MANIFOLD, scale=2.0), point(4)
    u = tangent(x, 0.9)
    y = scaled.expmap(x, u)
    close(scaled.dist(x, y), 2 * MANIFOLD.dist(x, y))
    close(scaled.logmap(x, y), u)


@pytest.mark.parametrize("length", [1e-8, 0.6, 1.5, 9.0])  # the last beyond the injectivity radius
def test_transport_along_expmap_solves_the_equation_of_parallel_fields(length):
    x = point(3)
    u, v = tangent(x, length), tangent(x, seed=2)
    y, moved = MANIFOLD.expmap_transp(x, u, v)
    MANIFOLD.assert_check_vector_on_tangent(y, moved, atol=1e-12)
    close(MANIFOLD.norm(y, moved), MANIFOLD.norm(x, v))
    if length < math.pi / 2:
        close(moved, MANIFOLD.transp(x, y, v))
    # A field is parallel if the change of it has no horizontal part. Central differences of step 1e-4: error 1e-8 times
    # the third derivative.
    after, before = (MANIFOLD.transp_follow_expmap(x, (0.5 + t) * u, v) for t in (1e-4, -1e-4))
    middle = MANIFOLD.expmap(x, 0.5 * u)
    assert MANIFOLD.proju(middle, (after - before) / 2e-4).abs().max() < 1e-8 * (1 + length**3)


def test_batching_equals_looping_and_broadcasts():
    x, y = point(2, 3), point(2, 3, seed=5)
    u, v = tangent(x, 0.7), tangent(x, seed=2)
    calls = {
        "projx": lambda x, y, u, v: MANIFOLD.projx(x + u),
        "proju": lambda x, y, u, v: MANIFOLD.proju(x, y),
        "inner": lambda x, y, u, v: MANIFOLD.inner(x, u, v),
        "norm": lambda x, y, u, v: MANIFOLD.norm(x, u),
        "retr": lambda x, y, u, v: MANIFOLD.retr(x, u),
        "expmap": lambda x, y, u, v: MANIFOLD.expmap(x, u),
        "logmap": lambda x, y, u, v: MANIFOLD.logmap(x, y),
        "transp": lambda x, y, u, v: MANIFOLD.transp(x, y, v),
        "follow": lambda x, y, u, v: MANIFOLD.transp_follow_expmap(x, u, v),
        "retr_transp": lambda x, y, u, v: MANIFOLD.retr_transp(x, u, v)[1],
        "dist": lambda x, y, u, v: MANIFOLD.dist(x, y),
    }
    for call in calls.values():
        looped = [[call(x[i, j], y[i, j], u[i, j], v[i, j]) for j in range(3)] for i in range(2)]
        close(call(x, y, u, v), torch.stack([torch.stack(row) for row in looped]))
    assert MANIFOLD.dist(x[0], y[1, :1], keepdim=True).shape == (3, 1, 1)
    assert MANIFOLD.dist(x[:, None, 0], y[None, :, 0]).shape == (2, 2)


def test_right_action_leaves_distances_and_turns_vectors():
    x, y = point(5), point(5, seed=5)
    u, v = tangent(x, 0.7), tangent(x, seed=2)
    o, p = point(5, seed=6, n=K), point(5, seed=7, n=K)  # orthogonal (k, k), of either sign of the determinant
    close(MANIFOLD.dist(x @ o, y @ p), MANIFOLD.dist(x, y))
    close(MANIFOLD.expmap(x @ o, u @ o), MANIFOLD.expmap(x, u) @ o)
    close(MANIFOLD.projx((x + u) @ o), MANIFOLD.projx(x + u) @ o)
    close(MANIFOLD.proju(x @ o, y @ o), MANIFOLD.proju(x, y) @ o)
    close(MANIFOLD.logmap(x @ o, y @ p), MANIFOLD.logmap(x, y) @ o)
    close(MANIFOLD.transp(x @ o, y @ p, v @ o), MANIFOLD.transp(x, y, v) @ p)
    close(MANIFOLD.transp_follow_expmap(x @ o, u @ o, v @ o), MANIFOLD.transp_follow_expmap(x, u, v) @ o)
    assert gap(MANIFOLD.retr(x @ o, u @ o), MANIFOLD.retr(x, u)) < 1e-13  # the basis of a QR depends on its order


def test_random_and_origin_are_points_of_any_batch():
    for x in (MANIFOLD.random(2, 3, N, K), MANIFOLD.random((N, K)), MANIFOLD.origin(2, N, K), MANIFOLD.origin(K, K)):
        MANIFOLD.assert_check_point_on_manifold(x)
        assert x.manifold is MANIFOLD
        assert x.is_contiguous()


@pytest.mark.parametrize("move", ["retr", "expmap"])
def test_of_a_vector_that_is_not_tangent_the_tangent_part_is_taken(move):
    x = point(3)
    u = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    close(getattr(MANIFOLD, move)(x, u), getattr(MANIFOLD, move)(x, MANIFOLD.proju(x, u)))


@pytest.mark.parametrize("exact", [False, True], ids=["retr", "exact"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: geoopt.optim.RiemannianSGD(p, lr=0.02, momentum=0.9),
        lambda p: geoopt.optim.RiemannianSGD(p, lr=0.1, stabilize=10),
        lambda p: geoopt.optim.RiemannianAdam(p, lr=0.05),
    ],
    ids=["sgd_momentum", "sgd", "adam"],
)
def test_geoopt_optimizers_find_the_leading_subspaces(optimizer, exact, monkeypatch):
    if exact:  # geoopt's own way to an exact manifold, as in EuclideanStiefelExact
        monkeypatch.setattr(Grassmann, "retr", Grassmann.expmap)
        monkeypatch.setattr(Grassmann, "retr_transp", Grassmann.expmap_transp)
    frame = torch.linalg.qr(torch.randn(2, N, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    spectrum = torch.tensor([3.0, 2.5, 2.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.1], dtype=torch.float64)
    covariance = (frame * spectrum) @ frame.mT
    basis = geoopt.ManifoldParameter(point(2), manifold=Grassmann())
    steps = optimizer([basis])
    for _ in range(300):
        steps.zero_grad()
        (-(basis.mT @ covariance @ basis).diagonal(dim1=-2, dim2=-1).sum()).backward()
        steps.step()
    assert gap(basis.detach(), frame[..., :K]) < 1e-4  # from about 1.5
    MANIFOLD.assert_check_point_on_manifold(basis.detach(), atol=1e-12)


def test_state_survives_deepcopy_and_pickle():
    import copy
    import pickle

    basis = geoopt.ManifoldParameter(point(2), manifold=Grassmann())
    for other in (copy.deepcopy(basis), pickle.loads(pickle.dumps(basis))):
        assert isinstance(other.manifold, Grassmann)
        assert torch.equal(other, basis)


def test_the_gradient_of_the_logarithm_is_right_where_angles_coincide_or_are_zero():
    manifold = Grassmann()
    x = manifold.origin(8, 3, dtype=torch.float64).detach()
    same = torch.zeros(8, 3, dtype=torch.float64)
    same[3:6] = 0.4 * torch.eye(3, dtype=torch.float64)
    weight = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def there_and_back(u):
        return manifold.logmap(x, manifold.expmap(x, manifold.proju(x, u))) * weight

    for u in (same, 0 * same, same + 1e-3 * weight):
        torch.testing.assert_close(there_and_back(u), manifold.proju(x, u) * weight, rtol=0, atol=1e-14)
        assert torch.autograd.gradcheck(there_and_back, u.clone().requires_grad_())
