import json

import pytest
import torch

from lightning_feat.data import BaseToNovelDataModule, write_example_folder

pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return write_example_folder(root, num_classes=5, train_images=6, val_images=3, image_size=24)


def ready(folder, **options):
    data = BaseToNovelDataModule(folder, **{"shots": 2, "image_size": 16, **options})
    data.setup()
    return data


def test_training_sees_few_images_of_the_first_half(folder):
    data = ready(folder)
    targets = [data.train_set.targets[row] for row in data.few_set.indices]
    assert targets == [0, 0, 1, 1, 2, 2]
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 16, 16)


def test_shots_depend_on_the_seed_alone(folder):
    first, again, other = (ready(folder, seed=seed).few_set.indices for seed in (0, 0, 1))
    assert first == again != other
    more = ready(folder, shots=3).few_set.indices
    assert set(first) < set(more)  # more shots are the same ones and others


def test_both_halves_are_tested_each_from_class_zero(folder):
    data = ready(folder)
    base, novel = ([t for _, targets in loader for t in targets.tolist()] for loader in data.test_dataloader())
    assert base == [0] * 3 + [1] * 3 + [2] * 3
    assert novel == [0] * 3 + [1] * 3
    assert [t for _, targets in data.val_dataloader() for t in targets.tolist()] == base
    image, target = data.novel_test_set[0]
    assert torch.equal(image, data.test_set[9][0])
    assert target == 0


def test_names_are_the_folders_or_those_of_a_file(folder, tmp_path):
    assert ready(folder).novel_class_names == ["class 3", "class 4"]
    path = tmp_path / "names.json"
    path.write_text(json.dumps({f"class_{c}": f"animal {c}" for c in range(5)}))
    assert ready(folder, names=str(path)).class_names == ["animal 0", "animal 1", "animal 2"]
    path.write_text("{}")
    with pytest.raises(ValueError, match="no name for 5 classes, 'class_0' for one"):
        ready(folder, names=str(path))


def test_too_few_classes_or_shots_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="shots=0"):
        BaseToNovelDataModule(folder, shots=0)
    with pytest.raises(ValueError, match="has 3 classes, but two base and two novel"):
        ready(write_example_folder(tmp_path))
