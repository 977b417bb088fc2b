import pytest
import torch

from lightning_feat.functional.simplicity_bias import gaussian_clones, ledoit_wolf_shrinkage


def correlated(n, seed=0):
    """Two classes of other means and other covariances, not normal."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    mixing = torch.randn(2, 3, 3, generator=generator)
    uniform = torch.rand(n, 3, generator=generator) - 0.5
    x = torch.einsum("nij,nj->ni", mixing[y], uniform) + 4 * y[:, None]
    return x.double(), y


def moments(x, y, label):
    return x[y == label].mean(0), torch.cov(x[y == label].T, correction=0)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_clones_have_the_moments_stated(shrinkage):
    n = 6000  # of each class 3000: moments of as many draws
    x, y = correlated(n)
    clones = gaussian_clones(x, y, 2, shrinkage, seed=1)
    for label in (0, 1):
        mean, covariance = moments(x, y, label)
        expected = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / 3 * torch.eye(3)
        found = moments(clones, y, label)
        scale = float(covariance.trace())
        torch.testing.assert_close(found[0], mean, atol=5 * (scale / 3000) ** 0.5, rtol=0)
        torch.testing.assert_close(found[1], expected, atol=5 * scale * (2 / 3000) ** 0.5, rtol=0)


def test_clones_are_normal_whatever_the_data():
    x, y = correlated(6000)
    clones = gaussian_clones(x, y, 2, 0.0, seed=2)[y == 0]
    standard = (clones - clones.mean(0)) / clones.std(0)
    assert standard.pow(4).mean(0).sub(3).abs().max() < 5 * (24 / 3000) ** 0.5  # the kurtosis of 3000 draws


def test_of_fewer_samples_than_numbers_the_clones_lie_in_their_span():
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).double()
    y = torch.zeros(4, dtype=torch.long)
    clones = gaussian_clones(x, y, 1, 0.0)
    basis = torch.linalg.qr((x - x.mean(0)).T)[0][:, :3]
    beyond = (clones - x.mean(0)) - (clones - x.mean(0)) @ basis @ basis.T
    assert beyond.abs().max() < 1e-12


def test_a_class_of_one_sample_is_its_mean_and_a_class_of_none_is_left_out():
    x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 2])
    assert torch.equal(gaussian_clones(x, y, 4), x)


def test_a_seed_draws_the_same_and_leaves_the_global_generator_alone():
    x, y = correlated(40)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, two, other = (gaussian_clones(x, y, 2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_half_precision_is_brought_to_float32():
    x, y = correlated(40)
    assert gaussian_clones(x.half(), y, 2).dtype == torch.float32


def test_one_bad_sample_spoils_its_class_alone():
    x, y = correlated(40)
    x[0, 0] = torch.nan
    clones = gaussian_clones(x, y, 2)
    assert clones[y == 0].isnan().any(1).all()
    assert clones[y == 1].isfinite().all()


@pytest.mark.parametrize("shape", [(40, 5), (8, 30)])
def test_shrinkage_is_that_of_scikit_learn(shape):
    covariance = pytest.importorskip("sklearn.covariance")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double() * torch.linspace(0.2, 3, shape[1])
    x = x - x.mean(0)
    expected = covariance.ledoit_wolf_shrinkage(x.numpy(), assume_centered=True)
    assert float(ledoit_wolf_shrinkage(x)) == pytest.approx(expected, rel=1e-9)


def test_shrinkage_at_the_ends():
    assert ledoit_wolf_shrinkage(torch.eye(3)) == 1  # the covariance is a multiple of the identity
    assert ledoit_wolf_shrinkage(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == 0  # two samples that differ in sign alone
    assert ledoit_wolf_shrinkage(torch.zeros(0, 3)) == 0
    assert ledoit_wolf_shrinkage(torch.zeros(4, 3)) == 1
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).double()
    assert ledoit_wolf_shrinkage(1e100 * x) == pytest.approx(float(ledoit_wolf_shrinkage(x)), rel=1e-9)


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1])
def test_what_does_not_fit_is_refused(shrinkage):
    x, y = correlated(4)
    with pytest.raises(ValueError, match=f"shrinkage={shrinkage}"):
        gaussian_clones(x, y, 2, shrinkage)
    with pytest.raises(ValueError, match="a target is 1"):
        gaussian_clones(x, y, 1)
    with pytest.raises(ValueError, match="features must be"):
        gaussian_clones(x[:, :, None], y, 2)
