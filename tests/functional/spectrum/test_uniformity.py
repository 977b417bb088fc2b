import math

import pytest
import torch

from lightning_feat.functional.spectrum import (
    alignment,
    gaussian_uniformity,
    hyperspherical_energy,
    koleo,
    moment_sums,
    tolerance,
    uniformity,
    wasserstein_uniformity,
    wasserstein_uniformity_of_sums,
)
from lightning_feat.functional.transfer import direction_sums

LOSSES = {
    "wasserstein": wasserstein_uniformity,
    "gaussian": gaussian_uniformity,
    "koleo": koleo,
    "energy": hyperspherical_energy,
    "alignment": lambda h: alignment(h, h.flip(0), power=1.5),
}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(h):
    return h / h.norm(dim=1, keepdim=True)


def pairs(size):
    return [(i, j) for i in range(size) for j in range(size) if i != j]


def test_the_wasserstein_uniformity_is_the_trace_formula():
    z = unit(drawn(30, 4) + 0.5)
    mean = z.mean(0)
    covariance = (z - mean).T @ (z - mean) / len(z)
    root = torch.linalg.eigvalsh(covariance).sqrt().sum()
    expected = (mean.square().sum() + 1 + covariance.trace() - 2 / math.sqrt(4) * root).sqrt()
    assert float(wasserstein_uniformity(3.0 * z)) == pytest.approx(float(expected), rel=1e-10)
    assert float(wasserstein_uniformity_of_sums(moment_sums(z))) == pytest.approx(float(expected), rel=1e-10)


def test_the_wasserstein_uniformity_of_known_features():
    assert float(wasserstein_uniformity(torch.ones(5, 3))) == pytest.approx(math.sqrt(2), rel=1e-6)  # one point
    # Two of four directions used evenly: (1/2) (sqrt(2) - 1)^2 + 2 / 4 over both halves.
    eye = torch.eye(4, dtype=torch.float64)[:2]
    value = wasserstein_uniformity(torch.cat([eye, -eye]))
    assert float(value) == pytest.approx(math.sqrt(2 * (math.sqrt(1 / 2) - 1 / 2) ** 2 + 2 / 4), rel=1e-12)


def test_the_wasserstein_uniformity_sees_copies_of_features_and_the_gaussian_one_does_not():
    """Doubling each feature empties half of the directions; distances on the sphere stay as they are."""
    h = drawn(200, 8)
    twice = torch.cat([h, h], dim=1)
    assert float(gaussian_uniformity(twice)) == pytest.approx(float(gaussian_uniformity(h)), rel=1e-10)
    assert float(wasserstein_uniformity(twice)) > float(wasserstein_uniformity(h)) + 0.2


def test_fewer_samples_than_features():
    z = unit(drawn(3, 10))
    sums = float(wasserstein_uniformity_of_sums(moment_sums(z)))
    assert float(wasserstein_uniformity(z)) == pytest.approx(sums, rel=1e-9)


def test_the_others_are_their_slow_definitions():
    h = drawn(12, 3)
    z = unit(h)
    far = {(i, j): (z[i] - z[j]).norm() for i, j in pairs(12)}
    potential = sum(torch.exp(-2 * d.square()) for d in far.values()) / len(far)
    assert float(gaussian_uniformity(h)) == pytest.approx(float(potential.log()), rel=1e-10)
    narrow = sum(torch.exp(-0.7 * d.square()) for d in far.values()) / len(far)
    assert float(gaussian_uniformity(h, t=0.7)) == pytest.approx(float(narrow.log()), rel=1e-10)
    nearest = [min(far[i, j] for j in range(12) if j != i) for i in range(12)]
    assert float(koleo(h)) == pytest.approx(-sum(math.log(d) for d in nearest) / 12, rel=1e-10)
    energy = sum(1 / d.square() for d in far.values()) / len(far)
    assert float(hyperspherical_energy(h, power=2)) == pytest.approx(float(energy), rel=1e-9)
    other = drawn(12, 3, seed=4)
    apart = (z - unit(other)).norm(dim=1)
    assert float(alignment(h, 5 * other, power=3)) == pytest.approx(float((apart**3).mean()), rel=1e-10)
    assert float(alignment(h, other)) == pytest.approx(float(apart.square().mean()), rel=1e-10)


def test_the_tolerance_is_the_mean_cosine_within_classes():
    h, t = drawn(12, 3), torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3, 3])
    z = unit(h)
    cosines = [float(z[i] @ z[j]) for i, j in pairs(12) if t[i] == t[j]]
    assert float(tolerance(direction_sums(h, t, 5))) == pytest.approx(sum(cosines) / len(cosines), rel=1e-10)
    assert tolerance(direction_sums(h, torch.arange(12), 12)).isnan()


@pytest.mark.parametrize("name", LOSSES)
def test_blocks_are_the_whole(name, monkeypatch):
    h = drawn(23, 4)
    whole = LOSSES[name](h)
    monkeypatch.setattr(uniformity, "_BLOCK", 50)
    assert float(LOSSES[name](h)) == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_differences(name):
    h = drawn(7, 4).requires_grad_()
    assert torch.autograd.gradcheck(LOSSES[name], h, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("features", [torch.ones(4, 3), torch.zeros(4, 3), torch.full((4, 3), 1e-30)])
def test_one_point_has_a_gradient_that_is_a_number(name, features):
    h = features.clone().requires_grad_()
    LOSSES[name](h).backward()
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "alignment"])
def test_rotations_and_lengths_do_not_matter(name):
    h = drawn(20, 5)
    turned = (h * drawn(20, 1, seed=5).abs()) @ torch.linalg.qr(drawn(5, 5, seed=6))[0]
    assert float(LOSSES[name](turned)) == pytest.approx(float(LOSSES[name](h)), rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_features_of_any_length_have_their_directions(name):
    h = drawn(9, 4).float()
    assert float(LOSSES[name](1e30 * h)) == pytest.approx(float(LOSSES[name](h)), rel=1e-4)


def test_too_few_samples_are_nan():
    one = torch.ones(1, 3)
    for name in ("gaussian", "koleo", "energy"):
        assert LOSSES[name](one).isnan()
    assert wasserstein_uniformity(torch.zeros(0, 3)).isnan()
    assert wasserstein_uniformity_of_sums(moment_sums(torch.zeros(0, 3))).isnan()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="mean squared length here is 4"):
        wasserstein_uniformity_of_sums(moment_sums(2 * torch.eye(3)))
    with pytest.raises(ValueError, match="t=0 must be above zero"):
        gaussian_uniformity(torch.eye(3), t=0)
    with pytest.raises(ValueError, match="power=0 must be above zero"):
        hyperspherical_energy(torch.eye(3), power=0)
    with pytest.raises(ValueError, match=r"power=0.5 must be at least one"):
        alignment(torch.eye(3), torch.eye(3), power=0.5)
