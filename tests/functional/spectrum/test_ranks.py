import math

import pytest
import torch

from lightning_feat.functional.spectrum import (
    covariance_spectrum,
    effective_rank,
    lidar,
    moment_sums,
    rankme,
    spectral_decay,
)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width, seed=1):
    return torch.linalg.qr(drawn(width, width, seed=seed))[0]


def test_the_effective_rank_of_a_known_spectrum():
    # Of a geometric series with ratio r the entropy is known: -log(1 - r) - r log(r) / (1 - r).
    r = 0.5
    series = torch.tensor([r**k for k in range(200)], dtype=torch.float64)
    assert float(effective_rank(series)) == pytest.approx(math.exp(-math.log(1 - r) - r * math.log(r) / (1 - r)), 1e-12)
    assert float(effective_rank(torch.ones(7))) == pytest.approx(7, rel=1e-12)
    assert float(effective_rank(torch.tensor([4.0, 0.0, 0.0]))) == 1


def test_the_effective_rank_keeps_dimensions_before_the_last():
    many = drawn(3, 2, 5).abs()
    assert torch.allclose(effective_rank(many)[2, 1], effective_rank(many[2, 1]))
    assert effective_rank(many).shape == (3, 2)


def test_epsilon_counts_directions_without_features():
    spectrum = torch.tensor([1.0, 0.0], dtype=torch.float64)
    e = 1e-5
    expected = math.exp(-((1 + e) * math.log(1 + e) + e * math.log(e)))
    assert float(effective_rank(spectrum, e)) == pytest.approx(expected, rel=1e-12)


def test_the_gradient_at_zero_is_a_number():
    spectrum = torch.tensor([2.0, 1.0, 0.0], requires_grad=True)
    effective_rank(spectrum).backward()
    assert spectrum.grad.isfinite().all()
    assert (spectrum.grad[:2] != 0).all()


def test_what_has_no_rank_is_nan():
    assert effective_rank(torch.zeros(3)).isnan()
    assert effective_rank(torch.tensor([1.0, torch.nan])).isnan()
    assert rankme(torch.zeros(0, 3)).isnan()
    assert rankme(torch.zeros(4, 3)).isnan()
    assert rankme(torch.tensor([[1.0, torch.inf]])).isnan()
    with pytest.raises(ValueError, match="no value below zero, got -1"):
        effective_rank(torch.tensor([1.0, -1.0]))


def test_rankme_is_its_definition_and_does_not_see_a_rotation_or_a_scale():
    h = drawn(40, 6) + 1.0
    singular = torch.linalg.eigvalsh(h.T @ h).clamp(min=0).sqrt()
    share = singular / singular.sum()
    assert float(rankme(h)) == pytest.approx(float((-(share * share.log()).sum()).exp()), rel=1e-10)
    assert float(rankme(7.0 * h @ rotation(6))) == pytest.approx(float(rankme(h)), rel=1e-12)
    sums = effective_rank(covariance_spectrum(moment_sums(h), centered=False).sqrt())
    assert float(sums) == pytest.approx(float(rankme(h)), rel=1e-10)


def test_rankme_from_sums_with_fewer_samples_than_features():
    h = drawn(5, 30)
    sums = effective_rank(covariance_spectrum(moment_sums(h), centered=False).sqrt())
    assert float(sums) == pytest.approx(float(rankme(h)), rel=1e-10)


def slow_lidar(h, groups, delta):
    classes = groups.unique()
    means = torch.stack([h[groups == g].mean(0) for g in classes])
    m = means.mean(0)
    between = sum(torch.outer(row - m, row - m) for row in means) / (len(classes) - 1)
    within = torch.zeros_like(between)
    for g, mean in zip(classes, means, strict=True):
        for row in h[groups == g]:
            within += torch.outer(row - mean, row - mean)
    within = within / (len(h) - len(classes)) + delta * torch.eye(h.shape[1], dtype=h.dtype)
    value, vector = torch.linalg.eigh(within)
    root = vector / value.sqrt() @ vector.T
    found = torch.linalg.eigvalsh(root @ between @ root).clamp(min=0)
    share = found[found > 1e-12 * found.max()] / found.sum()
    return float((-(share * share.log()).sum()).exp())


