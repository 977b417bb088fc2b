import sys
from hashlib import sha256

import pytest
import torch
from torch.nn.functional import interpolate

from lightning_feat.baselines import MLPClassifier
from lightning_feat.data import DigitsDataModule
from lightning_feat.data.digits import PIXEL_MEAN, PIXEL_STD, load_digits
from tests.helpers import trainer

pytest.importorskip("sklearn")


def ready(**arguments):
    data = DigitsDataModule(**arguments)
    data.setup()
    return data


def checksum(indices):
    return sha256(",".join(map(str, indices.tolist())).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("arguments", "train", "val", "test"),
    [
        ({}, "e6f4d00e2e2e6a8f", "99d971d19512be90", "03c06296422010ed"),
        ({"seed": 1}, "e0ad6838e7448608", "a34b9f15d1bb7d69", "34638c973cec6c45"),
        ({"imbalance_factor": 10.0}, "b15e9061e4d5b4b7", "99d971d19512be90", "03c06296422010ed"),
        ({"train_per_class": 16}, "6c1c31186d8465f4", "99d971d19512be90", "03c06296422010ed"),
    ],
)
def test_split_is_the_same_on_every_machine(arguments, train, val, test):
    data = ready(**arguments)
    assert [checksum(part) for part in (data.train_indices, data.val_indices, data.test_indices)] == [train, val, test]


def test_parts_are_disjoint_and_together_all_digits():
    data = ready()
    everything = torch.cat([data.train_indices, data.val_indices, data.test_indices])
    assert everything.sort().values.tolist() == list(range(1797))


def test_every_part_has_its_share_of_every_class():
    data, counts = ready(val_fraction=0.1, test_fraction=0.3), load_digits()[1].bincount()
    assert data.val_set.targets.bincount().tolist() == [round(0.1 * n) for n in counts.tolist()]
    assert data.test_set.targets.bincount().tolist() == [round(0.3 * n) for n in counts.tolist()]


def test_other_settings_leave_the_test_part_alone():
    other = ready(val_fraction=0.5, train_per_class=3, imbalance_factor=2, label_noise=0.5)
    assert torch.equal(other.test_indices, ready().test_indices)


def test_fewer_shots_are_a_part_of_more_shots():
    few, more = ready(train_per_class=4), ready(train_per_class=16)
    assert few.train_set.targets.bincount().tolist() == [4] * 10
    assert set(few.train_indices.tolist()) < set(more.train_indices.tolist())


@pytest.mark.parametrize("factor", [2.0, 10.0, 50.0])
def test_class_sizes_fall_exponentially(factor):
    counts = ready(train_per_class=100, imbalance_factor=factor).train_set.targets.bincount().double()
    expected = 100 * factor ** (-torch.arange(10, dtype=torch.float64) / 9)
    torch.testing.assert_close(counts, expected, atol=0.5, rtol=0)  # whole images: half of one at most
    assert counts[0] == 100
    assert counts[9] == 100 / factor


def test_label_noise_replaces_its_share_of_training_targets_and_no_others():
    data = ready(label_noise=0.25)
    wrong = data.train_set.targets != data.train_set.clean_targets
    assert wrong.sum() == round(0.25 * len(data.train_set))
    _, targets = load_digits()
    assert torch.equal(data.train_set.clean_targets, targets[data.train_indices])
    assert torch.equal(data.val_set.targets, targets[data.val_indices])
    assert torch.equal(data.test_set.targets, targets[data.test_indices])


def test_wrong_labels_are_uniform_over_the_other_classes():
    part = ready(label_noise=1.0).train_set
    steps = ((part.targets - part.clean_targets) % 10).bincount(minlength=10)
    assert steps[0] == 0
    chi_square = ((steps[1:] - len(part) / 9) ** 2 / (len(part) / 9)).sum()
    assert chi_square < 26.1  # 99.9 % quantile of chi-square with 8 degrees of freedom


def test_batch_has_the_shapes_and_dtypes_promised():
    images, targets = next(iter(ready(batch_size=5, image_size=12, channels=3).train_dataloader()))
    assert (images.shape, images.dtype) == ((5, 3, 12, 12), torch.float32)
    assert (targets.shape, targets.dtype) == ((5,), torch.int64)
    assert torch.equal(images[:, 0], images[:, 2])


def test_images_are_the_digits_enlarged_and_standardised():
    data = ready(image_size=20)
    raw, targets = load_digits()
    one = raw[data.val_indices[7]][None, None]
    enlarged = interpolate(one, size=(20, 20), mode="bilinear", align_corners=False)[0]
    image, target = data.val_set[7]
    torch.testing.assert_close(image, (enlarged - PIXEL_MEAN) / PIXEL_STD)
    assert target == targets[data.val_indices[7]]


def test_constants_are_mean_and_deviation_of_all_pixels():
    images, _ = load_digits()
    assert images.mean().item() == pytest.approx(PIXEL_MEAN, abs=5e-6)  # the constants have five digits
    assert images.std().item() == pytest.approx(PIXEL_STD, abs=5e-6)


def test_index_says_which_digit_it_is():
    data = ready(return_index=True, batch_size=50)
    images, targets, indices = next(iter(data.train_dataloader()))
    raw, all_targets = load_digits()
    torch.testing.assert_close(images[:, 0], (raw[data.train_indices[indices]] - PIXEL_MEAN) / PIXEL_STD)
    assert torch.equal(targets, all_targets[data.train_indices[indices]])


def test_workers_bring_the_same_batches():
    first, second = (next(iter(ready(num_workers=n).val_dataloader())) for n in (0, 1))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_training_batches_are_shuffled_and_the_others_are_not():
    data = ready(batch_size=2000)
    torch.manual_seed(0)
    assert not torch.equal(next(iter(data.train_dataloader()))[1], data.train_set.targets)
    assert torch.equal(next(iter(data.val_dataloader()))[1], data.val_set.targets)


def test_a_part_can_be_walked_and_ends():
    part = ready(train_per_class=1).train_set
    assert [target for _, target in part] == part.targets.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"test_fraction": -0.1}, "test_fraction=-0.1"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "nothing to train on"),
        ({"train_per_class": 0}, "train_per_class=0"),
        ({"imbalance_factor": 0.1}, "imbalance_factor=0.1"),
        ({"label_noise": 1.5}, "label_noise=1.5"),
        ({"image_size": 0}, "image_size=0"),
        ({"channels": 2}, "channels=2"),
        ({"num_workers": -1}, "num_workers=-1"),
    ],
)
def test_bad_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_per_class": 105}, "smallest class has 104 training images"),
        ({"imbalance_factor": 1000.0}, "leaves class 9 without any"),
        ({"val_fraction": 0.5, "test_fraction": 0.499}, "leave a class without training images"),
    ],
)
def test_a_wish_the_data_cannot_fulfil_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ready(**arguments)


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-feat\[recipes\]"'):
        ready()


@pytest.mark.parametrize("options", [{"overfit_batches": 2}, {}])
def test_lightning_can_make_its_loaders_anew(tmp_path, options):
    """As it does for predict, for several processes and for overfit_batches."""
    module, data = MLPClassifier(64, 10), DigitsDataModule(batch_size=32)
    run = trainer(tmp_path, **options)
    run.fit(module, data)
    assert sum(len(batch) for batch in run.predict(module, data)) == len(data.test_set)
