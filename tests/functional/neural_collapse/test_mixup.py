import math

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from lightning_feat.functional.neural_collapse.mixup import (
    MixSums,
    draw_pairs,
    free_logits,
    free_mixed_features,
    free_slope,
    free_strength,
    mix_measures,
    mix_sums,
    plane_residual,
    strength_of_margin,
)
from lightning_feat.functional.neural_collapse.simplex import simplex_prototypes


def target(num_classes, share, first=0, second=1):
    y = torch.zeros(num_classes, dtype=torch.float64)
    y[first] += share
    y[second] += 1 - share
    return y


@pytest.mark.parametrize("share", [1.0, 0.7, 0.5, 1e-3])
@pytest.mark.parametrize("strength", [1e-3, 1.0, 30.0, 1e4, 1e8])
@pytest.mark.parametrize("num_classes", [2, 3, 10, 1000])
def test_free_logits_solve_the_fixed_point(num_classes, strength, share):
    y = target(num_classes, share)
    z = free_logits(y, strength)
    # Logits are exact to rounding, 1e-16 times their size (below 30); the strength multiplies that of the softmax.
    assert (z - strength * (y - z.softmax(0))).abs().max() < 2e-14 * max(1, strength)
    assert abs(z.sum()) < 1e-11


def test_free_features_are_where_gradient_descent_ends():
    weight, y, decay = 3 * simplex_prototypes(6, 8), target(6, 0.7, 2, 4), 0.05
    h = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [h], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy((weight @ h)[None], y[None]) + decay / 2 * h.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = free_mixed_features(y, weight, decay)
    # The objective is convex with modulus 0.05, so that a gradient of 1e-9 leaves an error of 2e-8 at most.
    torch.testing.assert_close(h.detach(), expected, rtol=0, atol=1e-7)
    plane = plane_residual(expected[None], weight[2][None], weight[4][None])
    assert plane.item() < 1e-12  # in the plane of its two rows


def test_free_features_of_one_class_point_along_its_row():
    weight = simplex_prototypes(5, 4)
    h = free_mixed_features(torch.eye(5), weight, 0.1)
    assert cosine_similarity(h, weight).min() > 1 - 1e-12


def test_with_a_vanishing_decay_the_softmax_is_the_share():
    z = free_logits(target(10, 0.8), 1e9)
    # What the other classes get vanishes as log(g) / g, here about 2e-8.
    assert z[0] - z[1] == pytest.approx(math.log(0.8 / 0.2), abs=1e-6)


@pytest.mark.parametrize(
    ("y", "strength", "match"),
    [([0.5, 0.6], 1.0, "shares"), ([1.5, -0.5], 1.0, "shares"), ([0.5, 0.5], 0.0, "above zero")],
)
def test_free_logits_refuse(y, strength, match):
    with pytest.raises(ValueError, match=match):
        free_logits(torch.tensor(y), strength)


def test_free_features_need_a_simplex():
    with pytest.raises(ValueError, match="no simplex"):
        free_mixed_features(target(3, 0.5), torch.eye(3), 0.1)


def test_the_strength_of_a_margin_is_the_one_that_makes_it():
    strength = free_strength(7, 2.0, 0.03)
    z = free_logits(torch.eye(7)[0], strength)
    margin = z[0] - z[1:].mean()
    assert strength_of_margin(margin, 7).item() == pytest.approx(strength, rel=1e-9)
    assert strength_of_margin(torch.tensor(-1.0), 7).isnan()


def a_mix(seed=0, num=40):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(0, 4, (num,), generator=generator) for _ in range(2))
    shares = torch.rand(num, generator=generator) * 0.8 + 0.1
    weight = torch.randn(4, 6, generator=generator)
    return (
        torch.randn(num, 6, generator=generator),
        torch.randn(num, 4, generator=generator),
        weight,
        first,
        second,
        shares,
    )


