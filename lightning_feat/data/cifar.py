"""CIFAR-10 and CIFAR-100 from local files, in either of the two forms they are published in.

The python version is a pickle, and unpickling a file from somewhere may run any code in it. Here it runs none but this
file's: numpy's array and dtype, the only classes that such a file needs, have stand-ins that keep what they are given,
and any other name ends the reading. Augmentation draws from torch's global generator, which each worker has its own of.

Shapes: N images.
"""

import io
import pickle
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset

from lightning_feat.data.digits import by_hash

Name = Literal["cifar10", "cifar100"]


class _Files(NamedTuple):
    """How one data set is published."""

    title: str
    num_classes: int
    python_folder: str
    binary_folder: str
    train: tuple[str, ...]  # names in the python version; those of the binary one end in .bin
    test: str
    targets: str  # key in the python version
    label_bytes: int  # before each image of the binary version; the last one is the class
    mean: tuple[float, float, float]  # of the pixels of the training images, in [0, 1], and their deviation, as
    std: tuple[float, float, float]  # commonly published; not computed anew here


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_KNOWN: dict[str, _Files] = {
    "cifar10": _Files(
        "CIFAR-10", 10, "cifar-10-batches-py", "cifar-10-batches-bin", _BATCHES, "test_batch", "labels", 1,
        (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": _Files(
        "CIFAR-100", 100, "cifar-100-python", "cifar-100-binary", ("train",), "test", "fine_labels", 2,
        (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
    ),
}  # fmt: skip


class CifarDataModule(LightningDataModule):
    """CIFAR-10 or CIFAR-100 in batches ``(images, targets)``, read from a folder of yours.

    Images are ``(N, 3, 32, 32)`` float32, each channel about zero in the mean and one in standard deviation; targets
    ``(N,)`` int64, of CIFAR-100 the 100 fine ones. A training image is shifted by up to ``padding`` pixels each way,
    with black where nothing is left, and mirrored left to right half the time; each copy of an image has a draw of its
    own. After ``setup``, ``train_indices`` and ``val_indices`` hold positions in the published order of the training
    images, and ``train_set``, ``val_set`` and ``test_set`` the parts, each with its ``targets``. The images stay in
    memory as bytes, 184 MB.

    There is no download. Take the python or the binary version of the data set from the CIFAR page of the University of
    Toronto and unpack it in ``root``. The pickles of the python version are read without running code of theirs.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", University of Toronto, 2009.

    Args:
        root: holds the folder that the archive unpacks to, or is that folder.
        name: ``cifar10`` or ``cifar100``.
        batch_size: images in a batch of one process, at most; the last one may be smaller.
        padding: largest shift of a training image in pixels, 0 for none.
        flip: mirror training images.
        val_fraction: share of each class held out of training for validation, sorted out by a hash. With 0, as where
            the test images are reported on after training on all others, there is no validation.
        seed: of that split; the order of training batches follows the global seed.
        num_workers: worker processes of each loader.

    Raises:
        ValueError: if an argument is out of range; in ``setup``, if a file is not what it should be.
        FileNotFoundError: in ``setup``, if files are missing.

    Example:
        >>> from tempfile import mkdtemp
        >>> data = CifarDataModule(write_example_cifar(mkdtemp()), batch_size=4)
        >>> data.setup()
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> images.shape, data.num_classes
        (torch.Size([4, 3, 32, 32]), 10)
    """

    def __init__(
        self,
        root: str | Path,
        name: Name = "cifar10",
        batch_size: int = 128,
        padding: int = 4,
        flip: bool = True,
        val_fraction: float = 0.0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if name not in get_args(Name):
            raise ValueError(f"name={name!r}: choose 'cifar10' or 'cifar100'.")
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"{batch_size=} is at least 1, {num_workers=} at least 0.")
        if not 0 <= padding <= 32:
            raise ValueError(f"padding={padding}: images have 32 x 32 pixels, so give 0 to 32.")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction}: give the share of each class as a number in [0, 1).")
        self.root, self.files = Path(root), _KNOWN[name]
        self.dataset: Name = name
        self.num_classes = self.files.num_classes
        self.batch_size, self.num_workers = batch_size, num_workers
        self.padding, self.flip, self.val_fraction, self.seed = padding, flip, val_fraction, seed

    def setup(self, stage: str | None = None) -> None:
        """Read all files, once, and make all parts whatever the stage."""
        if hasattr(self, "train_set"):
            return
        (images, targets), (test_images, test_targets) = read_cifar(self.root, self.dataset)
        self.train_indices, self.val_indices = self._split(targets)
        held_out = len(self.val_indices) > 0  # else the images need no copy

        def part(indices: Tensor) -> tuple[Tensor, Tensor]:
            return (images[indices], targets[indices]) if held_out else (images, targets)

        scale = (self.files.mean, self.files.std)
        self.train_set = CifarPart(*part(self.train_indices), *scale, self.padding, self.flip)
        self.val_set = CifarPart(*part(self.val_indices), *scale) if held_out else None
        self.test_set = CifarPart(test_images, test_targets, *scale)

    def _split(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        train: list[int] = []
        val: list[int] = []
        for target in targets.unique():
            members = (targets == target).nonzero()[:, 0].tolist()
            num_val = round(self.val_fraction * len(members))
            if num_val == len(members):
                raise ValueError(
                    f"val_fraction={self.val_fraction} leaves class {int(target)} without training images."
                )
            ordered = by_hash(members, f"{self.seed}") if num_val else members
            train += ordered[num_val:]
            val += ordered[:num_val]
        return torch.tensor(sorted(train), dtype=torch.long), torch.tensor(sorted(val), dtype=torch.long)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        return self._loader(self.train_set, shuffle=True)

    def clean_train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """The training images in their order, without augmentation."""
        return self._loader(self.train_set.without_augmentation())

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]] | list[Any]:
        """No loader if nothing is held out."""
        return [] if self.val_set is None else self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """The test part, in the published order."""
        return self._loader(self.test_set)

    def _loader(self, part: "CifarPart", shuffle: bool = False) -> DataLoader[tuple[Tensor, int]]:
        return DataLoader(
            part,
            batch_size=self.batch_size,  # by name: Lightning makes loaders anew, and would give shuffle twice
            shuffle=shuffle,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )


