import itertools
import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from lightning_feat.functional.common.class_sums import ClassSums, class_sums
from lightning_feat.functional.transfer import class_separation
from lightning_feat.functional.transfer.class_separation import (
    class_separation_r2,
    direction_sums,
    pair_angle_sums,
    sample_of_each_class,
    within_class_variability,
)

C = 5  # the last class stays empty


def samples(spread=1.0, size=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(C - 1, (size,), generator=generator)
    features = torch.randn(C, 6, generator=generator)[targets] + spread * torch.randn(size, 6, generator=generator)
    return features * torch.rand(size, 1, generator=generator), targets


def slow_r2(features, targets):
    """The definition: means over all pairs, a sample with itself and a class with itself included."""
    classes = [features[targets == c].double() for c in targets.unique()]

    def apart(a, b):
        return (1 - cosine_similarity(a[:, None], b[None], dim=2)).mean()

    within = torch.stack([apart(a, a) for a in classes]).mean()
    total = torch.stack([apart(a, b) for a in classes for b in classes]).mean()
    return 1 - within / total


def slow_variability(features, targets):
    means = []
    for c in targets.unique():
        pairs = list(itertools.combinations(features[targets == c].double(), 2))
        angles = [math.degrees(math.acos(float(cosine_similarity(a, b, dim=0).clamp(-1, 1)))) for a, b in pairs]
        means += [sum(angles) / len(angles)] if angles else []
    return torch.tensor(sum(means) / len(means), dtype=torch.float64)


@pytest.mark.parametrize("spread", [1.0, 1e-4])  # ordinary, and nearly collapsed
def test_r2_is_the_definition_over_all_pairs(spread):
    features, targets = samples(spread)
    value = class_separation_r2(direction_sums(features, targets, C))
    # 1 - R^2 is 1e-8 of cancelling ones at the smaller spread; both sides round at 1e-16
    torch.testing.assert_close(1 - value, 1 - slow_r2(features, targets), rtol=1e-6, atol=0)


def test_sums_of_parts_add_up_to_those_of_the_whole():
    features, targets = samples()
    parts = [direction_sums(features[part], targets[part], C) for part in (slice(0, 9), slice(9, 40))]
    whole = direction_sums(features, targets, C)
    for a, b, both in zip(*parts, whole, strict=True):
        torch.testing.assert_close(a + b, both)


def test_both_look_at_directions_alone():
    features, targets = samples()
    longer = features * torch.linspace(0.1, 9.0, len(features))[:, None]
    for measure in (
        lambda h: class_separation_r2(direction_sums(h, targets, C)),
        lambda h: within_class_variability(pair_angle_sums(h, targets, C)),
    ):
        torch.testing.assert_close(measure(longer), measure(features), rtol=1e-5, atol=0)  # features are float32


def test_r2_is_one_for_collapsed_classes_zero_for_equal_means_and_nan_for_one_direction():
    ends, targets = torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1])
    assert class_separation_r2(direction_sums(ends, targets, 2)) == 1
    assert class_separation_r2(direction_sums(ends, targets.sort().values, 2)) == pytest.approx(0, abs=1e-15)
    assert class_separation_r2(direction_sums(ends[:1], targets[:1], 2)).isnan()
    assert class_separation_r2(direction_sums(ends[:0], targets[:0], 2)).isnan()


def test_r2_of_sums_that_are_not_of_unit_features_is_refused():
    with pytest.raises(ValueError, match=r"make the sums with direction_sums"):
        class_separation_r2(class_sums(*samples(), C))


@pytest.mark.parametrize("block", [7, 1024])  # many blocks, and a single one
def test_variability_is_the_definition_over_all_pairs(monkeypatch, block):
    monkeypatch.setattr(class_separation, "_BLOCK", block)
    features, targets = samples()
    totals = pair_angle_sums(features, targets, C)
    sizes = targets.bincount(minlength=C)
    assert totals.pairs.tolist() == (sizes * (sizes - 1) / 2).tolist()
    torch.testing.assert_close(within_class_variability(totals), slow_variability(features, targets))


def test_variability_of_one_direction_is_zero_and_without_pairs_nan():
    h = torch.tensor([[3.0, 4.0], [6.0, 8.0], [1.0, 0.0]])
    # arccos near one turns a rounding of 1e-16 into 1e-8 rad
    assert within_class_variability(pair_angle_sums(h, torch.tensor([0, 0, 1]), 2)) == pytest.approx(0, abs=1e-5)
    assert within_class_variability(pair_angle_sums(h, torch.tensor([0, 1, 2]), 3)).isnan()
    assert within_class_variability(pair_angle_sums(h[:0], torch.tensor([], dtype=torch.long), 3)).isnan()


def test_features_that_are_zero_or_have_no_weight_are_left_out_of_both():
    features, targets = samples()
    more, labels = torch.cat([features, torch.zeros(3, 6), features[:2]]), torch.cat([targets, targets[:5]])
    weights = torch.ones(45)
    weights[43:] = 0
    for sums in (direction_sums, pair_angle_sums):
        for value, expected in zip(sums(more, labels, C, weights), sums(features, targets, C), strict=True):
            torch.testing.assert_close(value, expected)


def test_soft_targets_weigh_the_separation_and_are_refused_for_pairs():
    features, targets = samples()
    hard = direction_sums(features, targets, C)
    soft = direction_sums(features, torch.eye(C)[targets], C)
    torch.testing.assert_close(class_separation_r2(ClassSums(*soft)), class_separation_r2(hard))
    with pytest.raises(ValueError, match="give class indices for soft targets"):
        pair_angle_sums(features, torch.eye(C)[targets], C)


def test_a_target_out_of_range_is_refused():
    with pytest.raises(ValueError, match="a target is 3 but num_classes=3"):
        pair_angle_sums(*samples(), 3)


def test_half_precision_features_are_measured_in_float64():
    features, targets = samples()
    value = within_class_variability(pair_angle_sums(features.bfloat16(), targets, C))
    torch.testing.assert_close(value, slow_variability(features.bfloat16(), targets))


def test_a_sample_of_a_union_is_that_of_the_samples_of_its_parts():
    _, targets = samples(size=400)
    index = torch.arange(400)
    whole = sample_of_each_class(targets, most=9, seed=3)
    assert targets[whole].bincount().tolist() == [9] * (C - 1)
    kept = [part[sample_of_each_class(targets[part], 9, 3, index[part])] for part in (index[0::2], index[1::2])]
    both = torch.cat(kept)
    again = both[sample_of_each_class(targets[both], 9, 3, index[both])]
    assert again.sort().values.equal(whole)


def test_the_sample_is_spread_evenly_and_changes_with_the_seed():
    targets = torch.zeros(10_000, dtype=torch.long)
    chosen = [sample_of_each_class(targets, 2000, seed) for seed in range(4)]
    for places in chosen:
        tenths = (places // 1000).bincount(minlength=10)
        assert (tenths - 200).abs().max() < 64  # five standard deviations of a binomial with 1000 draws of 0.2
    common = torch.isin(chosen[0], chosen[1]).sum()
    assert 310 < common < 490  # 400 by chance, five standard deviations


def test_fewer_samples_than_asked_for_are_all_kept():
    assert sample_of_each_class(torch.tensor([2, 0, 2]), most=5).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="most=0 must be at least 1"):
        sample_of_each_class(torch.tensor([2, 0, 2]), most=0)
