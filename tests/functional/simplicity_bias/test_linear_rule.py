import pytest
import torch

from lightning_feat.functional.simplicity_bias import linear_discriminant


def drawn(n=400, classes=3, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    mixing = torch.randn(size, size, generator=generator).double()
    means = 2 * torch.randn(classes, size, generator=generator).double()
    return means[y] + torch.randn(n, size, generator=generator).double() @ mixing, y


def scores(rule, x):
    return x @ rule.weight.T + rule.bias


@pytest.mark.parametrize("shrinkage", [0.0, 0.2])
def test_it_is_that_of_scikit_learn(shrinkage):
    discriminant_analysis = pytest.importorskip("sklearn.discriminant_analysis")
    x, y = drawn()
    found = scores(linear_discriminant(x, y, 3, shrinkage), x).log_softmax(1)
    # theirs shrinks each class by itself, which with one covariance of all is the same only without shrinkage
    means = torch.stack([x[y == c].mean(0) for c in range(3)])
    within = torch.cov((x - means[y]).T, correction=0)
    shrunk = (1 - shrinkage) * within + shrinkage * within.trace() / 4 * torch.eye(4)
    inverse = torch.linalg.inv(shrunk)
    share = y.bincount() / len(y)
    expected = x @ inverse @ means.T - ((means @ inverse) * means).sum(1) / 2 + share.double().log()
    torch.testing.assert_close(found, expected.log_softmax(1))
    if shrinkage == 0:
        theirs = discriminant_analysis.LinearDiscriminantAnalysis(solver="lsqr").fit(x.numpy(), y.numpy())
        torch.testing.assert_close(found.exp(), torch.from_numpy(theirs.predict_proba(x.numpy())), atol=1e-6, rtol=0)


def test_the_size_of_a_feature_in_the_input_does_not_matter():
    x, y = drawn()
    factor = torch.tensor([1.0, 1e3, 1e-3, 7.0]).double()
    one, other = (scores(linear_discriminant(data, y, 3, 0.0), data) for data in (x, x * factor))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_far_from_the_origin_it_is_the_same():
    x, y = drawn()
    one, other = (scores(linear_discriminant(data, y, 3), data) for data in (x, x + 1e6))
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)  # the offset costs six digits of sixteen


def test_fewer_samples_than_numbers_by_shrinkage():
    x, y = drawn(n=30, classes=2, size=200)
    rule = linear_discriminant(x, y, 2, 0.1)
    means = torch.stack([x[y == c].mean(0) for c in range(2)])
    within = torch.cov((x - means[y]).T, correction=0)
    shrunk = 0.9 * within + 0.1 * within.trace() / 200 * torch.eye(200)
    expected = torch.linalg.solve(shrunk, means[1] - means[0])
    torch.testing.assert_close(rule.weight[1] - rule.weight[0], expected)


def test_without_spread_the_nearest_mean_counts():
    x, y = torch.tensor([[0.0, 0.0], [0.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 0, 1])
    chosen = scores(linear_discriminant(x, y, 2), torch.tensor([[1.9, 3.0], [2.2, 3.0]]).double())
    assert chosen.argmax(1).tolist() == [0, 1]


def test_a_class_without_samples_is_never_chosen():
    x, y = drawn(classes=2)
    rule = linear_discriminant(x, y, 4)
    assert rule.bias[2:].tolist() == [-torch.inf, -torch.inf]
    assert scores(rule, x).argmax(1).max() == 1


def test_what_is_not_finite_gives_nan():
    x, y = drawn(n=20)
    x[0, 0] = torch.inf
    assert linear_discriminant(x, y, 3).weight.isnan().any()


def test_what_does_not_fit_is_refused():
    x, y = drawn(n=20)
    with pytest.raises(ValueError, match="shrinkage=2"):
        linear_discriminant(x, y, 3, 2.0)
    with pytest.raises(ValueError, match="a target is 2"):
        linear_discriminant(x, y, 2)
