"""On files of a few images in the published formats, written by hand."""

import os
import pickle
import struct

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from lightning_feat.baselines import MLPClassifier
from lightning_feat.data.cifar import CifarDataModule, CifarPart, shift
from lightning_feat.data.cifar_files import read_cifar, write_example_cifar
from tests.helpers import trainer

TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))


def pixels(seed, size):
    return np.random.default_rng(seed).integers(0, 256, (size, 3072), dtype=np.uint8)


def python_2_pickle(images, **columns):
    """What Python 2 wrote, by its opcodes: today's pickle cannot write its strings."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def number(value):
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)

    raw = images.tobytes("A")
    kind = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    kind += b"(K\x03" + text(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01" + b"".join(map(number, images.shape)) + b"\x86" + kind
    array += (b"\x88" if images.flags.f_contiguous else b"\x89") + b"T" + struct.pack("<I", len(raw)) + raw + b"tb"
    body = text(b"data") + array + text(b"batch_label") + text(b"one of five")
    for name, values in columns.items():
        body += text(name.encode()) + b"](" + b"".join(map(number, values)) + b"e"
    return b"\x80\x02}(" + body + b"u."


def write_cifar10(root, each=4, write=python_2_pickle):
    """Six files of ``each`` images; returns all of them and their targets."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    images, targets = pixels(0, 6 * each), np.arange(6 * each) % 10
    for i, name in enumerate((*TRAIN, "test_batch")):
        mine = slice(i * each, (i + 1) * each)
        (folder / name).write_bytes(write(images[mine], labels=targets[mine].tolist()))
    return torch.tensor(images).view(-1, 3, 32, 32), torch.tensor(targets)


def new_pickle(images, labels):
    return pickle.dumps({b"data": images, b"labels": labels}, protocol=4)


def by_columns(images, labels):
    return python_2_pickle(np.asfortranarray(images), labels=labels)


@pytest.mark.parametrize("write", [python_2_pickle, new_pickle, by_columns])
def test_python_version_is_read_in_the_published_order(tmp_path, write):
    images, targets = write_cifar10(tmp_path, write=write)
    train, test = read_cifar(tmp_path)
    for found, expected in ((train, slice(0, 20)), (test, slice(20, 24))):
        assert torch.equal(found[0], images[expected])
        assert torch.equal(found[1], targets[expected])


def test_binary_version_is_read_alike(tmp_path):
    images, targets = write_cifar10(tmp_path / "python")
    folder = tmp_path / "binary" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for i, name in enumerate((*TRAIN, "test_batch")):
        mine = range(4 * i, 4 * i + 4)
        rows = (bytes([int(targets[k])]) + images[k].numpy().tobytes() for k in mine)
        (folder / f"{name}.bin").write_bytes(b"".join(rows))
    for one, other in zip(read_cifar(tmp_path / "python"), read_cifar(tmp_path / "binary"), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("version", ["python", "binary"])
def test_of_cifar100_the_fine_targets_are_taken(tmp_path, version):
    folder = tmp_path / f"cifar-100-{version}"
    folder.mkdir()
    images, fine, coarse = pixels(0, 3), [99, 7, 40], [1, 2, 3]
    for name in ("train", "test"):
        if version == "python":
            (folder / name).write_bytes(python_2_pickle(images, coarse_labels=coarse, fine_labels=fine))
        else:
            rows = (bytes([c, f]) + row.tobytes() for c, f, row in zip(coarse, fine, images, strict=True))
            (folder / f"{name}.bin").write_bytes(b"".join(rows))
    for found, targets in read_cifar(tmp_path, "cifar100"):
        assert torch.equal(found, torch.tensor(images).view(-1, 3, 32, 32))
        assert targets.tolist() == fine


def test_root_may_be_the_folder_itself(tmp_path):
    images, _ = write_cifar10(tmp_path)
    assert torch.equal(read_cifar(tmp_path / "cifar-10-batches-py")[1][0], images[20:])


class Evil:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("call", "name"),
    [(os.mkdir, r"(posix|nt)\.mkdir"), (eval, r"(builtins|__builtin__)\.eval"), (np.load, r"numpy.*\.load")],
)
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, call, name, protocol):
    write_cifar10(tmp_path)
    harm = tmp_path / "harm"
    argument = f"__import__('os').mkdir({str(harm)!r})" if call is eval else str(harm)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(pickle.dumps({"data": Evil(call, argument), "labels": [1]}, protocol=protocol))
    with pytest.raises(ValueError, match=rf"data_batch_3 is no file .* asks for {name}"):
        read_cifar(tmp_path)
    assert not harm.exists()


