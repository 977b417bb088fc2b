"""Closed forms against the optimum found by minimising the loss they belong to."""

import math

import pytest
import torch

from lightning_feat.functional.neural_collapse import geometry as geometry
from lightning_feat.functional.neural_collapse.means import cosine_matrix, gram_error, simplex_gram

COUNTS = torch.tensor([40, 20, 10, 4])


def exact(*values):
    return torch.tensor(values, dtype=torch.float64)


def minimize(loss, parameters, steps=3000):
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


@pytest.mark.parametrize(("num_layers", "decays"), [(1, (0.05, 0.04)), (2, (0.15, 1e-3)), (3, (0.05, 1e-3))])
def test_mse_frame_is_the_minimum_over_free_features(num_layers, decays):
    generator = torch.Generator().manual_seed(0)
    weight_decay, feature_decay = decays
    counts = torch.tensor([12, 8, 5, 1])
    size, width = int(counts.sum()), 5
    targets = torch.eye(4, dtype=torch.float64)[torch.arange(4).repeat_interleave(counts)].T
    sizes = [(4, width), *[(width, width)] * (num_layers - 1)]
    # For several layers zero is a local minimum too: start well away from it.
    layers = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in sizes]
    features = (3 * torch.randn(width, size, generator=generator, dtype=torch.float64)).requires_grad_()

    def product():
        return torch.linalg.multi_dot(layers) if num_layers > 1 else layers[0]

    def loss():
        error = (product() @ features - targets).square().sum() / (2 * size)
        decay = sum(layer.square().sum() for layer in layers) * weight_decay / 2
        return error + decay + feature_decay / 2 * features.square().sum()

    minimize(loss, [*layers, features])
    frame = geometry.mse_orthogonal_frame(counts, weight_decay, feature_decay, num_layers)
    weight = product().detach()
    means = torch.stack([part.mean(1) for part in features.detach().split(counts.tolist(), dim=1)])
    assert (frame.weights > 0).tolist() == [True, True, True, False]  # the class of one sample is given up
    # 1e-6: what L-BFGS leaves where the class of one sample vanishes
    torch.testing.assert_close(weight @ weight.T, torch.diag(frame.weights), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(means @ means.T, torch.diag(frame.means), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weight @ means.T, torch.diag(frame.logits), rtol=1e-6, atol=1e-6)


def test_one_layer_has_the_known_closed_form():
    frame = geometry.mse_orthogonal_frame(COUNTS, 2e-3, 2e-4)
    expected = (COUNTS.double() * 2e-4 / 2e-3).sqrt() - 74 * 2e-4
    torch.testing.assert_close(frame.weights, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_a_class_is_given_up_just_below_the_threshold(num_layers):
    # by bisection, the weight decay whose threshold is exactly the 10 samples of the second class
    low, high = 1e-6, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        below = geometry.mse_collapse_count(100, middle, 2e-3, num_layers) < 10
        low, high = (middle, high) if below else (low, middle)
    counts = torch.tensor([90, 10])
    assert geometry.mse_orthogonal_frame(counts, low * 0.999, 2e-3, num_layers).weights[1] > 0
    assert geometry.mse_orthogonal_frame(counts, low * 1.001, 2e-3, num_layers).weights[1] == 0


def test_ce_frame_has_the_known_margins_and_lengths():
    frame = geometry.ce_nonnegative_frame(COUNTS, 2e-3, 2e-4)
    torch.testing.assert_close(frame.margins, exact(6.1423, 5.7931, 5.4427, 4.9770), rtol=0, atol=5e-5)
    torch.testing.assert_close(frame.means, exact(2.6597, 3.5475, 4.7135, 6.8150), rtol=0, atol=5e-5)


@pytest.mark.parametrize("counts", [COUNTS, torch.tensor([60, 30, 20, 1])])  # in the second, one class collapses
def test_ce_frame_is_stationary_and_pushes_no_zero_above_zero(counts):
    weight_decay, feature_decay = (2e-3, 2e-4) if counts[-1] > 1 else (5e-2, 5e-3)
    frame = geometry.ce_nonnegative_frame(counts, weight_decay, feature_decay)
    size = counts.sum()
    features = torch.diag(frame.means.sqrt()).requires_grad_()  # row k is the feature of class k, along axis k
    factor = torch.where(frame.means > 0, (counts.double() * 4 * feature_decay / (3 * weight_decay)).sqrt(), 0.0)
    weight = (simplex_gram(4) * factor @ features.detach()).requires_grad_()
    torch.testing.assert_close((weight @ weight.T).detach(), frame.weight_gram)
    logits = features @ weight.T
    torch.testing.assert_close((logits.diag() - logits[:, 1:].amax(1)).detach()[:1], frame.margins[:1])
    loss = (counts.double() / size * torch.nn.functional.cross_entropy(logits, torch.arange(4), reduction="none")).sum()
    loss = loss + weight_decay / 2 * weight.square().sum()
    loss = loss + feature_decay / 2 * (counts * features.square().sum(1)).sum()
    loss.backward()
    torch.testing.assert_close(weight.grad, torch.zeros_like(weight), rtol=0, atol=1e-14)
    assert features.grad[features > 0].abs().max() < 1e-14
    assert features.grad.min() > -1e-14  # at zero the loss may only rise
    assert (frame.means[-1] == 0) == bool(counts[-1] == 1)


def test_ce_collapse_threshold():
    threshold = geometry.ce_nonnegative_collapse_count(100, 2, 0.01, 0.02)
    assert threshold == pytest.approx(4)
    assert geometry.ce_nonnegative_frame(torch.tensor([96, 4]), 0.00999, 0.02).means[1] > 0
    assert geometry.ce_nonnegative_frame(torch.tensor([96, 4]), 0.01001, 0.02).means[1] == 0


@pytest.mark.parametrize(
    ("ratio", "weights", "means", "cosines"),
    [
        (1, 1.0, 1.0, (-1 / 3, -1 / 3, -1 / 3, -1 / 3)),
        (10, 2.00, 0.436, (-0.459, 0.079, -0.195, -0.649)),
        (100, 2.98, 0.159, (-0.476, 0.561, -0.174, -0.869)),
    ],
)
def test_seli_lengths_and_angles_of_two_large_and_two_small_classes(ratio, weights, means, cosines):
    weight_gram, mean_gram = geometry.seli_grams(torch.tensor([ratio, ratio, 1, 1]))
    found = []
    for gram in (weight_gram, mean_gram):
        length = gram.diagonal().sqrt()
        cosine = gram / torch.outer(length, length)
        found += [float(cosine[0, 1]), float(cosine[2, 3])]
    assert float(weight_gram[0, 0] / weight_gram[2, 2]) == pytest.approx(weights, abs=5e-3)
    assert float(mean_gram[0, 0] / mean_gram[2, 2]) == pytest.approx(means, abs=5e-4)
    assert found == pytest.approx(cosines, abs=6e-4)  # known to three digits


def test_seli_factors_the_centered_targets():
    counts = torch.tensor([7, 3, 2])
    weight_gram, mean_gram = geometry.seli_grams(counts)
    targets = torch.eye(3, dtype=torch.float64)[torch.arange(3).repeat_interleave(counts)].T
    left, value, right = torch.linalg.svd(simplex_gram(3) @ targets, full_matrices=False)
    torch.testing.assert_close(weight_gram, left[:, :2] * value[:2] @ left[:, :2].T)
    first = torch.tensor([0, 7, 10])  # one sample of each class
    torch.testing.assert_close(mean_gram, right[:2, first].T * value[:2] @ right[:2, first])


@pytest.mark.parametrize("counts", [COUNTS, torch.tensor([40, 40, 3, 3])])  # in the second, the small classes merge
def test_ce_frame_over_all_signs_is_the_minimum_over_free_features(counts):
    weight_decay, feature_decay = (2e-3, 2e-4) if counts[-1] > 3 else (0.02, 0.025)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64).requires_grad_()
    features = torch.randn(4, 6, generator=generator, dtype=torch.float64).requires_grad_()  # samples of a class agree
    size = counts.sum()

    def loss():
        errors = torch.nn.functional.cross_entropy(features @ weight.T, torch.arange(4), reduction="none")
        decay = weight_decay * weight.square().sum() + feature_decay * (counts * features.square().sum(1)).sum()
        return (counts * errors).sum() / size + decay / 2

    minimize(loss, [weight, features])
    frame = geometry.ce_frame(counts, weight_decay, feature_decay)
    for found, expected in (
        (weight @ weight.T, frame.weights),
        (features @ features.T, frame.means),
        (features @ weight.T, frame.logits),
    ):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-6)  # what L-BFGS leaves
    assert bool(geometry.minority_cosine(frame.weights, torch.arange(4) > 1) > 1 - 1e-9) == bool(counts[-1] == 3)


