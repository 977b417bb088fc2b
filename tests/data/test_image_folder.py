import shutil

import pytest
import torch
from lightning import Trainer
from PIL import Image

from lightning_feat.baselines import TimmClassifier
from lightning_feat.data import ImageFolderDataModule, write_example_folder
from lightning_feat.data.image_folder import IMAGENET_MEAN, IMAGENET_STD

pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_example_folder(tmp_path_factory.mktemp("images"), num_classes=3, train_images=5, val_images=2)


@pytest.fixture
def own_folder(folder, tmp_path):
    """A copy, to be spoilt."""
    return shutil.copytree(folder, tmp_path / "images")


def ready(root, stage=None, **arguments):
    data = ImageFolderDataModule(root, **{"image_size": 32, **arguments})
    data.setup(stage)
    return data


def test_batch_has_the_shapes_and_dtypes_promised(folder):
    images, targets = next(iter(ready(folder, batch_size=4).train_dataloader()))
    assert (images.shape, images.dtype) == ((4, 3, 32, 32), torch.float32)
    assert (targets.shape, targets.dtype) == ((4,), torch.int64)


def test_classes_are_the_sorted_folders_and_number_the_targets(folder):
    data = ready(folder)
    assert data.classes == ["class_0", "class_1", "class_2"]
    assert data.train_set.targets == [0] * 5 + [1] * 5 + [2] * 5


def test_example_folders_sort_as_their_numbers_do(tmp_path):
    write_example_folder(tmp_path, num_classes=11, train_images=1, val_images=1, image_size=8)
    assert ready(tmp_path).classes == [f"class_{target:02d}" for target in range(11)]


def test_targets_of_a_part_without_some_class_are_those_of_training(own_folder):
    shutil.rmtree(own_folder / "val" / "class_1")
    data = ready(own_folder)
    assert data.val_set.targets == [0, 0, 2, 2]
    assert [target for _, target in data.val_set] == [0, 0, 2, 2]


def test_validation_image_is_resized_cut_from_the_middle_and_standardised(tmp_path):
    # Left half black, right half white, and wider than high: the cut keeps the middle.
    for part in ("train", "val"):
        (tmp_path / part / "only").mkdir(parents=True)
        image = Image.new("RGB", (160, 80))
        image.paste((255, 255, 255), (80, 0, 160, 80))
        image.save(tmp_path / part / "only" / "0.png")
    image, _ = ready(tmp_path, crop_pct=0.5).val_set[0]  # 80 high resized to 64, then 32 x 32 of the middle
    pixels = image * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    # Two columns on either side of the edge are left out: resizing blurs them.
    torch.testing.assert_close(pixels[:, :, :14], torch.zeros(3, 32, 14), atol=1e-6, rtol=0)  # rounding
    torch.testing.assert_close(pixels[:, :, 18:], torch.ones(3, 32, 14), atol=1e-6, rtol=0)


def test_training_images_vary_and_validation_images_do_not(folder):
    data = ready(folder)
    assert not torch.equal(data.train_set[0][0], data.train_set[0][0])
    assert torch.equal(data.val_set[0][0], data.val_set[0][0])


@pytest.mark.parametrize(
    "arguments",
    [{"color_jitter": 0.4}, {"auto_augment": "rand-m9-mstd0.5-inc1"}, {"auto_augment": "3a", "color_jitter": 0.3}],
)
def test_augmentations_that_the_recipes_name_give_images(folder, arguments):
    data = ready(folder, interpolation="bicubic", random_erasing=0.25, **arguments)
    assert next(iter(data.train_dataloader()))[0].isfinite().all()


def test_random_erasing_is_applied(folder):
    torch.manual_seed(0)
    plain, erased = (ready(folder, min_scale=1.0, random_erasing=p).train_set[0][0] for p in (0.0, 1.0))
    assert erased.abs().max() > plain.abs().max()  # noise of unit variance in standardised pixels leaves their range


@pytest.mark.parametrize(("batch_size", "batches"), [(4, 3), (15, 1), (20, 1)])
def test_last_training_batch_is_dropped_if_small_unless_it_is_the_only_one(folder, batch_size, batches):
    assert len(ready(folder, batch_size=batch_size).train_dataloader()) == batches


def test_test_part_is_validation_unless_another_is_named(own_folder):
    assert ready(own_folder, "test").test_set.samples == ready(own_folder).val_set.samples
    shutil.copytree(own_folder / "val" / "class_0", own_folder / "held_out" / "class_0")
    assert len(ready(own_folder, "test", test_folder="held_out").test_set) == 2


def test_test_stage_does_not_need_a_validation_part(own_folder):
    (own_folder / "val").rename(own_folder / "held_out")
    data = ready(own_folder, "test", test_folder="held_out")
    assert len(next(iter(data.test_dataloader()))[1]) == 6


def test_any_module_trains_and_is_tested_on_it(folder, tmp_path):
    trainer = Trainer(fast_dev_run=True, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False)
    module = TimmClassifier("test_resnet", num_classes=3)
    trainer.fit(module, datamodule=ImageFolderDataModule(folder, batch_size=4, image_size=32))
    trainer.test(module, datamodule=ImageFolderDataModule(folder, batch_size=4, image_size=32), verbose=False)
    assert "test/accuracy" in trainer.callback_metrics


def test_missing_part_is_refused_by_its_path(own_folder):
    shutil.rmtree(own_folder / "val")
    with pytest.raises(ValueError, match="needs one named 'val'"):
        ready(own_folder)


def test_part_without_class_folders_is_refused(own_folder):
    shutil.rmtree(own_folder / "train")
    (own_folder / "train").mkdir()
    with pytest.raises(ValueError, match=r"needs a folder for each class"):
        ready(own_folder)


def test_class_without_training_images_is_refused(own_folder):
    shutil.copytree(own_folder / "val" / "class_0", own_folder / "val" / "unheard_of")
    with pytest.raises(ValueError, match="'unheard_of' for one"):
        ready(own_folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"image_size": 0}, "image_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"crop_pct": 0.0}, r"crop_pct=0\.0"),
        ({"min_scale": 2.0}, r"min_scale=2\.0"),
        ({"color_jitter": -0.1}, r"color_jitter=-0\.1"),
        ({"random_erasing": 1.1}, r"random_erasing=1\.1"),
        ({"interpolation": "cubic"}, "'cubic'"),
        ({"mean": [0.5]}, "three numbers each"),
        ({"std": [0.5, 0.5, 0.0]}, "positive"),
    ],
)
def test_bad_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageFolderDataModule(".", **arguments)
