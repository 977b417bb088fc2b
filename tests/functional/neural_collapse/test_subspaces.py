"""Grassmann classifiers, foreign features: NC2 and NC3 by projectors, NC5 and the NECO score."""

import itertools
import math

import pytest
import torch

from lightning_feat.functional import neural_collapse as nc


def random_basis(num_classes=5, subspace_dim=2, width=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(num_classes, width, subspace_dim, generator=generator, dtype=torch.float64))[
        0
    ].mT


def chordal_distances(basis):
    projector = basis.mT @ basis
    return torch.stack([(p - q).norm() / math.sqrt(2) for p, q in itertools.combinations(projector, 2)])


@pytest.mark.parametrize("num_classes", [5, 70])  # 70 is more than one block
def test_spread_of_subspaces_is_that_of_their_projectors(num_classes):
    basis = random_basis(num_classes)
    distance = chordal_distances(basis)
    torch.testing.assert_close(nc.nc2_subspace_chordal_cv(basis), distance.std(correction=0) / distance.mean())
    largest = 2 * (7 - 2) / 7 * num_classes / (num_classes - 1)
    torch.testing.assert_close(nc.nc2_subspace_spread(basis), distance.square().mean() / min(2, largest))


def test_lines_of_a_simplex_with_as_many_classes_as_fit_reach_the_bound():
    lines = torch.tensor([[math.cos(a), math.sin(a)] for a in (0, math.pi / 3, 2 * math.pi / 3)])[:, None]
    assert float(nc.nc2_subspace_spread(lines)) == pytest.approx(1)  # three lines of a plane, 60 degrees apart
    assert float(nc.nc2_subspace_chordal_cv(lines)) == pytest.approx(0, abs=1e-6)  # float32 input


def test_orthogonal_subspaces_are_spread_as_far_as_can_be():
    basis = torch.eye(8).reshape(4, 2, 8)
    assert nc.nc2_subspace_spread(basis) == 1
    assert nc.nc2_subspace_spread(basis[:3]) == 1  # with room to spare, where the simplex bound is out of reach
    assert nc.nc2_subspace_chordal_cv(basis) == 0


def test_angle_between_a_mean_and_its_subspace():
    basis = torch.eye(3).double()[None, :2].repeat(3, 1, 1)
    means = torch.tensor([[2.0, 0, 2], [1, 1, 0], [torch.nan, 0, 0]])  # 45 degrees, inside, no samples
    assert float(nc.nc3_subspace_angle(basis, means)) == pytest.approx(22.5)
    tiny = torch.tensor([[1.0, 0, 1e-10]]).double()
    assert float(nc.nc3_subspace_angle(basis[:1], tiny)) == pytest.approx(math.degrees(1e-10))


def test_the_choice_of_basis_is_free():
    basis, means = random_basis(), torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).double()
    turn = torch.linalg.qr(torch.randn(5, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    turned = turn @ basis
    torch.testing.assert_close(nc.nc2_subspace_chordal_cv(turned), nc.nc2_subspace_chordal_cv(basis))
    torch.testing.assert_close(nc.nc2_subspace_spread(turned), nc.nc2_subspace_spread(basis))
    torch.testing.assert_close(nc.nc3_subspace_angle(turned, means), nc.nc3_subspace_angle(basis, means))


def test_one_subspace_or_one_that_is_everything_has_no_spread():
    assert nc.nc2_subspace_spread(random_basis(num_classes=1)).isnan()
    assert nc.nc2_subspace_chordal_cv(random_basis(num_classes=1)).isnan()
    assert nc.nc2_subspace_spread(random_basis(subspace_dim=7)).isnan()


def test_a_grassmann_basis_joins_the_measures_without_the_classes_that_have_no_samples():
    basis, features = random_basis(), torch.randn(40, 7, generator=torch.Generator().manual_seed(0)).double()
    targets = torch.tensor([0, 2, 3, 4]).repeat(10)
    sums = nc.class_sums(features, targets, 5)
    values = nc.collapse_measures(sums, basis=basis)
    seen = torch.tensor([0, 2, 3, 4])
    torch.testing.assert_close(values["nc2_subspace_spread"], nc.nc2_subspace_spread(basis[seen]))
    torch.testing.assert_close(values["nc3_subspace_angle"], nc.nc3_subspace_angle(basis, nc.class_means(sums)))


def test_orthogonality_to_foreign_features():
    sums = nc.class_sums(torch.tensor([[1.0, 0, 0], [1, 1, 0]]), torch.tensor([0, 2]), 3)
    assert nc.nc5_orthogonality(sums, torch.tensor([0.0, 0, 5])) == 0
    assert float(nc.nc5_orthogonality(sums, torch.tensor([-3.0, 0, 0]))) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_neco_score_is_the_share_in_the_principal_components_of_standardised_features():
    mix = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ mix + 3
    sums = nc.class_sums(features, torch.arange(60) % 3, 3)
    subspace = nc.neco_subspace(sums, nc.second_moment(features), subspace_dim=2)
    standard = (features - features.mean(0)) / features.std(0, correction=0)
    top = torch.linalg.svd(standard)[2][:2]
    others = torch.randn(7, 5).double()
    z = (others - features.mean(0)) / features.std(0, correction=0)
    expected = (z @ top.T).norm(dim=1) / z.norm(dim=1)
    torch.testing.assert_close(nc.neco_scores(others, subspace), expected)
    logits = torch.randn(7, 3).double()
    torch.testing.assert_close(nc.neco_scores(others, subspace, logits), expected * logits.max(1).values)


def test_a_feature_that_never_varies_does_not_break_the_standardisation():
    features = torch.cat([torch.randn(20, 2), torch.full((20, 1), 7.0)], dim=1)
    sums = nc.class_sums(features, torch.arange(20) % 2, 2)
    subspace = nc.neco_subspace(sums, nc.second_moment(features), 2)
    assert subspace.scale[2] == 1
    assert nc.neco_scores(features, subspace).isfinite().all()
    with pytest.raises(ValueError, match="subspace_dim=4"):
        nc.neco_subspace(sums, nc.second_moment(features), 4)
