import pytest
import torch

from lightning_feat.functional.neural_collapse.simplex import (
    directions,
    prototype_cosines,
    simplex_prototypes,
    sparse_simplex_prototypes,
)


def gram_of_a_simplex(num_classes, dtype=torch.float64):
    gram = torch.full((num_classes, num_classes), -1 / (num_classes - 1), dtype=dtype)
    return gram.fill_diagonal_(1.0)


@pytest.mark.parametrize(("num_classes", "num_features"), [(2, 1), (2, 7), (5, 4), (5, 5), (10, 64), (100, 99)])
def test_every_pair_of_prototypes_has_the_same_widest_angle(num_classes, num_features):
    e = simplex_prototypes(num_classes, num_features)
    torch.testing.assert_close(e @ e.T, gram_of_a_simplex(num_classes), rtol=0, atol=1e-13)
    torch.testing.assert_close(e.sum(0), torch.zeros(num_features).double(), rtol=0, atol=1e-13)


def test_it_is_the_form_of_the_paper_in_some_position():
    e = simplex_prototypes(4, 9)
    p = torch.linalg.qr(torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    theirs = ((4 / 3) ** 0.5 * p @ (torch.eye(4).double() - 1 / 4)).T
    u, _, vh = torch.linalg.svd(theirs.T @ e)  # the rotation that carries one nearest to the other
    torch.testing.assert_close(theirs @ (u @ vh), e, rtol=0, atol=1e-12)


def test_the_seed_draws_the_position_and_the_global_random_numbers_stay():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = simplex_prototypes(4, 6, seed=1)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first, simplex_prototypes(4, 6, seed=1))
    assert (first - simplex_prototypes(4, 6, seed=2)).abs().max() > 0.1


def test_the_position_is_uniform():
    directions_ = torch.stack([simplex_prototypes(3, 2, seed)[0] for seed in range(400)])
    # 400 unit vectors of the plane: the mean of each coordinate has a deviation of 1 / sqrt(800) = 0.035
    assert directions_.mean(0).abs().max() < 0.12
    torch.testing.assert_close(directions_.T @ directions_ / 400, torch.eye(2).double() / 2, rtol=0, atol=0.1)


@pytest.mark.parametrize(("sizes", "sparsity"), [((5, 4), 0.2), ((10, 64), 0.6), ((20, 80), 0.5), ((4, 6), 0.0)])
def test_a_sparse_simplex_is_a_simplex_and_has_the_zeros(sizes, sparsity):
    e = sparse_simplex_prototypes(*sizes, sparsity)
    torch.testing.assert_close(e @ e.T, gram_of_a_simplex(sizes[0]), rtol=0, atol=3e-7)  # the search stops at 1e-7
    assert (e == 0).sum() == round(sparsity * e.numel())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: simplex_prototypes(1, 4), "num_classes=1: a simplex has at least two corners"),
        (
            lambda: simplex_prototypes(6, 4),
            "4 features have no room for a simplex of 6 classes, which needs at least 5",
        ),
        (lambda: sparse_simplex_prototypes(5, 8, 1.0), r"sparsity=1.0 is the share of zeros"),
        (lambda: sparse_simplex_prototypes(5, 8, 0.9), r"with sparsity=0.9: lower it \(the bound is near 0.55\)"),
        (lambda: prototype_cosines(torch.ones(2, 3), torch.ones(4, 2)), r"got \(2, 3\) and \(4, 2\)"),
    ],
)
def test_what_cannot_be_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_cosines_are_those_of_each_pair():
    generator = torch.Generator().manual_seed(0)
    features, e = torch.randn(6, 9, generator=generator, dtype=torch.float64), simplex_prototypes(4, 9)
    expected = [[float(h @ w) / float(h.square().sum()) ** 0.5 for w in e] for h in features]
    torch.testing.assert_close(
        prototype_cosines(features, e), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def test_a_feature_of_zero_has_no_direction_and_no_gradient():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    directions(features)[:, 0].sum().backward()
    assert torch.equal(directions(features)[0], torch.zeros(2))
    assert torch.equal(features.grad[0], torch.zeros(2))
    torch.testing.assert_close(features.grad[1], torch.tensor([16 / 125, -12 / 125]))


def test_lengths_that_half_precision_cannot_hold():
    features = torch.full((1, 4), 6e4, dtype=torch.float16)
    torch.testing.assert_close(directions(features), torch.full((1, 4), 0.5))