def test_ce_frame_of_equal_classes_is_a_simplex_of_known_margin():
    frame = geometry.ce_frame(torch.tensor([10, 10, 10]), 5e-3, 5e-4)
    margin = math.log(3 * math.sqrt(10) / (30 * math.sqrt(5e-3 * 5e-4)) - 2)  # by hand, from the one slope there is
    torch.testing.assert_close(frame.logits, margin * simplex_gram(3))
    torch.testing.assert_close(frame.weights, margin * math.sqrt(10 * 0.1) * simplex_gram(3))


def test_ce_frame_tends_to_seli_as_the_decay_vanishes():
    counts = torch.tensor([40, 40, 4, 4])
    weights, means = geometry.seli_grams(counts)
    frames = [geometry.ce_frame(counts, decay, decay) for decay in (1e-3, 1e-5, 1e-7)]
    for errors in (
        [float(gram_error(frame.weights, weights)) for frame in frames],
        [float(gram_error(frame.means, means)) for frame in frames],
    ):
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 0.5 * errors[0]  # as one over the logarithm of the decay: slowly


def test_small_classes_merge_just_below_their_threshold():
    counts, feature_decay = torch.tensor([30, 30, 5, 5]), 2e-2
    decay = 5 / geometry.ce_merge_count(70, 1.0, feature_decay)  # whose threshold is exactly the five samples
    apart, merged = (geometry.ce_frame(counts, share * decay, feature_decay).weights for share in (0.99, 1.01))
    assert (apart[2, 2] - apart[2, 3]) / apart[2, 2] > 1e-3
    assert abs(merged[2, 2] - merged[2, 3]) / merged[2, 2] < 1e-12


