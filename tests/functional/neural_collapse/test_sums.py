"""Sums over batches, soft targets, weights, the second pass."""

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_feat.functional import neural_collapse as nc
from lightning_feat.functional.common.class_sums import accumulation_device, add_class_sums_, empty_class_sums

FEATURES = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(30) % 3


def assert_same(first, second, rtol=1e-12):
    for left, right in zip(first, second, strict=True):
        torch.testing.assert_close(left, right, rtol=rtol, atol=1e-14)


def test_sums_are_the_definition():
    sums = nc.class_sums(FEATURES, TARGETS, 5)
    for c in range(5):
        part = FEATURES[c == TARGETS].double()
        assert sums.counts[c] == len(part)
        torch.testing.assert_close(sums.sums[c], part.sum(0))
        torch.testing.assert_close(sums.squares[c], part.square().sum())
    assert {entry.dtype for entry in sums} == {torch.float64}


def test_sums_of_parts_add_up():
    parts = [nc.class_sums(FEATURES[part], TARGETS[part], 3) for part in (slice(0, 4), slice(4, 30), slice(30, 30))]
    assert_same([sum(entries) for entries in zip(*parts, strict=True)], nc.class_sums(FEATURES, TARGETS, 3))


def test_adding_in_place_is_adding():
    totals = empty_class_sums(3, 4)
    for part in (slice(0, 4), slice(4, 30)):
        add_class_sums_(totals, FEATURES[part], TARGETS[part])
    assert_same(totals, nc.class_sums(FEATURES, TARGETS, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_are_summed_in_float64_whatever_they_are(dtype):
    features = FEATURES.to(dtype)
    assert_same(nc.class_sums(features, TARGETS, 3), nc.class_sums(features.double(), TARGETS, 3))


def test_one_hot_soft_targets_are_class_indices():
    soft = torch.nn.functional.one_hot(TARGETS, 3).float()
    assert_same(nc.class_sums(FEATURES, soft, 3), nc.class_sums(FEATURES, TARGETS, 3))


def test_a_soft_target_counts_a_sample_in_parts():
    partner = TARGETS.roll(1)
    soft = (0.75 * torch.eye(3)[TARGETS] + 0.25 * torch.eye(3)[partner]).double()
    both = torch.cat([FEATURES, FEATURES]), torch.cat([TARGETS, partner]), 3
    weights = torch.cat([torch.full((30,), 0.75), torch.full((30,), 0.25)])
    sums = nc.class_sums(*both, weights)
    assert_same(nc.class_sums(FEATURES, soft, 3), sums)
    centers = nc.class_centers(sums)
    soft_pass = nc.center_sums(FEATURES, soft, None, centers)
    hard_pass = nc.center_sums(*both[:2], None, centers, weights)
    assert_same((soft_pass.samples, *soft_pass[2:]), (hard_pass.samples, *hard_pass[2:]))


def test_a_weight_is_so_many_copies():
    weights = torch.arange(30) % 4
    copies = FEATURES.repeat_interleave(weights, 0), TARGETS.repeat_interleave(weights)
    weighted, repeated = nc.class_sums(FEATURES, TARGETS, 3, weights), nc.class_sums(*copies, 3)
    assert weighted.counts.equal(repeated.counts)
    torch.testing.assert_close(weighted.sums, repeated.sums)
    centers = nc.class_centers(repeated)
    logits = FEATURES[:, :3]
    first = nc.center_sums(FEATURES, TARGETS, logits, centers, weights)
    assert_same(first, nc.center_sums(*copies, logits.repeat_interleave(weights, 0), centers))
    left = nc.second_moment(FEATURES, weights)
    torch.testing.assert_close(left, nc.second_moment(copies[0]))


def test_sums_of_squares_weigh_once():
    weights = torch.full((30,), 3.0)
    assert_same(nc.class_sums(FEATURES, TARGETS, 3, weights), [3 * s for s in nc.class_sums(FEATURES, TARGETS, 3)])


def test_the_second_pass_adds_up():
    centers = nc.class_centers(nc.class_sums(FEATURES, TARGETS, 3))
    logits = FEATURES[:, :3]
    parts = [nc.center_sums(FEATURES[p], TARGETS[p], logits[p], centers) for p in (slice(0, 11), slice(11, 30))]
    whole = nc.center_sums(FEATURES, TARGETS, logits, centers)
    assert_same([sum(entries) for entries in zip(*parts, strict=True)], whole)


def test_the_nearest_mean_is_never_that_of_a_class_without_samples():
    features, targets = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 2])
    centers = nc.class_centers(nc.class_sums(features, targets, 3))  # an empty class would sit at the global mean, 0
    assert nc.center_sums(torch.tensor([[-0.1], [0.1]]), targets, None, centers).hits == 2


def test_gradients_reach_the_features_through_sums_and_measures():
    features = FEATURES.double().requires_grad_()

    def cdnv(features):
        return nc.class_distance_normalized_variance(nc.class_sums(features, TARGETS, 3))

    assert torch.autograd.gradcheck(cdnv, features)


def test_mps_sums_live_on_the_cpu():
    assert accumulation_device(torch.device("mps")).type == "cpu"
    device = torch.device("cuda", 1)
    assert accumulation_device(device) is device


@pytest.mark.parametrize(
    ("features", "targets", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 7]), "a target is 7 but num_classes=3: set num_classes to at least 8"),
        (torch.zeros(2, 3), torch.tensor([0, -100]), "a target is -100"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "must be integer class indices, got torch.float32"),
        (torch.zeros(2, 3), torch.tensor([0, 1, 2]), r"got \(2, 3\) and \(3,\)"),
        (torch.zeros(2, 3, 4), torch.tensor([0, 1]), "pool or flatten"),
        (torch.zeros(2, 3), torch.zeros(2, 4), r"or \(N, 3\) floating soft targets"),
        (torch.zeros(2, 3), torch.ones(2, 3), "the sums lie between 3 and 3. Of logits take the softmax"),
    ],
)
def test_what_does_not_fit_is_named(features, targets, message):
    with pytest.raises(ValueError, match=message):
        nc.class_sums(features, targets, 3)


def test_logits_of_another_shape_are_named():
    centers = nc.class_centers(nc.class_sums(FEATURES, TARGETS, 3))
    with pytest.raises(ValueError, match=r"logits must be \(30, 3\), got \(30, 4\)"):
        nc.center_sums(FEATURES, TARGETS, FEATURES, centers)


@pytest.mark.parametrize(("size", "processes", "shuffle"), [(7, 2, False), (10, 4, True), (12, 4, False), (2, 5, True)])
def test_what_the_sampler_repeats_is_marked_once_for_each_extra_copy(size, processes, shuffle):
    kept = []
    for process in range(processes):
        sampler = DistributedSampler(range(size), processes, process, shuffle=shuffle)
        first = 0
        for batch in DataLoader(range(size), batch_size=2, sampler=sampler):
            repeated = nc.repeated_by_sampler(first, len(batch), process, processes, size)
            kept += batch[~repeated].tolist()
            first += len(batch)
    assert sorted(kept) == list(range(size))
