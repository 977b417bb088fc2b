import itertools

import pytest
import torch

from lightning_feat.functional.simplicity_bias.reliance import (
    accuracy,
    binary_auc,
    block_randomized,
    feature_reliance,
    permuted_block,
    selection_quality,
    shortcut_bias,
    slow_feature_accuracy,
)


def two_blocks(size=400, num_classes=4, strength=0.9, seed=0):
    """Inputs whose first C columns show the class, and whose last C show it with the probability ``strength``."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(num_classes, (size,), generator=generator)
    wrong = torch.rand(size, generator=generator) > strength
    shown = torch.where(wrong, (targets + 1) % num_classes, targets)
    eye = torch.eye(num_classes)
    return torch.cat([eye[targets], eye[shown]], dim=1), targets, shown


FAST = torch.tensor([False] * 4 + [True] * 4)


def reads_slow(x):
    return x[:, :4]


def reads_fast(x):
    return x[:, 4:]


def test_auc_is_the_share_of_pairs_in_order():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(6, (40,), generator=generator).float()  # many ties
    targets = torch.randint(2, (40,), generator=generator)
    pairs = list(itertools.product(scores[targets == 1].tolist(), scores[targets == 0].tolist()))
    expected = sum(a > b for a, b in pairs) / len(pairs) + sum(a == b for a, b in pairs) / len(pairs) / 2
    assert float(binary_auc(scores, targets)) == pytest.approx(expected, rel=1e-12)
    both = torch.stack([torch.zeros(40), scores], dim=1)
    assert binary_auc(both, targets) == binary_auc(scores, targets)


def test_auc_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(1)
    scores, targets = torch.randn(200, generator=generator), torch.randint(2, (200,), generator=generator)
    assert float(binary_auc(scores, targets)) == pytest.approx(metrics.roc_auc_score(targets, scores), rel=1e-12)


def test_auc_with_one_class_is_undefined():
    assert binary_auc(torch.randn(5), torch.ones(5)).isnan()


def test_only_the_block_moves():
    inputs, _, _ = two_blocks(6)
    order = torch.tensor([5, 0, 1, 2, 3, 4])
    found = permuted_block(inputs, FAST, order)
    slow = torch.stack([torch.cat([inputs[i, :4], inputs[order[i], 4:]]) for i in range(6)])
    assert torch.equal(found, slow)


def test_a_block_of_columns_broadcasts_over_an_image():
    images = torch.randn(3, 2, 4, 6)
    found = permuted_block(images, torch.arange(6) >= 4, torch.tensor([2, 0, 1]))
    assert torch.equal(found[..., :4], images[..., :4])
    assert torch.equal(found[0, ..., 4:], images[2, ..., 4:])


def test_expectation_over_all_permutations():
    inputs, targets, _ = two_blocks(5, seed=3)

    def model(x):
        return reads_slow(x) + 2 * reads_fast(x)

    every = [
        float(accuracy(model(permuted_block(inputs, FAST, torch.tensor(order))), targets))
        for order in itertools.permutations(range(5))
    ]
    found = float(block_randomized(model, inputs, targets, FAST, repeats=4000))
    deviation = float(torch.tensor(every).std()) / 4000**0.5
    assert found == pytest.approx(sum(every) / len(every), abs=3.3 * deviation)  # beyond by chance once in a thousand


def test_a_network_that_ignores_the_block_loses_nothing_and_one_that_reads_it_alone_all():
    inputs, targets, _ = two_blocks(4000)
    assert block_randomized(reads_slow, inputs, targets, FAST) == 1
    chance = float(block_randomized(reads_fast, inputs, targets, FAST, repeats=5))
    assert chance == pytest.approx(0.25, abs=0.02)  # 3 deviations of 4,000 coins are 0.02
    auc = block_randomized(lambda x: x[:, 4:6], inputs, (targets == 1).long(), FAST, measure=binary_auc, repeats=5)
    assert float(auc) == pytest.approx(0.5, abs=0.03)


def test_the_global_random_numbers_stay_and_the_seed_decides():
    inputs, targets, _ = two_blocks(50)
    before = torch.get_rng_state()
    first = block_randomized(reads_fast, inputs, targets, FAST, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == block_randomized(reads_fast, inputs, targets, FAST, seed=1)
    assert not first.requires_grad


def test_reliance_of_two_classes_is_the_mean_product_of_signs():
    generator = torch.Generator().manual_seed(0)
    predictions, feature = torch.randint(2, (2, 60), generator=generator)
    signs = (2 * predictions - 1) * (2 * feature - 1)
    assert float(feature_reliance(predictions, feature, 2)) == pytest.approx(float(signs.double().mean()))


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_reliance_on_a_crossed_probe(num_classes):
    core = torch.arange(num_classes).repeat(num_classes)
    shortcut = torch.arange(num_classes).repeat_interleave(num_classes)
    assert feature_reliance(shortcut, shortcut, num_classes) == 1
    assert float(feature_reliance(core, shortcut, num_classes)) == pytest.approx(0, abs=1e-12)
    avoided = feature_reliance((shortcut + 1) % num_classes, shortcut, num_classes)
    assert float(avoided) == pytest.approx(-1 / (num_classes - 1))


def test_bias_is_what_goes_beyond_the_best_classifier():
    core, shortcut = torch.arange(4).repeat(4), torch.arange(4).repeat_interleave(4)
    assert shortcut_bias(core, core, shortcut, 4) == 0
    assert float(shortcut_bias(shortcut, core, shortcut, 4)) == pytest.approx(1)
    assert float(shortcut_bias(core, shortcut, shortcut, 4)) == pytest.approx(-1)


def test_slow_accuracy_counts_where_the_fast_feature_does_not_help():
    inputs, targets, shown = two_blocks()
    agrees = shown == targets
    slow, fast = reads_slow(inputs).argmax(1), reads_fast(inputs).argmax(1)
    assert slow_feature_accuracy(slow, targets, agrees) == 1
    assert slow_feature_accuracy(fast, targets, agrees) == 0
    mixed = torch.where(torch.arange(400) % 2 == 0, slow, fast)
    right = [int(mixed[i] == targets[i]) for i in range(400) if not agrees[i]]
    assert float(slow_feature_accuracy(mixed, targets, agrees)) == pytest.approx(sum(right) / len(right))
    assert slow_feature_accuracy(slow, targets, torch.ones(400, dtype=torch.bool)).isnan()


def test_quality_of_a_selection_by_counting():
    generator = torch.Generator().manual_seed(0)
    selected, wanted = torch.rand(2, 50, generator=generator) < 0.4
    found = selection_quality(selected, wanted)
    both = sum(a and b for a, b in zip(selected.tolist(), wanted.tolist(), strict=True))
    assert [float(value) for value in found] == pytest.approx(
        [sum(selected.tolist()) / 50, both / sum(selected.tolist()), both / sum(wanted.tolist())]
    )
    nothing = selection_quality(torch.zeros(50, dtype=torch.bool), wanted)
    assert nothing.share == 0
    assert nothing.precision.isnan()
    assert nothing.recall == 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: accuracy(torch.zeros(4), torch.zeros(4).long()), r"outputs must be \(N, C\), got \(4,\)"),
        (lambda: accuracy(torch.zeros(4, 2), torch.zeros(3).long()), r"targets must be \(N,\) with N = 4, got \(3,\)"),
        (lambda: binary_auc(torch.zeros(4, 3), torch.zeros(4)), "with more classes take the accuracy"),
        (lambda: binary_auc(torch.zeros(3), torch.tensor([0, 1, 2])), "targets 0 or 1"),
        (lambda: permuted_block(torch.zeros(3, 2), torch.ones(2), torch.arange(3)), "block must be bool"),
        (lambda: permuted_block(torch.zeros(3, 2), torch.ones(2).bool(), torch.arange(2)), "one index for each"),
        (
            lambda: block_randomized(reads_slow, *two_blocks(4)[:2], FAST, repeats=0),
            "repeats=0 must be at least 1",
        ),
        (lambda: feature_reliance(torch.zeros(3).long(), torch.zeros(3).long(), 1), "num_classes=1"),
        (lambda: feature_reliance(torch.zeros(3), torch.zeros(3).long(), 2), "take the argmax"),
        (
            lambda: slow_feature_accuracy(torch.zeros(3).long(), torch.zeros(3).long(), torch.ones(3)),
            "fast_agrees must be bool",
        ),
        (lambda: selection_quality(torch.ones(3), torch.ones(3).bool()), "must be bool of one shape"),
    ],
)
def test_bad_input_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()