def test_lidar_is_the_slow_definition():
    groups = torch.arange(8).repeat_interleave(5)[torch.randperm(40, generator=torch.Generator().manual_seed(3))]
    h = drawn(8, 6)[groups] + 0.3 * drawn(40, 6, seed=2)
    assert float(lidar(h, groups)) == pytest.approx(slow_lidar(h, groups, 1e-4), rel=1e-8)
    assert float(lidar(h, groups, delta=0.1)) == pytest.approx(slow_lidar(h, groups, 0.1), rel=1e-8)
    assert float(lidar(h @ rotation(6), groups)) == pytest.approx(float(lidar(h, groups)), rel=1e-9)
    assert float(lidar(h, 3 * groups + 2)) == pytest.approx(float(lidar(h, groups)), rel=1e-12)  # names of the groups


def test_lidar_of_groups_in_orthogonal_directions():
    # Three groups at the corners of a simplex, alike within: the two directions count the same.
    corners = torch.eye(3, dtype=torch.float64) - 1 / 3
    h = corners.repeat(4, 1)
    assert float(lidar(h, torch.arange(3).repeat(4))) == pytest.approx(2, rel=1e-9)


def test_lidar_needs_two_groups_and_a_pair():
    h = drawn(4, 3)
    assert lidar(h, torch.zeros(4, dtype=torch.long)).isnan()  # one group
    assert lidar(h, torch.arange(4)).isnan()  # no two of one group
    with pytest.raises(ValueError, match="delta=0 must be above zero"):
        lidar(h, torch.tensor([0, 0, 1, 1]), delta=0)
    with pytest.raises(ValueError, match="a target is -1"):
        lidar(h, torch.tensor([0, 0, 1, -1]))


def test_the_decay_of_a_power_law_is_its_exponent():
    law = 3.0 * torch.arange(1, 200, dtype=torch.float64) ** -1.25
    for first, last in ((1, None), (11, 100)):
        alpha, share = spectral_decay(law, first, last)
        assert float(alpha) == pytest.approx(1.25, abs=1e-11)
        assert float(share) == pytest.approx(1, abs=1e-11)


def test_the_decay_is_the_weighted_least_squares():
    spectrum = drawn(50).abs().sort(descending=True).values
    x = torch.arange(3, 31, dtype=torch.float64)
    design = torch.stack([x.log(), torch.ones_like(x)], 1) * x.rsqrt()[:, None]
    solution = torch.linalg.lstsq(design, spectrum[2:30].log()[:, None] * x.rsqrt()[:, None]).solution
    alpha, share = spectral_decay(spectrum, 3, 30)
    assert float(alpha) == pytest.approx(-float(solution[0]), rel=1e-10)
    assert 0 < float(share) < 1


def test_zeros_at_the_end_of_a_spectrum_are_left_out():
    law = torch.arange(1, 20, dtype=torch.float64) ** -2.0
    alpha, _ = spectral_decay(torch.cat([law, torch.zeros(5)]))
    assert float(alpha) == pytest.approx(2, abs=1e-12)
    assert spectral_decay(torch.tensor([1.0, 0.5, 0.0])).exponent.isnan()  # two values are always on a line
    flat = spectral_decay(torch.ones(5))
    assert float(flat.exponent) == 0
    assert flat.r_squared.isnan()
    assert spectral_decay(torch.tensor([torch.nan] * 4)).exponent.isnan()


def test_a_range_or_an_order_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="first=0 and last=3"):
        spectral_decay(torch.ones(3), first=0)
    with pytest.raises(ValueError, match="the largest first"):
        spectral_decay(torch.tensor([1.0, 2.0, 3.0]))