def test_ce_frame_says_when_it_has_not_settled():
    with pytest.raises(ValueError, match="did not settle to tolerance=1e-13 in max_steps=3"):
        geometry.ce_frame(COUNTS, 2e-3, 2e-4, max_steps=3)


def test_frame_errors_vanish_on_the_frames_they_name():
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    lengths = exact(1.0, 2.0, 3.0)
    assert geometry.orthogonal_frame_error(5 * rotation[:3]) < 1e-12
    assert geometry.general_frame_error(lengths.sqrt()[:, None] * rotation[:3], 7 * lengths) < 1e-12
    assert geometry.general_frame_error(rotation[:3], lengths) > 0.1


def test_orthogonal_frame_error_of_a_simplex():
    simplex = simplex_gram(5)
    expected = gram_error(simplex, torch.eye(5))
    torch.testing.assert_close(geometry.orthogonal_frame_error(simplex), expected)
    assert float(expected) == pytest.approx(math.sqrt(2 - 2 * math.sqrt(4 / 5)))


def test_minority_cosine():
    vectors = torch.randn(5, 4, dtype=torch.float64)
    vectors[3:] = exact(1.0, 2.0, 0.0, 0.0) * exact(1.0, 3.0)[:, None]
    minority = torch.tensor([False, False, False, True, True])
    assert float(geometry.minority_cosine(vectors, minority)) == pytest.approx(1)
    three = torch.tensor([True, False, True, True, False])
    cosine = cosine_matrix(vectors)
    torch.testing.assert_close(
        geometry.minority_cosine(vectors, three), (cosine[0, 2] + cosine[0, 3] + cosine[2, 3]) / 3
    )
    assert geometry.minority_cosine(vectors, torch.arange(5) == 2).isnan()


def test_free_features_are_stationary_and_lie_between_the_mixed_classes():
    weight = math.sqrt(5 / 4) * simplex_gram(5) * 3
    share = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None]
    targets = share * torch.eye(5).double()[0] + (1 - share) * torch.eye(5).double()[1]
    features = geometry.free_features(weight, targets, 1e-3)
    slope = ((features @ weight.T).softmax(1) - targets) @ weight + 1e-3 * features
    assert slope.abs().max() < 1e-12
    logits = features @ weight.T
    torch.testing.assert_close(logits[:, 2:], logits[:, 2:3].expand(-1, 3), rtol=0, atol=1e-9)  # in span(w_0, w_1)


def test_mixed_logits_differ_by_the_log_odds_of_the_mix_as_the_decay_vanishes():
    targets = exact([0.8, 0.2, 0, 0])
    weight = 2 * simplex_gram(4)
    gaps = [torch.diff(geometry.free_features(weight, targets, d) @ weight.T)[0, 0] for d in (1e-2, 1e-4, 1e-6)]
    errors = [abs(float(gap) + math.log(4)) for gap in gaps]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-4


def test_what_has_no_optimum_is_refused():
    with pytest.raises(ValueError, match="all above zero"):
        geometry.mse_orthogonal_frame(torch.tensor([3, 0]), 0.1, 0.1)
    with pytest.raises(ValueError, match="decay must be above zero"):
        geometry.ce_nonnegative_frame(COUNTS, 0.0, 0.1)
    with pytest.raises(ValueError, match="num_layers=0"):
        geometry.mse_orthogonal_frame(COUNTS, 0.1, 0.1, num_layers=0)
    with pytest.raises(ValueError, match=r"feature_decay=0\.0 must be above zero"):
        geometry.free_features(torch.eye(3), torch.eye(3), 0.0)
    with pytest.raises(ValueError, match=r"targets must be \(N, C\) with C = 3"):
        geometry.free_features(torch.eye(3), torch.arange(3), 0.1)
