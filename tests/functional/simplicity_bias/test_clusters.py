import numpy as np
import pytest
import torch

from lightning_feat.functional.simplicity_bias import clusters as simplicity
from lightning_feat.functional.simplicity_bias.clusters import slow_examples, two_means, useful_indices


def outputs_of(sizes, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts, targets = [], []
    for label, size in enumerate(sizes):
        centres = 3 * torch.randn(2, width, generator=generator) + 10
        which = (torch.rand(size, generator=generator) < 0.3).long()
        parts.append(centres[which] + torch.randn(size, width, generator=generator))
        targets += [label] * size
    order = torch.randperm(len(targets), generator=generator)
    return torch.cat(parts)[order], torch.tensor(targets)[order]


def inertia_of(outputs, cluster):
    return sum(
        float((outputs[cluster == side] - outputs[cluster == side].double().mean(0)).double().square().sum())
        for side in (0, 1)
        if (cluster == side).any()
    )


def test_no_worse_than_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    for seed in range(5):
        outputs, targets = outputs_of([60, 200, 9], seed=seed)
        outputs = outputs.double()
        found = two_means(outputs, targets, 3)
        for label in range(3):
            mine = outputs[targets == label]
            theirs = cluster.KMeans(2, n_init=10, random_state=seed).fit(mine.numpy()).inertia_
            assert found.inertia[label] <= theirs * (1 + 1e-9)
            # the stated inertia is that of the clusters
            assert inertia_of(mine, found.cluster[targets == label]) == pytest.approx(
                float(found.inertia[label]), rel=1e-5
            )


def test_the_best_of_all_cuts_of_a_small_class():
    outputs, targets = outputs_of([9])
    cuts = ((np.arange(2**8)[:, None] >> np.arange(9)) & 1).astype(np.int64)
    best = min(inertia_of(outputs, torch.from_numpy(cut)) for cut in cuts)
    assert float(two_means(outputs, targets, 1).inertia[0]) == pytest.approx(best, rel=1e-5)


def test_blocks_change_nothing(monkeypatch):
    outputs, targets = outputs_of([30, 4, 100, 31, 7])
    together = two_means(outputs, targets, 5)
    monkeypatch.setattr(simplicity, "_BLOCK_BYTES", 1)  # a class each
    apart = two_means(outputs, targets, 5)
    assert torch.equal(together.cluster, apart.cluster)
    torch.testing.assert_close(together.inertia, apart.inertia, rtol=1e-6, atol=0)


def test_far_from_the_origin_in_float32():
    outputs, targets = outputs_of([200])
    near, far = two_means(outputs, targets, 1), two_means(outputs + 4096, targets, 1)
    assert float(far.inertia[0]) == pytest.approx(float(near.inertia[0]), rel=1e-3)  # 4096 leaves 5e-4 of a digit


def test_the_global_random_numbers_stay():
    outputs, targets = outputs_of([20, 20])
    before = torch.get_rng_state()
    first = two_means(outputs, targets, 2, restarts=1, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.cluster, two_means(outputs, targets, 2, restarts=1, seed=3).cluster)


def test_classes_without_two_different_outputs_are_not_cut():
    outputs = torch.tensor([[0.1, 0.3]] * 5 + [[7.0, 1.0]] + [[1.0, 0.0], [2.0, 0.0]])
    targets = torch.tensor([0] * 5 + [1] + [3] * 2)
    found = slow_examples(outputs, torch.arange(8.0), targets, 4)
    assert found.cluster[:6].sum() == 0
    assert found.skipped.tolist() == [True, True, True, False]
    assert found.slow.tolist() == [False] * 7 + [True]
    inertia = two_means(outputs, targets, 4).inertia
    assert inertia[2].isnan()
    assert inertia[:2].abs().max() < 1e-12


def test_the_slow_cluster_has_the_higher_mean_loss():
    outputs, targets = outputs_of([50, 80])
    losses = torch.rand(130, generator=torch.Generator().manual_seed(1))
    found = slow_examples(outputs, losses, targets, 2)
    for label in range(2):
        mine = targets == label
        sides = [losses[mine & (found.cluster == side)].double().mean() for side in (0, 1)]
        torch.testing.assert_close(found.loss[label], torch.stack(sides))
        assert torch.equal(found.slow[mine], found.cluster[mine] == int(sides[1] > sides[0]))


def test_a_tie_upsamples_neither():
    found = slow_examples(torch.tensor([[0.0], [0.1], [5.0]]), torch.ones(3), torch.zeros(3, dtype=torch.long), 1)
    assert found.skipped.all()
    assert not found.slow.any()


def test_each_slow_example_stands_factor_times():
    outputs, targets = outputs_of([50, 80])
    losses = torch.rand(130)
    slow = slow_examples(outputs, losses, targets, 2).slow
    times = useful_indices(outputs, losses, targets, factor=3).bincount()
    assert torch.equal(times, 1 + 2 * slow.long())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"outputs": torch.zeros(4)}, r"outputs \(N, F\)"),
        ({"outputs": torch.full((4, 2), torch.nan)}, "4 of 4 outputs are NaN or inf"),
        ({"targets": torch.tensor([0, 1, 2, 3])}, "below num_classes=2, got torch.int64, 0 to 3"),
        ({"targets": torch.zeros(4)}, "must be class indices"),
        ({"losses": torch.ones(())}, "one number for each of the 4 examples"),
        ({"losses": torch.full((4,), torch.nan)}, "none NaN"),
        ({"restarts": 0}, "restarts=0"),
    ],
)
def test_bad_input_is_refused(change, text):
    given = {"outputs": torch.eye(4)[:, :2], "losses": torch.ones(4), "targets": torch.tensor([0, 0, 1, 1])}
    with pytest.raises(ValueError, match=text):
        slow_examples(**{**given, "num_classes": 2, **change})
