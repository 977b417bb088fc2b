import pytest
import torch

from lightning_feat.functional.neural_collapse import regression as nrc


def targets(size=15, outputs=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(outputs, outputs, generator=generator, dtype=torch.float64)
    return torch.randn(size, outputs, generator=generator, dtype=torch.float64) @ mix + torch.arange(outputs)


def trained(y, weight_decay, feature_decay, width=5):
    """Head, bias and features that minimise the regularised squared error, by L-BFGS from a random start."""
    generator = torch.Generator().manual_seed(1)
    size, outputs = y.shape
    weight = torch.randn(outputs, width, generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.zeros(outputs, dtype=torch.float64, requires_grad=True)
    features = torch.randn(size, width, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias, features],
        max_iter=600,
        history_size=50,
        tolerance_grad=1e-13,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        error = (features @ weight.T + bias - y).square().sum() / (2 * size)
        loss = error + feature_decay / (2 * size) * features.square().sum() + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach(), features.detach()


@pytest.mark.parametrize("feature_decay", [0.05, 0.5])  # at 0.5 the weakest direction of the targets is given up
def test_the_optimum_is_what_free_features_reach_and_all_measures_vanish_there(feature_decay):
    y, weight_decay = targets(), 0.2 if feature_decay < 0.1 else 0.6
    optimum = nrc.regression_optimum(y, weight_decay, feature_decay)
    weight, bias, features = trained(y, weight_decay, feature_decay)
    # 1e-6: what L-BFGS leaves
    torch.testing.assert_close(weight @ weight.T, optimum.weight_gram, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bias, optimum.bias, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(features @ weight.T + bias, optimum.predictions, rtol=1e-6, atol=1e-6)
    assert nrc.nrc2(features, weight) < 1e-10
    kept = int(torch.linalg.matrix_rank(optimum.weight_gram, rtol=1e-9))
    assert nrc.nrc1(features, kept) < 1e-10
    if feature_decay > 0.1:
        assert kept == 2
        return
    assert kept == 3
    covariance = nrc.target_covariance(y)
    gamma = nrc.nrc3_best_gamma(weight, covariance)
    torch.testing.assert_close(gamma, torch.tensor(weight_decay * feature_decay).double(), rtol=1e-3, atol=0)
    assert nrc.nrc3(weight, covariance, gamma) < 1e-10


def test_residuals_of_the_optimum_are_white():
    y = targets()
    residual = nrc.regression_optimum(y, 0.05, 0.01).predictions - y
    expected = 0.05 * 0.01 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(nrc.target_covariance(residual), expected, rtol=1e-9, atol=1e-13)


def test_best_gamma_is_the_best_of_a_fine_grid():
    for seed in range(5):
        covariance = nrc.target_covariance(targets(seed=seed))
        weight = targets(3, 5, seed=seed + 10)[:, :5]
        best = nrc.nrc3(weight, covariance, nrc.nrc3_best_gamma(weight, covariance))
        grid = torch.linspace(0, 1, 2001, dtype=torch.float64).square() * torch.linalg.eigvalsh(covariance)[0]
        on_grid = torch.stack([nrc.nrc3(weight, covariance, gamma) for gamma in grid]).min()
        assert best <= on_grid + 1e-9


def test_gamma_from_traces_matches_the_trace():
    covariance = nrc.target_covariance(targets())
    weight = 0.3 * torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    value, vector = torch.linalg.eigh(covariance)
    root = (vector * value.sqrt()) @ vector.T
    target = root - nrc.nrc3_gamma_from_traces(weight, covariance).sqrt() * torch.eye(3)
    torch.testing.assert_close(target.trace(), weight.double().square().sum())
    assert nrc.nrc3_gamma_from_traces(100 * weight, covariance) == 0


def test_shares_outside_a_subspace_are_projections_one_by_one():
    features, weight = targets(20, 6), targets(2, 6, seed=3)
    centered = features - features.mean(0)
    for centre, data in ((True, centered), (False, features)):
        top = torch.linalg.svd(data)[2][:2]
        share = [1 - (top @ h).square().sum() / h.square().sum() for h in features]
        torch.testing.assert_close(nrc.nrc1(features, 2, centered=centre), torch.stack(share).mean())
    rows = torch.linalg.qr(weight.T)[0].T
    share = [1 - (rows @ h).square().sum() / h.square().sum() for h in features]
    torch.testing.assert_close(nrc.nrc2(features, weight), torch.stack(share).mean())


def test_a_head_of_less_than_full_rank_and_zero_features():
    weight = torch.tensor([[1.0, 0, 0], [2.0, 0, 0]])
    features = torch.tensor([[1.0, 1, 0], [0, 0, 0]])
    assert float(nrc.nrc2(features, weight)) == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_components_that_are_rounding_count_as_none(dtype):
    """Three samples span two components when centred; a third one would be any direction."""
    features = targets(3, 6).to(dtype)
    assert torch.equal(nrc.nrc1(features, 3), nrc.nrc1(features, 2))
    bottleneck = targets(30, 2) @ targets(2, 6, seed=1)[:, :6]  # of width two
    expected = nrc.nrc1(bottleneck, 2)
    torch.testing.assert_close(nrc.nrc1(bottleneck.to(dtype), 4), expected, rtol=1e-5, atol=1e-6)
    assert nrc.nrc1(features[:1], 3).isnan()


def test_undefined_is_nan():
    assert nrc.nrc3(torch.ones(1, 4), torch.ones(1, 1), 0.0).isnan()
    assert nrc.nrc1(torch.full((3, 2), torch.nan), 1).isnan()
    assert nrc.nrc2(torch.ones(3, 2), torch.full((1, 2), torch.inf)).isnan()
    assert nrc.two_neighbor_dimension(torch.ones(2, 2)).isnan()


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_intrinsic_dimension_of_a_flat_cloud_in_a_wider_space(dimension):
    generator = torch.Generator().manual_seed(0)
    cloud = torch.rand(1500, dimension, generator=generator) @ torch.randn(dimension, 20, generator=generator)
    # The standard error is dimension / sqrt(1500), 2.6 %; the border of the cube takes some off in four dimensions.
    assert float(nrc.two_neighbor_dimension(cloud)) == pytest.approx(dimension, rel=0.12)


def test_explained_variance_ratio():
    features = targets(40, 6)
    value = torch.linalg.eigvalsh(torch.cov(features.T)).flip(0)
    torch.testing.assert_close(nrc.explained_variance_ratio(features, 4), (value / value.sum())[:4])


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="num_targets=9"):
        nrc.nrc1(torch.ones(3, 2), 9)
    with pytest.raises(ValueError, match="must both be above zero"):
        nrc.regression_optimum(targets(), 0.0, 0.1)
