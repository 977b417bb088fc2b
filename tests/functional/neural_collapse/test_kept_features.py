"""Free features near given ones: against the minimum over both, closed forms of special cases, and the theorem."""

import pytest
import torch
from torch.nn.functional import one_hot

from lightning_feat.functional.common.class_sums import class_means, class_sums
from lightning_feat.functional.neural_collapse import kept_features_optimum, mse_orthogonal_frame, nc1_quotient
from tests.functional.neural_collapse.test_geometry import minimize

DECAYS = (0.02, 1e-3, 5e-3)


def draw(counts=(6, 5, 4), width=5, spread=0.4, seed=0):
    """Class means with a spread about them."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    means = torch.randn(len(counts), width, generator=generator, dtype=torch.float64)
    return means[targets] + spread * torch.randn(len(targets), width, generator=generator, dtype=torch.float64), targets


def objective(weight, features, given, targets, weight_decay, feature_decay, keep):
    error = (features @ weight.T - targets).square().sum() / (2 * len(features))
    decays = weight_decay * weight.square().sum() + feature_decay * features.square().sum()
    return error + (decays + keep * (features - given).square().sum()) / 2


@pytest.mark.parametrize("outputs", [False, True])
def test_it_is_the_minimum_over_features_and_head(outputs):
    given, targets = draw()
    wanted = one_hot(targets).double()
    if outputs:
        wanted = wanted @ torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = kept_features_optimum(given, wanted if outputs else targets, *DECAYS)
    assert found.gradient < 1e-10
    features, weight = given.clone().requires_grad_(), found.weight.clone().mul_(0.5).requires_grad_()
    minimize(lambda: objective(weight, features, given, wanted, *DECAYS), [features, weight])
    # 1e-6: where the line search over both ends, as the objective is flat to rounding
    torch.testing.assert_close(found.features, features.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.weight, weight.detach(), rtol=0, atol=1e-6)
    by_hand = objective(found.weight, found.features, given, wanted, *DECAYS)
    torch.testing.assert_close(found.objective, by_hand, rtol=1e-14, atol=0)


def test_of_collapsed_orthogonal_features_each_class_is_a_problem_of_two_numbers():
    counts, lengths, (weight_decay, feature_decay, keep) = [6, 3], [2.0, 0.7], DECAYS
    targets = torch.arange(2).repeat_interleave(torch.tensor(counts))
    directions = torch.linalg.qr(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double())[0].T
    found = kept_features_optimum((directions * torch.tensor(lengths)[:, None])[targets], targets, *DECAYS)
    for c, (n, length) in enumerate(zip(counts, lengths, strict=True)):
        w, h = (torch.tensor(1.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
        share = n / sum(counts)

        def two(w=w, h=h, n=n, length=length, share=share):
            slack = share * (w * h - 1) ** 2 + weight_decay * w**2
            return (slack + n * feature_decay * h**2 + n * keep * (h - length) ** 2) / 2

        minimize(two, [w, h])
        torch.testing.assert_close(found.weight[c], w.detach() * directions[c], rtol=0, atol=1e-8)
        mine = found.features[targets == c]
        torch.testing.assert_close(mine, (h.detach() * directions[c]).expand_as(mine), rtol=0, atol=1e-8)


def test_hardly_kept_they_are_the_orthogonal_frame_and_firmly_kept_the_given_ones():
    given, targets = draw(counts=(6, 6, 6))
    frame = mse_orthogonal_frame(torch.tensor([6, 6, 6]), 0.02, 1e-3)
    loose = kept_features_optimum(given, targets, 0.02, 1e-3, 1e-9)
    gram = class_means(class_sums(loose.features, targets, 3))
    # 1e-4: what a keep_weight of 1e-9 still pulls, over the curvature of 1e-3
    torch.testing.assert_close(gram @ gram.T, torch.diag(frame.means), rtol=0, atol=1e-4)
    firm = kept_features_optimum(given, targets, 0.02, 1e-3, 1e9)
    torch.testing.assert_close(firm.features, given, rtol=0, atol=1e-8)
    ridge = torch.linalg.solve(given.T @ given + 18 * 0.02 * torch.eye(5), given.T @ one_hot(targets).double()).T
    torch.testing.assert_close(firm.weight, ridge, rtol=0, atol=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_classes_vary_less_than_in_the_given_features_and_the_less_the_looser(seed):
    given, targets = draw(seed=seed)

    def spread(features):
        return float(nc1_quotient(class_sums(features, targets, 3)))

    spreads = [spread(kept_features_optimum(given, targets, 0.02, 1e-3, keep).features) for keep in (1e-4, 1e-2, 1.0)]
    assert spreads[0] < spreads[1] < spreads[2] < spread(given)


def test_what_does_not_fit_is_refused():
    given, targets = draw()
    for decays in ((0.0, 0.1, 0.1), (0.1, -0.1, 0.1), (0.1, 0.0, 0.0)):
        with pytest.raises(ValueError, match="must be above zero"):
            kept_features_optimum(given, targets, *decays)
    with pytest.raises(ValueError, match="must be finite"):
        kept_features_optimum(given * torch.nan, targets, *DECAYS)
    with pytest.raises(ValueError, match="targets"):
        kept_features_optimum(given, targets[1:], *DECAYS)
