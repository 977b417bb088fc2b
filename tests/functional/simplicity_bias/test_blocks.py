import pytest
import torch

from lightning_feat.functional.simplicity_bias import crossed_counts, feature_reliance, reliance_of_counts


def classes(n, num_classes, seed):
    return torch.randint(num_classes, (n,), generator=torch.Generator().manual_seed(seed))


def test_counts_are_those_of_the_pairs_and_add_up():
    predictions, feature = classes(50, 3, 0), classes(50, 3, 1)
    counts = crossed_counts(predictions, feature, 3)
    for s in range(3):
        for p in range(3):
            assert counts[s, p] == ((feature == s) & (predictions == p)).sum()
    halves = [crossed_counts(predictions[part], feature[part], 3) for part in (slice(20), slice(20, 50))]
    assert torch.equal(sum(halves), counts)


def test_on_a_balanced_feature_it_is_feature_reliance():
    predictions, feature = classes(90, 3, 0), torch.arange(90) % 3
    found = reliance_of_counts(crossed_counts(predictions, feature, 3))
    torch.testing.assert_close(found, feature_reliance(predictions, feature, 3))


def test_who_ignores_the_feature_has_zero_whatever_the_shares_of_the_classes():
    feature = torch.tensor([0] * 80 + [1] * 16 + [2] * 4)
    always = torch.zeros(100, dtype=torch.long)
    assert reliance_of_counts(crossed_counts(always, feature, 3)) == 0
    assert reliance_of_counts(crossed_counts(feature, feature, 3)) == 1


def test_classes_that_the_feature_never_stood_for_are_left_out():
    counts = torch.tensor([[8, 2, 0], [0, 0, 0], [0, 5, 5]])
    assert reliance_of_counts(counts) == pytest.approx(2 * (0.8 + 0.5) / 2 - 1)
    assert reliance_of_counts(torch.tensor([[3, 1], [0, 0]])).isnan()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="counts must be"):
        reliance_of_counts(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="a target is 5"):
        crossed_counts(torch.tensor([5]), torch.tensor([0]), 3)