def test_what_numpy_would_unpickle_is_refused_too(tmp_path):
    """Arrays of objects hold references, which a forged file could set at will."""
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(new_pickle(np.array([None, 1], dtype=object), [1, 2]))
    with pytest.raises(ValueError, match="an array of 'O8', not of bytes"):
        read_cifar(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no file of the python version"),
        (python_2_pickle(pixels(0, 2), labels=[1, 2])[:-900], "is no file of the python version"),
        (pickle.dumps([1, 2]), "is no file of the python version"),
        (python_2_pickle(pixels(0, 2), fine_labels=[1, 2]), "no file of the python version of CIFAR-10 .'labels'"),
        (python_2_pickle(pixels(0, 2), labels=[1]), r"must hold images \(N, 3072\) and N targets, got \(2, 3072\)"),
        (python_2_pickle(pixels(0, 2), labels=[1, 10]), "targets from 1 to 10, and CIFAR-10 has 10 classes"),
        (python_2_pickle(pixels(0, 2)[:, :99], labels=[1, 2]), r"must hold images \(N, 3072\)"),
    ],
)
def test_a_broken_python_file_is_named(tmp_path, content, message):
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_2 .*{message}|data_batch_2 {message}"):
        read_cifar(tmp_path)


def test_a_binary_file_that_is_cut_off_is_named(tmp_path):
    write_example_cifar(tmp_path, "cifar100")
    path = tmp_path / "cifar-100-binary" / "test.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"test\.bin has 61479 bytes, .* multiple of 3074"):
        read_cifar(tmp_path, "cifar100")


def test_missing_files_are_listed_with_where_to_get_them(tmp_path):
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-py has no data_batch_4\. .* University of Toronto"):
        read_cifar(tmp_path)
    with pytest.raises(FileNotFoundError, match="cifar-100-python has no train, test"):
        CifarDataModule(tmp_path, "cifar100").setup()


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """200 training and 20 test images."""
    return write_example_cifar(tmp_path_factory.mktemp("cifar"))


def ready(root, **arguments):
    data = CifarDataModule(root, **arguments)
    data.setup()
    return data


def test_batch_has_the_shapes_and_dtypes_promised(example):
    images, targets = next(iter(ready(example, batch_size=5).train_dataloader()))
    assert (images.shape, images.dtype) == ((5, 3, 32, 32), torch.float32)
    assert (targets.shape, targets.dtype) == ((5,), torch.int64)


def test_images_without_augmentation_are_the_pixels_standardised(example):
    data = ready(example, batch_size=7)
    (images, targets), _ = read_cifar(example)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    batches = list(data.clean_train_dataloader())
    torch.testing.assert_close(torch.cat([b[0] for b in batches]) * std + mean, images / 255)
    assert torch.equal(torch.cat([b[1] for b in batches]), targets)


def shifted_by_hand(image, padding):
    """All crops of the padded image, and their mirror images."""
    padded = torch.nn.functional.pad(image, (padding,) * 4)
    places = [(y, x) for y in range(2 * padding + 1) for x in range(2 * padding + 1)]
    crops = [padded[:, y : y + 32, x : x + 32] for y, x in places]
    return crops + [crop.flip(2) for crop in crops]


def plain(images, **arguments):
    return CifarPart(images, torch.zeros(len(images), dtype=torch.long), (0.0,) * 3, (1.0,) * 3, **arguments)


def test_every_shift_and_mirror_image_comes_and_nothing_else():
    torch.manual_seed(0)
    image = torch.tensor(pixels(0, 1)).view(1, 3, 32, 32)
    part = plain(image, padding=1, flip=True)
    seen = {(255 * x).round().byte().numpy().tobytes() for x, _ in part.__getitems__([0] * 300)}
    # Of 18 variants one stays away with probability 18 (17/18)^300 < 1e-6.
    assert seen == {crop.numpy().tobytes() for crop in shifted_by_hand(image[0], 1)}