def test_sums_over_parts_give_the_slow_definition_over_all():
    h, z, w, first, second, shares = a_mix()
    parts = [mix_sums(h[s], z[s], w, first[s], second[s], shares[s]) for s in (slice(0, 7), slice(7, 40))]
    values = mix_measures(MixSums(*map(sum, zip(*parts, strict=True))), torch.tensor([0.3]), 4)

    w = w.double() - w.double().mean(0)
    cosines, outside, top, bottom = [], [], 0.0, 0.0
    for n in range(40):
        i, j, hn = int(first[n]), int(second[n]), h[n].double()
        if i == j:
            cosines.append(hn @ w[i] / hn.norm() / w[i].norm())
            continue
        plane = torch.stack([w[i], w[j]], 1)
        nearest = plane @ torch.linalg.lstsq(plane, hn).solution
        outside.append((hn - nearest).square().sum() / hn.square().sum())
        x = math.log(float(shares[n]) / (1 - float(shares[n])))
        top, bottom = top + x * (float(z[n, i]) - float(z[n, j])), bottom + x * x
    # Both take the same float32 inputs into float64, whose rounding is all that differs.
    assert values["same_class_cosine"].item() == pytest.approx(float(torch.stack(cosines).mean()), rel=1e-9)
    assert values["plane_residual"].item() == pytest.approx(float(torch.stack(outside).mean()), rel=1e-9)
    assert values["slope"].item() == pytest.approx(top / bottom, rel=1e-9)


def test_free_features_measure_as_theory_has_it():
    weight, shares = 2 * simplex_prototypes(5, 6), torch.tensor([0.1, 0.3, 0.9], dtype=torch.float64)
    rows = [(i, j, s) for i in range(5) for j in range(5) for s in shares.tolist()]
    first, second = (torch.tensor([row[k] for row in rows]) for k in (0, 1))
    h = free_mixed_features(torch.stack([target(5, s, i, j) for i, j, s in rows]), weight, 0.01)
    values = mix_measures(
        mix_sums(h, h @ weight.T, weight, first, second, torch.tensor([row[2] for row in rows])), shares, 5
    )
    assert values["same_class_cosine"].item() == pytest.approx(1, abs=1e-12)
    assert values["plane_residual"].item() < 1e-12
    assert values["slope"].item() == pytest.approx(values["slope_free"].item(), rel=1e-6)  # float32 shares
    assert abs(values["slope"] - 1) < 0.05  # the decay is small


def test_of_a_kind_without_mixes_the_measures_are_nan():
    h, z, w, first, _, shares = a_mix()
    values = mix_measures(mix_sums(h, z, w, first, first, shares), torch.tensor([0.5]), 4)
    assert values["plane_residual"].isnan()
    assert values["slope"].isnan()
    assert values["same_class_cosine"].isfinite()
    assert free_slope(torch.tensor(-1.0), torch.tensor([0.3]), 4).isnan()


def test_a_share_of_zero_is_refused():
    h, z, w, first, second, _ = a_mix()
    with pytest.raises(ValueError, match="between 0 and 1"):
        mix_sums(h, z, w, first, second, torch.zeros(40))
    with pytest.raises(ValueError, match=r"weight must be \(C, D\) with C = 3 and D = 6"):
        mix_sums(h, z[:, :3], w, first, second, torch.zeros(40))


def test_pairs_are_of_one_class_and_of_two_and_all_of_them_come():
    targets = torch.tensor([2, 0, 0, 1, 2, 2, 0])
    pairs = draw_pairs(targets, 1000, torch.Generator().manual_seed(0))
    same = targets[pairs[:, 0]] == targets[pairs[:, 1]]
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert same[:1000].all()
    assert not same[1000:].any()
    assert len(pairs[:1000].unique(dim=0)) == 2 * 3 * 2  # two classes of three samples
    assert len(pairs[1000:].unique(dim=0)) == 42 - 12


@pytest.mark.parametrize(("targets", "num_pairs"), [([], 0), ([3], 0), ([3, 3], 5), ([3, 2], 5)])
def test_without_a_pair_of_a_kind_there_are_none(targets, num_pairs):
    assert draw_pairs(torch.tensor(targets, dtype=torch.long), 5).shape == (num_pairs, 2)
