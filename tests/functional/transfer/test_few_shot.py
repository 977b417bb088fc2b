import math

import pytest
import torch

from lightning_feat.functional.common.class_sums import class_sums
from lightning_feat.functional.neural_collapse.variability import class_distance_normalized_variance
from lightning_feat.functional.transfer import few_shot_error, few_shot_error_bound


def clouds(spread, num_classes=5, size=40, width=8):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(num_classes * size) % num_classes
    means = torch.randn(num_classes, width, generator=generator)
    return means[targets] + spread * torch.randn(len(targets), width, generator=generator), targets


def test_classes_far_apart_are_never_confused_and_pure_noise_is_chance():
    assert few_shot_error(*clouds(0.01), shots=1, episodes=5).mean == 0
    generator = torch.Generator().manual_seed(0)
    noise = few_shot_error(torch.randn(400, 4), torch.arange(400) % 4, 5, episodes=40, generator=generator)
    assert float(noise.mean) == pytest.approx(0.75, abs=0.03)


def test_error_is_that_of_the_nearest_of_the_drawn_means():
    features, targets = clouds(1.0, num_classes=3, size=10)
    found = few_shot_error(features, targets, 2, episodes=1, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    order = torch.randperm(3, generator=generator).tolist()
    members = [(targets == c).nonzero()[:, 0] for c in order]
    members = [member[torch.randperm(10, generator=generator)] for member in members]
    means = torch.stack([features[member[:2]].mean(0) for member in members])
    wrong = [
        float(torch.stack([(features[i] - means).norm(dim=1).argmin() != c for i in member[2:]]).double().mean())
        for c, member in enumerate(members)
    ]
    assert float(found.mean) == pytest.approx(sum(wrong) / 3)
    assert found.half_width.isnan()


def test_interval_is_the_normal_one_over_episodes():
    found = few_shot_error(*clouds(1.0), shots=1, episodes=30, classes_per_episode=3)
    assert found.episodes.shape == (30,)
    assert float(found.half_width) == pytest.approx(1.96 * float(found.episodes.std()) / math.sqrt(30))


def test_more_shots_help():
    errors = [
        float(few_shot_error(*clouds(1.0), s, 30, generator=torch.Generator().manual_seed(0)).mean) for s in (1, 20)
    ]
    assert errors[1] < errors[0] - 0.05


@pytest.mark.parametrize("shots", [1, 5, 20])
@pytest.mark.parametrize("spread", [0.03, 0.1, 0.2])
def test_bound_holds(shots, spread):
    features, targets = clouds(spread)
    bound = few_shot_error_bound(class_sums(features, targets, 5), shots)
    assert few_shot_error(features, targets, shots, episodes=20).mean <= bound
    assert bound < 1 or spread > 0.1


def test_bound_with_exact_means_is_four_times_the_cdnv_for_each_other_class():
    sums = class_sums(*clouds(0.1), 6)  # one class without samples
    torch.testing.assert_close(few_shot_error_bound(sums), 16 * class_distance_normalized_variance(sums))
    assert few_shot_error_bound(class_sums(torch.ones(2, 3), torch.tensor([0, 0]), 2)).isnan()


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(ValueError, match="have more than shots=40 samples"):
        few_shot_error(*clouds(1.0), shots=40)
    with pytest.raises(ValueError, match="7 classes an episode, but 5"):
        few_shot_error(*clouds(1.0), shots=1, classes_per_episode=7)
    with pytest.raises(ValueError, match="both must be at least 1"):
        few_shot_error(*clouds(1.0), shots=0)
    with pytest.raises(ValueError, match=r"features must be \(N, D\)"):
        few_shot_error(torch.ones(3), torch.ones(3), 1)
