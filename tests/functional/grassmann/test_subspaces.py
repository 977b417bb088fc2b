"""Logits, angles and bases of subspaces, against definitions computed slowly and the golden values."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_feat.functional.grassmann import (
    chordal_distance,
    geodesic_distance,
    orthonormality_error,
    pairwise_principal_angles,
    polar_projection,
    principal_angles,
    random_basis,
    subspace_logits,
    tangent_projection,
)

DATA = Path(__file__).parents[2] / "data"


def bases(classes: int, k: int, width: int, seed: int = 0) -> Tensor:
    return random_basis(classes, k, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(*size: int, seed: int = 9) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(angles: list[float], width: int = 20) -> tuple[Tensor, Tensor]:
    """Two bases (1, k, width) with these principal angles, in unrelated gauges."""
    k = len(angles)
    frame = bases(1, 2 * k, width)
    angle = torch.tensor(angles, dtype=torch.float64)[:, None]
    end = frame[:, :k] * angle.cos() + frame[:, k:] * angle.sin()
    return bases(1, k, k, seed=1) @ frame[:, :k], bases(1, k, k, seed=2) @ end


@pytest.mark.parametrize("name", ["grassmann_rsgd", "grassmann_rsgd_lines"])
def test_logits_loss_and_gradients_are_the_golden_ones(name):
    golden = np.load(DATA / f"{name}.npz")
    features = torch.tensor(golden["features"], requires_grad=True)
    basis = torch.tensor(golden["initial_basis"], requires_grad=True)
    logits = subspace_logits(features, basis, float(golden["gamma"]))
    loss = cross_entropy(logits, torch.tensor(golden["labels"]))
    loss.backward()
    for value, key in (
        (logits, "logits_initial"),
        (loss, "loss"),
        (features.grad, "grad_features"),
        (basis.grad, "grad_basis"),
    ):
        # float64 on both sides; logits go up to 25
        torch.testing.assert_close(value.detach(), torch.tensor(golden[key]), rtol=0, atol=1e-13)


def test_logit_is_scale_times_cosine_of_the_angle_between_feature_and_subspace():
    features, basis = normal(6, 10), bases(3, 4, 10)
    lines = torch.nn.functional.normalize(features)[:, None, None]  # (N, 1, 1, D)
    cosine = principal_angles(lines, basis[None])[..., 0].cos()
    torch.testing.assert_close(subspace_logits(features, basis, 7.0), 7.0 * cosine, rtol=0, atol=1e-14)


def test_logits_depend_on_the_subspace_alone():
    features, basis = normal(6, 10), bases(3, 4, 10)
    gauge = bases(3, 4, 4, seed=4)
    torch.testing.assert_close(subspace_logits(features, gauge @ basis), subspace_logits(features, basis))


def test_without_normalisation_logits_grow_with_the_feature():
    features, basis = normal(6, 10), bases(3, 4, 10)
    plain = subspace_logits(features, basis, normalize=False)
    torch.testing.assert_close(plain, subspace_logits(features, basis) * features.norm(dim=1, keepdim=True))


def test_gradient_is_that_of_finite_differences_scale_included():
    features, basis = normal(3, 6).requires_grad_(), bases(2, 2, 6).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(subspace_logits, (features, basis, scale))


@pytest.mark.parametrize("feature", [[0.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 1e-30]])
def test_gradient_is_zero_where_the_projection_is_and_never_nan(feature):
    features = torch.tensor([feature], requires_grad=True)
    basis = torch.eye(3)[None, :2].clone().requires_grad_()
    logits = subspace_logits(features, basis)
    logits.sum().backward()
    assert logits.item() == 0
    assert torch.equal(features.grad, torch.zeros(1, 3))
    assert torch.equal(basis.grad, torch.zeros(1, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_give_float32_logits(dtype):
    features = 1e4 * normal(4, 64).to(dtype)  # a squared length in float16 would overflow
    basis = bases(3, 2, 64).float()
    logits = subspace_logits(features, basis)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, subspace_logits(features.float(), basis))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = subspace_logits(features, basis)
    assert under_autocast.dtype == torch.float32
    # bfloat16 keeps 8 bits: 4e-3 of logits up to 25
    torch.testing.assert_close(under_autocast, logits, rtol=0, atol=0.1)


def test_logits_compile_without_a_break_and_export():
    features, basis = normal(4, 6).float().requires_grad_(), bases(3, 2, 6).float().requires_grad_()
    expected = subspace_logits(features, basis)
    torch._dynamo.reset()
    compiled = torch.compile(subspace_logits, fullgraph=True, backend="aot_eager")(features, basis)
    torch.testing.assert_close(compiled, expected)
    for ours, theirs in zip(
        torch.autograd.grad(compiled.sum(), (features, basis)),
        torch.autograd.grad(expected.sum(), (features, basis)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)

    class Head(torch.nn.Module):
        def forward(self, features: Tensor, basis: Tensor) -> Tensor:
            return subspace_logits(features, basis)

    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(Head(), (features, basis), dynamic_shapes=(batch, None))
    torch.testing.assert_close(program.module()(features[:3], basis), expected[:3])


@pytest.mark.parametrize(("features", "basis"), [((2, 3, 4), (5, 2, 4)), ((2, 4), (5, 4)), ((2, 4), (5, 4, 2))])
def test_logits_refuse_wrong_shapes(features, basis):
    with pytest.raises(ValueError, match=r"features \(N, D\) and basis \(C, k, D\)"):
        subspace_logits(torch.zeros(features), torch.zeros(basis))


@pytest.mark.parametrize(
    "angles", [[0.1, 0.5, 1.2], [0.3, 0.3, 0.3], [1e-12, 1e-9, 1e-6], [0.0, 0.7, math.pi / 2], [1.5, 1.57, 1.5707]]
)
def test_principal_angles_are_those_built_in_tiny_and_right_ones_too(angles):
    # float64 rounding; arccos of a cosine would be off by 1e-8 at 1e-9
    expected = torch.tensor([angles], dtype=torch.float64)
    torch.testing.assert_close(principal_angles(*turned(angles)), expected, rtol=0, atol=5e-15)


def test_tiny_angles_keep_their_digits():
    angles = [1e-10, 1e-8, 1e-6]
    expected = torch.tensor([angles], dtype=torch.float64)
    torch.testing.assert_close(principal_angles(*turned(angles)), expected, rtol=1e-5, atol=0)  # 1e-15 of 1e-10


def test_principal_angles_of_unequal_dimensions_broadcast_and_do_not_depend_on_order():
    plane, space = bases(2, 2, 9), bases(3, 4, 9, seed=1)
    angles = principal_angles(plane[:, None], space[None])
    assert angles.shape == (2, 3, 2)
    assert (angles.diff(dim=-1) >= 0).all()
    torch.testing.assert_close(principal_angles(space[None], plane[:, None]), angles)
    cosines = torch.linalg.svdvals(plane[1] @ space[2].mT)
    torch.testing.assert_close(angles[1, 2], cosines.arccos())


def test_distances_are_the_norms_of_angles_and_sines():
    a, b = turned([0.2, 0.4, 1.5])
    angles = torch.tensor([0.2, 0.4, 1.5], dtype=torch.float64)
    torch.testing.assert_close(geodesic_distance(a, b), angles.norm()[None])
    torch.testing.assert_close(chordal_distance(a, b), angles.sin().norm()[None])
    projector_distance = torch.linalg.matrix_norm(a.mT @ a - b.mT @ b) / math.sqrt(2)
    torch.testing.assert_close(chordal_distance(a, b), projector_distance)


@pytest.mark.parametrize("distance", [geodesic_distance, chordal_distance])
def test_distances_have_a_gradient_and_a_finite_one_at_zero(distance):
    a, b = turned([0.2, 0.4, 1.1], width=8)
    assert torch.autograd.gradcheck(distance, (a.requires_grad_(), b))
    a = a.detach().requires_grad_()
    distance(a, a.detach()).sum().backward()
    assert a.grad.isfinite().all()


def test_bases_of_different_widths_are_refused():
    with pytest.raises(ValueError, match=r"b must be \(\.\.\., l, D\) with D = 3, got \(2, 4\)"):
        principal_angles(torch.zeros(2, 3), torch.zeros(2, 4))


def test_orthonormality_error_is_the_largest_entry_per_class():
    basis = bases(3, 2, 5)
    basis[1, 0] *= 2  # squared length 4
    error = orthonormality_error(basis)
    torch.testing.assert_close(error, torch.tensor([0.0, 3.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-14)
    rounded = orthonormality_error(basis.bfloat16())
    assert rounded.dtype == torch.float32
    assert 0 < rounded[0] < 2e-2  # 8 bits


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_polar_projection_is_u_vt_of_the_svd(condition):
    k = 3
    left, right = bases(2, k, k), bases(2, k, 12, seed=1)
    stretched = left @ torch.diag(torch.tensor([1.0, 0.3, 1 / condition], dtype=torch.float64)) @ right
    polar = polar_projection(stretched)
    assert orthonormality_error(polar).max() < 1e-14
    assert polar.is_contiguous()
    # A Gram matrix squares the condition: 1e-16 * condition^2 is what float64 leaves of the direction, span excepted.
    torch.testing.assert_close(polar, left @ right, rtol=0, atol=max(1e-14, 1e-15 * condition**2))
    assert geodesic_distance(polar, right).max() < 1e-14 * condition


def test_polar_projection_leaves_an_orthonormal_basis_where_it_is():
    basis = bases(4, 3, 10)
    torch.testing.assert_close(polar_projection(basis), basis, rtol=0, atol=1e-15)
    assert orthonormality_error(polar_projection(basis.float())).max() < 5e-7
    assert polar_projection(basis.float()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_polar_projection_refuses_dependent_rows_and_says_which_class(dtype):
    basis = bases(4, 3, 10).to(dtype)
    basis[2, 1] = basis[2, 0] - 3 * basis[2, 2]
    with pytest.raises(ValueError, match=r"1 of 4 subspaces are linearly dependent \(first: 2\)"):
        polar_projection(basis)
    with pytest.raises(ValueError, match="4 of 4"):
        polar_projection(torch.zeros(4, 3, 10, dtype=dtype))
    basis[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or inf"):
        polar_projection(basis)


def test_random_basis_is_orthonormal_contiguous_and_reproducible():
    def draw() -> Tensor:
        return random_basis(5, 4, 16, generator=torch.Generator().manual_seed(3))

    assert draw().shape == (5, 4, 16)
    assert draw().is_contiguous()
    assert orthonormality_error(draw()).max() < 1e-6  # float32
    assert torch.equal(draw(), draw())


def test_random_basis_is_haar_in_subspace_and_in_gauge():
    basis = random_basis(20_000, 2, 3, generator=torch.Generator().manual_seed(0))
    # Each row is uniform on the sphere of R^3: by Archimedes each coordinate is uniform on [-1, 1]. A bare QR would
    # give the first row of one sign. The largest gap to a uniform distribution is 1.63 / sqrt(20000) = 0.0115 with
    # probability 0.99 (Kolmogorov); six coordinates, hence a little more.
    uniform = torch.linspace(-1, 1, 20_000)
    for coordinate in basis.flatten(1).T:
        assert (coordinate.sort().values - uniform).abs().max() < 2 * 0.0135


@pytest.mark.parametrize("subspace_dim", [0, 5])
def test_random_basis_refuses_impossible_dimensions(subspace_dim):
    with pytest.raises(ValueError, match=f"1 <= subspace_dim <= 4 features, got {subspace_dim}"):
        random_basis(2, subspace_dim, 4)
    with pytest.raises(ValueError, match=r"got torch\.bfloat16"):
        random_basis(2, 2, 4, dtype=torch.bfloat16)


def test_tangent_projection_is_the_orthogonal_projection_and_idempotent():
    basis, vector = bases(3, 2, 7), normal(3, 2, 7)
    tangent = tangent_projection(basis, vector)
    outside = torch.eye(7, dtype=torch.float64) - basis.mT @ basis
    torch.testing.assert_close(tangent, vector @ outside)
    torch.testing.assert_close(tangent_projection(basis, tangent), tangent)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-8, 1e-7, 1e-5, 1e-2, 0.1, 0.3])
def test_all_pairs_have_the_angles_of_single_pairs_however_small(angle):
    first, second = turned([angle, 0.3])
    basis = torch.cat([first, second, bases(3, 2, 20, seed=4)])
    i, j = torch.triu_indices(5, 5, 1)
    found = pairwise_principal_angles(basis)
    torch.testing.assert_close(found, principal_angles(basis[i], basis[j]), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(float(found[0, 0]), angle, rtol=1e-3, atol=1e-15)
