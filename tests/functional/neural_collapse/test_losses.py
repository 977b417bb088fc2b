"""The losses against loops over samples and classes, and what they lead to."""

import math

import pytest
import torch

from lightning_feat.functional.neural_collapse.losses import (
    balanced_lengths,
    between_class_push,
    cut_gradient,
    dot_regression,
    scale_gradient,
    within_class_pull,
)
from lightning_feat.functional.neural_collapse.means import nc2_etf_error
from lightning_feat.functional.neural_collapse.simplex import simplex_prototypes

C, D = 5, 7
VARIANTS = ["per_class", "global", "frobenius"]


def batch(n=12, num_classes=C - 1):  # the last class is absent
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, D, generator=generator, dtype=torch.float64)
    return features.requires_grad_(), torch.randint(0, num_classes, (n,), generator=generator), generator


def cosine(a, b):
    a, b = a.detach(), b.detach()
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True)) / math.sqrt(
        sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b)
    )


def test_dot_regression_is_the_mean_over_samples():
    features, targets, _ = batch()
    e = simplex_prototypes(C, D)
    expected = sum((cosine(h, e[y]) - 1) ** 2 / 2 for h, y in zip(features, targets, strict=True)) / len(targets)
    assert float(dot_regression(features, targets, e)) == pytest.approx(expected, rel=1e-12)


def test_dot_regression_of_mixed_targets_is_the_mix_of_dot_regressions():
    features, first, generator = batch()
    second, share = torch.randint(0, C, first.shape, generator=generator), 0.3
    e = simplex_prototypes(C, D)
    mixed = share * torch.eye(C).double()[first] + (1 - share) * torch.eye(C).double()[second]
    expected = share * dot_regression(features, first, e) + (1 - share) * dot_regression(features, second, e)
    torch.testing.assert_close(dot_regression(features, mixed, e), expected, rtol=1e-12, atol=0)


def test_dot_regression_only_pulls():
    features, targets, _ = batch()
    e = simplex_prototypes(C, D)
    dot_regression(features, targets, e).backward()
    h, unit = features.detach(), features.detach() / features.detach().norm(dim=1, keepdim=True)
    cosines = (unit * e[targets]).sum(1, keepdim=True)
    pull = (1 - cosines) * (e[targets] - cosines * unit) / h.norm(dim=1, keepdim=True) / len(h)
    torch.testing.assert_close(-features.grad, pull, rtol=1e-10, atol=1e-14)


def test_balanced_lengths_make_every_class_weigh_the_same():
    features, _, _ = batch()
    targets = torch.tensor([0] * 7 + [1] * 3 + [2] * 2)
    e = simplex_prototypes(C, D)
    lengths = balanced_lengths(torch.bincount(targets, minlength=C)).double()
    loss = dot_regression(features, targets, lengths[:, None] * e)
    classes = [dot_regression(features[targets == c], targets[targets == c], e) for c in range(3)]
    torch.testing.assert_close(loss, torch.stack(classes).mean(), rtol=1e-6, atol=0)  # the lengths are float32
    assert lengths[3:].tolist() == [1.0, 1.0]


def test_the_pull_is_the_mean_of_class_means_over_all_classes():
    features, targets, generator = batch()
    means = torch.randn(C, D, generator=generator, dtype=torch.float64)
    total = 0.0
    for c in range(C):
        mine = [h for h, y in zip(features, targets, strict=True) if y == c]
        if mine:
            total += sum(float((h - means[c]).square().sum()) for h in mine) / len(mine)
    assert float(within_class_pull(features, targets, means)) == pytest.approx(total / C, rel=1e-12)