class CifarPart(Dataset[tuple[Tensor, int]]):
    """Some of the images, kept as bytes ``(N, 3, 32, 32)``, augmented and standardised when they are asked for."""

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        padding: int = 0,
        flip: bool = False,
    ) -> None:
        self.images, self.targets, self.mean, self.std = images, targets, mean, std
        self.padding, self.flip = padding, flip

    def without_augmentation(self) -> "CifarPart":
        """The same images, which share their memory."""
        return CifarPart(self.images, self.targets, self.mean, self.std)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")  # ends a plain `for` over the part
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """What a ``DataLoader`` calls for a whole batch."""
        images = shift(self.images[indices], self.padding)
        if self.flip:
            images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return list(zip((images.float() / 255 - mean) / std, self.targets[indices].tolist(), strict=True))


def shift(images: Tensor, padding: int) -> Tensor:
    """Images ``(N, C, H, W)``, each moved by whole pixels of its own, up to ``padding`` each way, with zeros beyond."""
    if padding == 0:
        return images
    size, (height, width) = len(images), images.shape[2:]
    top, left = torch.randint(0, 2 * padding + 1, (2, size, 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)  # (N, H) and (N, W)
    each = torch.arange(size)[:, None, None]
    moved = pad(images, (padding,) * 4).permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def read_cifar(root: str | Path, name: Name = "cifar10") -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test part, each images ``(N, 3, 32, 32)`` uint8 and targets ``(N,)`` int64, in the published order.

    Raises:
        FileNotFoundError: if neither version is complete in ``root``; the message lists what is missing.
        ValueError: if a file is not what it should be, or its pickle asks for anything but arrays of bytes.
    """
    files, root = _KNOWN[name], Path(root)
    wanted = (*files.train, files.test)
    lacking = []
    for folder in (root / files.python_folder, root / files.binary_folder, root):
        for suffix, read in (("", _read_python), (".bin", _read_binary)):
            absent = [part + suffix for part in wanted if not (folder / (part + suffix)).is_file()]
            if not absent:
                parts = [read(folder / (part + suffix), files) for part in wanted]
                images, targets = (torch.cat(column) for column in zip(*parts[:-1], strict=True))
                return (images, targets), parts[-1]
            if len(absent) < len(wanted) or (folder.name == files.python_folder and not suffix):
                lacking.append(f"{folder} has no {', '.join(absent)}")
    raise FileNotFoundError(
        f"{files.title} is not complete: {'; '.join(lacking)}. Nothing is downloaded here: take the python or the "
        "binary version from the CIFAR page of the University of Toronto, and give as root the folder in which you "
        "unpack it."
    )


def _read_binary(path: Path, files: _Files) -> tuple[Tensor, Tensor]:
    raw, width = path.read_bytes(), files.label_bytes + 3072
    if not raw or len(raw) % width:
        raise ValueError(
            f"{path} has {len(raw)} bytes, which is not a positive multiple of {width}: is it cut off, or another file?"
        )
    rows = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, width)
    return _checked(rows[:, files.label_bytes :].contiguous(), rows[:, files.label_bytes - 1].long(), path, files)


def _read_python(path: Path, files: _Files) -> tuple[Tensor, Tensor]:
    try:
        # The published files are of Python 2, whose strings are bytes.
        found = _BytesOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        by_name = {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}
        images, targets = by_name["data"].tensor(), torch.tensor(by_name[files.targets])
    except Exception as error:  # a broken pickle ends in any of them
        raise ValueError(
            f"{path} is no file of the python version of {files.title} ({error}): take it from the CIFAR page again."
        ) from error
    return _checked(images, targets, path, files)


def _checked(images: Tensor, targets: Tensor, path: Path, files: _Files) -> tuple[Tensor, Tensor]:
    if images.shape != (len(targets), 3072) or targets.ndim != 1 or targets.dtype != torch.int64:
        raise ValueError(
            f"{path} must hold images (N, 3072) and N targets, got {tuple(images.shape)} and {tuple(targets.shape)}."
        )
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < files.num_classes:
        raise ValueError(
            f"{path} has targets from {int(targets.min())} to {int(targets.max())}, and {files.title} has "
            f"{files.num_classes} classes from 0: is it another data set?"
        )
    return images.view(-1, 3, 32, 32), targets


class _ByteType:
    """Stands in for ``numpy.dtype`` in a pickle, and is content with bytes alone."""

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in ("u1", b"u1", "|u1", b"|u1"):
            raise pickle.UnpicklingError(f"it has an array of {code!r}, not of bytes")

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment, which bytes have none of."""


class _ByteArray:
    """Stands in for ``numpy.ndarray`` and for the function that makes an empty one, and keeps what it is given."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def tensor(self) -> Tensor:
        _, shape, kind, by_columns, raw = self.state
        if not isinstance(kind, _ByteType) or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("it has an array that is not of bytes")
        flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        return flat.view(tuple(shape)[::-1]).T.contiguous() if by_columns else flat.view(tuple(shape))


_STAND_INS: dict[tuple[str, str], type] = {
    ("numpy", "ndarray"): _ByteArray,
    ("numpy", "dtype"): _ByteType,
    ("numpy.core.multiarray", "_reconstruct"): _ByteArray,
    ("numpy._core.multiarray", "_reconstruct"): _ByteArray,  # its place since numpy 2
}


class _BytesOnly(pickle.Unpickler):
    """Knows no class and no function but the two stand-ins; numbers, strings, lists and dicts need none."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no such file needs")
        return _STAND_INS[module, name]


def write_example_cifar(
    root: str | Path, name: Name = "cifar10", train_images: int = 40, test_images: int = 20
) -> Path:
    """Write a small data set in the binary version, to try a recipe on: noise around a colour for each class.

    Args:
        root: where the folder goes; made if it is not there.
        name: ``cifar10`` or ``cifar100``.
        train_images: in each training file, of which CIFAR-10 has five; classes take turns.
        test_images: in the test file.

    Returns:
        ``root``.
    """
    files = _KNOWN[name]
    folder = Path(root) / files.binary_folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    color = 255 * torch.rand(files.num_classes, 3, 1, generator=generator)
    sizes = {**dict.fromkeys(files.train, train_images), files.test: test_images}
    for part, size in sizes.items():
        targets = torch.arange(size) % files.num_classes
        noise = 50 * torch.randn(size, 3, 1024, generator=generator)
        pixels = (color[targets] + noise).clamp(0, 255).byte().view(size, 3072)
        labels = targets.byte()[:, None].expand(-1, files.label_bytes)
        (folder / f"{part}.bin").write_bytes(bytes(torch.cat([labels, pixels], 1).flatten().tolist()))
    return Path(root)
