"""What the figures of neural collapse show, against the slow definitions."""

import pytest
import torch
from torch.nn.functional import one_hot

from lightning_feat.functional import neural_collapse as nc

C, D = 4, 6


def batch(spread=1.0, n=40):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(n) % C
    means = torch.randn(C, D, generator=generator, dtype=torch.float64)
    return means[targets] + spread * torch.randn(n, D, generator=generator, dtype=torch.float64), targets


def slow_scatter(features, members):
    """By one sample and one class after the other; ``members`` is ``(N, C)``."""
    means = (members.T @ features) / members.sum(0)[:, None]
    total = torch.zeros(D, D, dtype=torch.float64)
    for h, member in zip(features, members, strict=True):
        for c in range(C):
            total += member[c] * torch.outer(h - means[c], h - means[c])
    return total


@pytest.mark.parametrize("soft", [False, True])
def test_scatter_is_its_definition_sample_by_sample(soft):
    features, targets = batch()
    members = one_hot(targets, C).double()
    if soft:
        members = 0.7 * members + 0.3 * members.roll(1, 0)
    given = members if soft else targets
    centers = nc.class_centers(nc.class_sums(features, given, C))
    torch.testing.assert_close(nc.within_class_scatter(features, given, centers), slow_scatter(features, members))


@pytest.mark.parametrize("soft", [False, True])
def test_sample_of_no_weight_is_not_there(soft):
    features, targets = batch()
    given = one_hot(targets, C).double() if soft else targets
    centers = nc.class_centers(nc.class_sums(features, given, C))
    weights = (torch.arange(len(features)) % 3 != 0).double()
    kept = weights > 0
    expected = nc.within_class_scatter(features[kept], given[kept], centers)
    torch.testing.assert_close(nc.within_class_scatter(features, given, centers, weights), expected)


def test_spectrum_is_right_where_the_second_moment_has_only_rounding():
    features, targets = batch(spread=1e-9)
    totals = nc.class_sums(features, targets, C)
    means = nc.class_means(totals)
    expected = torch.linalg.svdvals(features - means[targets]).square() / len(features)
    scatter = nc.within_class_scatter(features, targets, nc.class_centers(totals)) / len(features)
    # the residuals themselves are differences of numbers near one: 1e-16 of 1e-9
    torch.testing.assert_close(nc.covariance_spectrum(scatter), expected, rtol=1e-5, atol=0)
    cancelled = nc.within_class_spectrum(totals, nc.second_moment(features))
    assert not torch.allclose(cancelled, expected, rtol=0.5, atol=0)


def test_picture_shows_the_classes_with_samples_by_their_own_numbers():
    features, targets = batch()
    keep = targets != 1
    totals = nc.class_sums(features[keep], targets[keep], C)
    picture = nc.collapse_picture(totals)
    assert picture.classes.tolist() == [0, 2, 3]
    assert picture.num_classes == 3
    assert picture.simplex_cosine == -0.5
    assert len(picture.between) == 2  # K - 1
    assert picture.within is None
    means = torch.stack([features[targets == c].mean(0) for c in (0, 2, 3)])
    centred = torch.nn.functional.normalize(means - means.mean(0))
    torch.testing.assert_close(picture.cosines, centred @ centred.T)


def test_of_many_classes_some_are_shown_and_all_are_counted():
    totals = nc.class_sums(torch.eye(50), torch.arange(50), 50)
    picture = nc.collapse_picture(totals, most_classes=8)
    assert picture.classes.tolist() == [0, 7, 14, 21, 28, 35, 42, 49]
    assert len(picture.between) == 49
    off_diagonal = picture.cosines[~torch.eye(8, dtype=torch.bool)]
    # centred by the mean of all 50 and not of the eight shown
    torch.testing.assert_close(off_diagonal, torch.full_like(off_diagonal, -1 / 49))


def test_too_few_features_hold_no_simplex():
    features, targets = batch()
    assert nc.collapse_picture(nc.class_sums(features[:, :2], targets, C)).simplex_cosine is None


def test_known_measures_are_those_of_everything_together():
    features, targets = batch()
    totals = nc.class_sums(features, targets, C)
    weight, basis = torch.randn(C, D), torch.eye(D)[:C, None]
    residuals = nc.center_sums(features, targets, features @ weight.double().T, nc.class_centers(totals))
    moment = nc.second_moment(features)
    values = nc.collapse_measures(
        totals, moment=moment, residuals=residuals, weight=weight, bias=torch.zeros(C), basis=basis
    )
    assert sorted(nc.known_measures()) == sorted(values)
