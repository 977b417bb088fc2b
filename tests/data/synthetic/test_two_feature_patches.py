import pytest
import torch

from lightning_feat.baselines.cubic_cnn import CubicCNN
from lightning_feat.data.synthetic.two_feature_patches import (
    FAST_AXIS,
    SLOW_AXIS,
    TwoFeaturePatchesDataModule,
    two_feature_patches,
)
from tests.helpers import trainer


def ready(**arguments):
    data = TwoFeaturePatchesDataModule(**arguments)
    data.setup()
    return data


def along(patches, axis):
    """The product of each patch with a feature, and how many patches have one."""
    product = patches[:, :, axis]
    return product.sum(1), (product != 0).sum(1)


def test_the_slow_feature_is_in_one_patch_of_every_example():
    patches, targets, _ = two_feature_patches(500, slow_strength=0.2)
    product, count = along(patches, SLOW_AXIS)
    torch.testing.assert_close(product, 0.2 * (2.0 * targets - 1))
    assert (count == 1).all()


def test_the_fast_feature_is_in_one_patch_of_those_that_have_it():
    patches, targets, has_fast = two_feature_patches(500, fast_strength=1.5, fast_share=0.6)
    product, count = along(patches, FAST_AXIS)
    torch.testing.assert_close(product, 1.5 * (2.0 * targets - 1) * has_fast)
    assert torch.equal(count, has_fast.long())


def test_the_other_patches_are_noise_of_the_stated_deviation_orthogonal_to_both_features():
    patches, _, has_fast = two_feature_patches(2000, num_patches=5, patch_size=20, noise=0.3)
    features = torch.eye(20)[[SLOW_AXIS, FAST_AXIS]]
    is_noise = (patches @ features.T == 0).all(2) & (patches != 0).any(2)
    # three noise patches in each, and none where the fast feature is missing: that patch is zero
    assert (is_noise.sum(1) == 3).all()
    assert ((patches == 0).all(2).sum(1) == (~has_fast).long()).all()
    noise = patches[is_noise][:, 2:]
    # 108,000 numbers: five standard errors of a deviation are 5 / sqrt(2 * 108000) of it
    assert noise.std() == pytest.approx(0.3, rel=0.011)
    assert abs(float(noise.mean())) < 5 * 0.3 / 108000**0.5


def test_shares_of_classes_features_and_places():
    patches, targets, has_fast = two_feature_patches(20000, fast_share=0.9, patch_size=4)
    place = (patches[:, :, SLOW_AXIS] != 0).long().argmax(1)
    # five standard errors of a share
    assert targets.double().mean() == pytest.approx(0.5, abs=5 * (0.25 / 20000) ** 0.5)
    assert has_fast.double().mean() == pytest.approx(0.9, abs=5 * (0.09 / 20000) ** 0.5)
    for patch in range(3):
        assert (place == patch).double().mean() == pytest.approx(1 / 3, abs=5 * (2 / 9 / 20000) ** 0.5)
    # and none of them tells of another
    assert has_fast[targets == 0].double().mean() == pytest.approx(0.9, abs=5 * (0.09 / 9500) ** 0.5)


def test_a_seed_draws_the_same_again_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second, other = (two_feature_patches(50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.patches, other.patches)


def test_parts_of_the_datamodule_are_drawn_apart():
    data, again = ready(num_val=2000), ready(num_val=100, batch_size=7)
    parts = [data.train_set, data.val_set, data.test_set]
    assert torch.equal(data.train_set.patches, again.train_set.patches)  # whatever the size of another part
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert not torch.equal(parts[one].targets, parts[other].targets)
    assert not torch.equal(data.train_set.targets, ready(seed=1).train_set.targets)


def test_the_test_part_may_have_another_share():
    data = ready(test_fast_share=0.0, fast_share=0.7)
    assert not data.test_set.has_fast.any()
    assert 0.6 < float(data.val_set.has_fast.double().mean()) < 0.8


def test_batches_have_the_shapes_promised_and_the_index_leads_back():
    data = ready(batch_size=32, num_train=100, return_index=True, patch_size=6, num_patches=4)
    for patches, targets, indices in data.train_dataloader():
        assert patches.shape[1:] == (4, 6)
        assert torch.equal(patches, data.train_set.patches[indices])
        assert torch.equal(targets, data.train_set.targets[indices])
    assert len(list(data.train_set)) == 100


def test_only_training_batches_are_shuffled():
    data = ready(batch_size=50, num_train=50, num_val=50, num_test=50)
    for loader, part in ((data.val_dataloader(), data.val_set), (data.predict_dataloader(), data.test_set)):
        assert torch.equal(next(iter(loader))[0], part.patches)
    assert not torch.equal(next(iter(data.train_dataloader()))[0], data.train_set.patches)


def test_a_trainer_trains_on_it(tmp_path):
    data = TwoFeaturePatchesDataModule(batch_size=100, num_train=200, num_val=100)
    run = trainer(tmp_path)
    run.fit(CubicCNN(), data)
    assert run.global_step == 2
    assert "val/accuracy" in run.callback_metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_patches": 1}, "num_patches=1: each of the two features"),
        ({"patch_size": 2}, "patch_size=2"),
        ({"slow_strength": -0.1}, "slow_strength=-0.1"),
        ({"slow_strength": 2.0}, "slow_strength=2.0 is more than fast_strength=1.0"),
        ({"noise": float("inf")}, "noise=inf"),
        ({"fast_share": 1.1}, "fast_share=1.1"),
        ({"test_fast_share": -0.5}, "fast_share=-0.5"),
        ({"num_val": 0}, "num_val=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
    ],
)
def test_bad_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        TwoFeaturePatchesDataModule(**arguments)
    drawn = {name: value for name, value in arguments.items() if name in ("num_patches", "patch_size", "noise")}
    if drawn:
        with pytest.raises(ValueError, match=message):
            two_feature_patches(10, **drawn)


def test_no_examples_are_refused():
    with pytest.raises(ValueError, match="num_examples=0"):
        two_feature_patches(0)