def test_the_push_is_the_slow_definition():
    means = torch.randn(C, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centered = means - means.mean(0)
    cosines = [[cosine(a, b) for j, b in enumerate(centered) if j != i] for i, a in enumerate(centered)]
    expected = {
        "per_class": -sum(math.acos(max(row)) for row in cosines) / C,
        "global": -math.acos(max(max(row) for row in cosines)),
        "frobenius": math.sqrt(sum((value + 1 / (C - 1)) ** 2 for row in cosines for value in row)),
    }
    for variant, value in expected.items():
        assert float(between_class_push(means, variant)) == pytest.approx(value, rel=1e-12), variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_push_is_lowest_at_a_simplex(variant):
    e = simplex_prototypes(C, D)
    lowest = between_class_push(e, variant)
    torch.testing.assert_close(
        lowest, torch.tensor(0.0 if variant == "frobenius" else -math.acos(-1 / (C - 1))).double(), atol=1e-7, rtol=0
    )
    for seed in range(20):
        noise = torch.randn(C, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert between_class_push(e + 0.1 * noise, variant) > lowest


# The nearest angles are not smooth where they are equal, so fixed steps rattle about the simplex, by less as they
# shrink; of the global variant, which moves one pair at a time, by more.
@pytest.mark.parametrize(("variant", "error"), [("per_class", 2e-3), ("global", 2e-2), ("frobenius", 1e-3)])
def test_gradient_steps_on_free_vectors_reach_a_simplex(variant, error):
    means = torch.randn(C, C - 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    start = float(nc2_etf_error(means.detach() - means.detach().mean(0)))
    optimizer = torch.optim.SGD([means], lr=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for _ in range(800):
        optimizer.zero_grad()
        between_class_push(means, variant).backward()
        optimizer.step()
        schedule.step()
    assert start > 0.3
    directions = torch.nn.functional.normalize(means.detach() - means.detach().mean(0), dim=1)
    assert nc2_etf_error(directions) < error


def test_gradient_steps_of_dot_regression_bring_unequal_classes_to_their_corners():
    targets = torch.tensor([0] * 20 + [1] * 3 + [2])
    features = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    e = simplex_prototypes(3, 4).float()
    optimizer = torch.optim.SGD([features], lr=10.0)
    for _ in range(2000):
        optimizer.zero_grad()
        dot_regression(features, targets, e).backward()
        optimizer.step()
    unit = torch.nn.functional.normalize(features.detach(), dim=1)
    # At an angle t the pull goes as t^3, so the last degrees take long: 0.95 is 18 degrees.
    assert (unit * e[targets]).sum(1).min() > 0.95


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ["random", "equal", "simplex", "opposite", "one at the centre"])
def test_the_gradient_of_the_push_is_finite(variant, case):
    means = {
        "random": torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
        "equal": torch.ones(4, 6),
        "simplex": simplex_prototypes(4, 6).float(),
        "opposite": torch.tensor([[1.0, 0.0], [-1.0, 0.0]]),
        "one at the centre": torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]),
    }[case].requires_grad_()
    value = between_class_push(means, variant)
    value.backward()
    assert math.isfinite(value)
    assert means.grad.isfinite().all()


def test_a_feature_of_zero_gets_no_gradient():
    features = torch.zeros(2, 3, requires_grad=True)
    value = dot_regression(features, torch.tensor([0, 1]), simplex_prototypes(3, 3).float())
    value.backward()
    assert float(value) == pytest.approx(0.5, rel=1e-6)  # a float32 prototype is as long as one up to rounding
    assert torch.equal(features.grad, torch.zeros(2, 3))


def test_scaling_a_gradient_leaves_the_value_bit_for_bit():
    x = torch.randn(9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scaled = scale_gradient(x, 100.0)
    scaled.sum().backward()
    assert torch.equal(scaled, x)
    assert torch.equal(x.grad, torch.full((9,), 100.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_regressed_in_float32(dtype):
    features, targets, _ = batch()
    value = dot_regression(features.detach().to(dtype), targets, simplex_prototypes(C, D).float())
    assert value.dtype == torch.float32
    # eps of the dtype is what the features lost when they were rounded
    expected = dot_regression(features, targets, simplex_prototypes(C, D))
    assert float(value) == pytest.approx(float(expected), abs=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda h, y, e: dot_regression(h, y.float(), e), "targets must be whole numbers, got torch.float32"),
        (lambda h, y, e: dot_regression(h, torch.ones(12, 3), e), r"soft targets must be \(12, 5\), got \(12, 3\)"),
        (lambda h, y, e: dot_regression(h[:, :3], y, e), r"prototypes must be \(C, D\) with D = 3, got \(5, 7\)"),
        (lambda h, y, e: within_class_pull(h, y[:4], e), r"targets must be \(N,\) with N = 12, got \(4,\)"),
        (lambda h, y, e: between_class_push(e[:1]), r"two classes or more, got \(1, 7\)"),
        (lambda h, y, e: between_class_push(e, "all"), "variant='all': choose 'per_class', 'global' or 'frobenius'"),
    ],
)
def test_what_does_not_fit_is_refused(call, text):
    features, targets, _ = batch()
    with pytest.raises(ValueError, match=text):
        call(features, targets, simplex_prototypes(C, D))


def test_a_cut_gradient_is_zero_whatever_comes_back():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    cut = cut_gradient(x)
    assert torch.equal(cut, x)
    cut.backward(torch.tensor([torch.inf, torch.nan]))
    assert torch.equal(x.grad, torch.zeros(2))
