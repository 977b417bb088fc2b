"""On stand-ins: twelve "photographs" of each defect probability and cell type."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from lightning_feat.data import ElpvDataModule
from lightning_feat.data.elpv import PIXEL_MEAN, PIXEL_STD, load_elpv, shrink

EACH = 12


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """A package like the real one: its columns are views of an array of records, as there."""
    records = np.zeros(8 * EACH, dtype=[("path", "S19"), ("probability", "<f8"), ("type", "S4")])
    records["probability"] = np.repeat([0, 1 / 3, 2 / 3, 1], 2 * EACH)
    records["type"] = np.tile(np.repeat(["mono", "poly"], EACH), 4)
    images = np.random.default_rng(0).integers(0, 256, (8 * EACH, 300, 300), dtype=np.uint8)

    def load_dataset():
        return images, records["probability"], np.char.decode(records["type"])

    package, utils = ModuleType("elpv_dataset"), ModuleType("elpv_dataset.utils")
    utils.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "elpv_dataset", package)
    monkeypatch.setitem(sys.modules, "elpv_dataset.utils", utils)


def ready(**arguments):
    data = ElpvDataModule(**{"image_size": 20, **arguments})
    data.setup()
    return data


def test_columns_are_read():
    images, thirds, is_poly = load_elpv()
    assert (images.shape, images.dtype) == ((8 * EACH, 300, 300), torch.uint8)
    assert thirds.bincount().tolist() == [2 * EACH] * 4
    assert is_poly[: 2 * EACH].tolist() == [0] * EACH + [1] * EACH


def test_batch_has_the_shapes_and_dtypes_promised():
    images, targets = next(iter(ready(batch_size=5, channels=3).train_dataloader()))
    assert (images.shape, images.dtype) == ((5, 3, 20, 20), torch.float32)
    assert (targets.shape, targets.dtype) == ((5,), torch.int64)
    assert torch.equal(images[:, 0], images[:, 2])


def test_a_likely_defect_is_class_one_of_two():
    data, thirds = ready(), load_elpv()[1]
    assert torch.equal(data.test_set.targets, (thirds[data.test_indices] >= 2).long())


def test_four_classes_are_the_probabilities():
    data, thirds = ready(num_classes=4), load_elpv()[1]
    assert torch.equal(data.val_set.targets, thirds[data.val_indices])


def test_parts_are_disjoint_and_together_all():
    data = ready()
    everything = torch.cat([data.train_indices, data.val_indices, data.test_indices])
    assert everything.sort().values.tolist() == list(range(8 * EACH))


def test_every_part_has_its_share_of_every_probability_and_cell_type():
    data = ready(val_fraction=0.25, test_fraction=0.5)
    strata = torch.arange(8 * EACH) // EACH
    assert strata[data.val_indices].bincount().tolist() == [3] * 8
    assert strata[data.test_indices].bincount().tolist() == [6] * 8


def test_test_part_depends_on_its_seed_alone():
    assert torch.equal(ready(val_fraction=0.5, num_classes=4).test_indices, ready().test_indices)
    assert not torch.equal(ready(seed=1).test_indices, ready().test_indices)


def test_images_are_block_means_standardised():
    data = ready()
    photograph = load_elpv()[0][data.val_indices[3]].double()
    means = photograph.view(20, 15, 20, 15).mean((1, 3))
    # Kept as bytes: half a grey level is lost at most.
    torch.testing.assert_close(
        data.val_set[3][0][0].double() * PIXEL_STD + PIXEL_MEAN, means / 255, atol=0.5001 / 255, rtol=0
    )


def test_full_size_is_left_as_it_is():
    images = load_elpv()[0][:2]
    assert shrink(images, 300) is images


def test_training_images_are_mirrored_both_ways_and_the_others_are_not():
    torch.manual_seed(0)
    data = ready()
    plain = ready(flip=False).train_set[0][0]
    variants = {tuple(v.flatten().tolist()) for v in (plain, plain.flip(1), plain.flip(2), plain.flip(1, 2))}
    assert {tuple(data.train_set[0][0].flatten().tolist()) for _ in range(64)} == variants
    assert torch.equal(data.val_set[0][0], data.val_set[0][0])


def test_photographs_are_read_once(monkeypatch):
    data = ready()
    monkeypatch.setitem(sys.modules, "elpv_dataset.utils", None)
    data.setup("test")
    assert len(data.test_set) == 16  # round(0.2 * 12) of each of eight strata


def test_a_part_can_be_walked_and_ends():
    part = ready().test_set
    assert [target for _, target in part] == part.targets.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"num_classes": 3}, "num_classes=3"),
        ({"image_size": 301}, "image_size=301"),
        ({"channels": 2}, "channels=2"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "below 1"),
        ({"test_fraction": -0.1}, r"test_fraction=-0\.1"),
    ],
)
def test_bad_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        ElpvDataModule(**arguments)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "elpv_dataset.utils", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-feat\[elpv\]"'):
        ready()
