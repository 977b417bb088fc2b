import pickle

import pytest
import torch

from lightning_feat.baselines import MLPClassifier
from lightning_feat.data.synthetic.drawn import random_rotation
from lightning_feat.data.synthetic.slabs import SlabBlocksDataModule, block_classes, slab_blocks
from tests.helpers import trainer

N = 20_000
ERROR = 5 * (0.25 / N) ** 0.5  # five standard errors of a share


def ready(**arguments):
    data = SlabBlocksDataModule(**{"num_train": 200, "num_val": 100, "num_test": 100, **arguments})
    data.setup()
    return data


def best_threshold(values, targets):
    """The accuracy of the best single threshold, in either direction."""
    ordered = targets[values.argsort()].double()
    ones = torch.cat([torch.zeros(1), ordered.cumsum(0)])
    left = torch.arange(len(values) + 1)
    right_ones = ordered.sum() - ones
    accuracy = (left - ones + right_ones) / len(values)
    return float(torch.maximum(accuracy, 1 - accuracy).max())


@pytest.mark.parametrize("k", [2, 3, 4, 5, 7])
def test_slabs_tell_the_class_and_one_threshold_no_more_than_stated(k):
    _, targets, blocks, _ = slab_blocks(N, slabs=(k,))
    assert torch.equal(block_classes(blocks, (k,))[:, 0], targets)
    bound = 0.5 + (1 / (k + 1) if k % 2 else 1 / k)
    assert best_threshold(blocks[:, 0], targets) == pytest.approx(bound, abs=ERROR)


@pytest.mark.parametrize("k", [3, 5, 7])
def test_the_classes_of_an_odd_block_have_one_mean(k):
    _, targets, blocks, _ = slab_blocks(N, slabs=(k,))
    for label in (0, 1):
        assert abs(float(blocks[targets == label].mean())) < 5 / (N / 2) ** 0.5


def test_slabs_are_as_wide_and_as_far_apart_as_stated():
    _, _, blocks, _ = slab_blocks(N, slabs=(5,), gap=0.1)
    values = blocks[:, 0].sort().values
    jumps = (values[1:] - values[:-1] > 0.09).nonzero()[:, 0]
    edges = torch.stack([values[jumps], values[jumps + 1]], dim=1)
    expected = torch.tensor([[-1 + 0.32 * (j + 1) + 0.1 * j, -1 + 0.42 * (j + 1)] for j in range(4)])
    torch.testing.assert_close(edges, expected, atol=5e-3, rtol=0)  # the outermost of thousands in each slab
    assert values.abs().max() <= 1


def test_a_linear_block_has_a_margin():
    _, targets, blocks, _ = slab_blocks(1000, slabs=(2, 5), gap=0.3)
    assert ((2 * targets - 1) * blocks[:, 0]).min() >= 0.15 - 1e-6


def test_noise_lies_in_a_gap_tells_nothing_and_is_as_frequent_as_stated():
    _, targets, blocks, noisy = slab_blocks(N, slabs=(2, 5), noise=(0.2, 0.5))
    for column, share in enumerate((0.2, 0.5)):
        where = noisy[:, column]
        assert where.double().mean() == pytest.approx(share, abs=ERROR)
        right = (block_classes(blocks, (2, 5))[:, column] == targets).double()
        assert right[~where].min() == 1
        assert right.mean() == pytest.approx(1 - share / 2, abs=ERROR)
    assert blocks[noisy[:, 0], 0].abs().max() <= 0.05 + 1e-6


def test_blocks_are_independent_given_the_class():
    _, targets, blocks, _ = slab_blocks(N, slabs=(2, 3, 3))
    for label in (0, 1):
        correlations = torch.corrcoef(blocks[targets == label].T) - torch.eye(3)
        assert correlations.abs().max() < 5 / (N / 2) ** 0.5


def test_both_classes_are_as_likely():
    assert slab_blocks(N, slabs=(2,)).targets.double().mean() == pytest.approx(0.5, abs=ERROR)


def test_a_rotation_hides_the_blocks_and_loses_nothing():
    rotation = random_rotation(3, seed=1)
    inputs, _, blocks, _ = slab_blocks(50, slabs=(2, 3, 5), rotation=rotation)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3))
    torch.testing.assert_close(inputs @ rotation, blocks)
    assert (inputs - blocks).abs().max() > 0.1


@pytest.mark.parametrize("rotate", [False, True])
def test_an_exchange_moves_one_block_and_leaves_the_others(rotate):
    data = ready(slabs=(2, 3, 5), rotate=rotate)
    part = data.train_set
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
    exchange = pickle.loads(pickle.dumps(data.exchange(1)))
    moved = exchange(part.inputs, part.inputs[order])
    blocks = moved if data.rotation is None else moved @ data.rotation
    expected = part.latents.clone()
    expected[:, 1] = part.latents[order, 1]
    torch.testing.assert_close(blocks, expected)


def test_a_seed_draws_the_same_again_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second, other = (slab_blocks(50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.inputs, other.inputs)


def test_parts_are_drawn_apart_and_share_their_rotation():
    data, again = ready(rotate=True), ready(rotate=True, num_val=7, batch_size=3)
    assert torch.equal(data.train_set.inputs, again.train_set.inputs)
    assert not torch.equal(data.val_set.inputs, data.test_set.inputs)
    for part in (data.train_set, data.test_set):
        torch.testing.assert_close(part.inputs @ data.rotation, part.latents)
    assert not torch.equal(data.rotation, ready(rotate=True, seed=1).rotation)


def test_batches_have_the_shapes_promised_and_the_index_leads_back():
    data = ready(return_index=True, batch_size=32)
    for inputs, targets, indices in data.train_dataloader():
        assert torch.equal(inputs, data.train_set.inputs[indices])
        assert torch.equal(targets, data.train_set.targets[indices])


def test_a_trainer_trains_on_it(tmp_path):
    run = trainer(tmp_path)
    run.fit(MLPClassifier(5, 2), SlabBlocksDataModule(num_train=128, num_val=64))
    assert run.global_step == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slabs": ()}, "give at least one block"),
        ({"slabs": (2, 1)}, "2 slabs .linear. or more"),
        ({"gap": 0.5}, "from 0 to below 0.5"),
        ({"gap": -0.1}, "gap=-0.1"),
        ({"noise": 1.5}, "give a share in"),
        ({"noise": (0.1,)}, "or one for each"),
        ({"noise": 0.1, "gap": 0.0}, "but gap=0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    for make in (lambda: slab_blocks(10, **arguments), lambda: SlabBlocksDataModule(**arguments)):
        with pytest.raises(ValueError, match=message):
            make()


def test_sizes_blocks_and_rotations_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="draw at least one"):
        slab_blocks(0)
    with pytest.raises(ValueError, match="each part needs at least one"):
        SlabBlocksDataModule(num_test=0)
    with pytest.raises(ValueError, match=r"must be .5, 5."):
        slab_blocks(3, rotation=torch.eye(4))
    with pytest.raises(ValueError, match="there are 5 blocks"):
        ready().exchange(5)