def test_shifts_are_uniform_by_example():
    torch.manual_seed(0)
    dots = torch.zeros(8000, 1, 9, 9, dtype=torch.uint8)
    dots[:, :, 4, 4] = 1
    counts = shift(dots, 2).sum(0)[0, 2:7, 2:7].double()
    assert counts.sum() == 8000
    chi_square = ((counts - 320) ** 2 / 320).sum()
    assert chi_square < 51.2  # 99.9 % quantile of chi-square with 24 degrees of freedom


def test_copies_in_one_batch_are_augmented_apart_and_the_seed_repeats_them(example):
    part = ready(example).train_set
    torch.manual_seed(0)
    first, second = Subset(part, [3, 3]).__getitems__([0, 1])
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(0)
    assert torch.equal(part.__getitems__([3, 3])[0][0], first[0])


def test_training_is_augmented_and_shuffled_and_the_rest_is_not(example):
    data = ready(example, batch_size=200)
    torch.manual_seed(0)
    images, targets = next(iter(data.train_dataloader()))
    assert not torch.equal(targets, data.train_set.targets)
    assert not torch.equal(images.sum((1, 2, 3)).sort().values, clean(data)[0].sum((1, 2, 3)).sort().values)
    assert torch.equal(next(iter(data.test_dataloader()))[1], data.test_set.targets)
    assert torch.equal(data.test_set[0][0], data.test_set[0][0])


def clean(data):
    return next(iter(data.clean_train_dataloader()))


def test_workers_bring_the_same_clean_images(example):
    first, second = (clean(ready(example, num_workers=n)) for n in (0, 1))
    assert torch.equal(first[0], second[0])


def test_by_default_all_images_are_for_training_and_none_for_validation(example):
    data = ready(example)
    assert len(data.train_set) == 200
    assert data.val_dataloader() == []


def test_validation_takes_its_share_of_every_class_by_seed(example):
    data = ready(example, val_fraction=0.25)
    assert data.val_set.targets.bincount().tolist() == [5] * 10
    assert torch.cat([data.train_indices, data.val_indices]).sort().values.tolist() == list(range(200))
    (images, targets), _ = read_cifar(example)
    assert torch.equal(data.val_set.images, images[data.val_indices])
    assert torch.equal(data.train_set.targets, targets[data.train_indices])
    assert torch.equal(ready(example, val_fraction=0.25).val_indices, data.val_indices)
    assert not torch.equal(ready(example, val_fraction=0.25, seed=1).val_indices, data.val_indices)


def test_images_are_kept_once_and_as_bytes(example):
    data = ready(example)
    assert data.train_set.images.dtype == torch.uint8
    assert data.train_set.without_augmentation().images.data_ptr() == data.train_set.images.data_ptr()


def test_files_are_read_once(example, monkeypatch):
    data = ready(example)
    monkeypatch.setattr("lightning_feat.data.cifar.read_cifar", None)
    data.setup("test")
    assert len(data.test_set) == 20


def test_a_part_can_be_walked_and_ends(example):
    part = ready(example).test_set
    assert [target for _, target in part] == part.targets.tolist()


def test_a_run_without_validation_images(example, tmp_path):
    module, data = MLPClassifier(3072, 10), CifarDataModule(example)
    run = trainer(tmp_path, num_sanity_val_steps=2)
    run.fit(module, data)
    assert run.test(module, data, verbose=False)[0]["test/accuracy"] >= 0
    assert sum(len(batch) for batch in run.predict(module, data)) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cifar-10"}, "name='cifar-10'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"padding": 33}, "padding=33"),
        ({"val_fraction": 1.0}, r"val_fraction=1\.0"),
    ],
)
def test_bad_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        CifarDataModule("cifar", **arguments)


def test_a_split_that_leaves_a_class_empty_is_refused(tmp_path):
    write_cifar10(tmp_path)  # two images of each class
    with pytest.raises(ValueError, match=r"val_fraction=0\.9 leaves class 0 without training images"):
        ready(tmp_path, val_fraction=0.9)
