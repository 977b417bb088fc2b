"""The files of CIFAR-10 and CIFAR-100, in either of the two forms they are published in.

The python version is a pickle, and unpickling a file from somewhere may run any code in it. Here it runs none but this
file's: numpy's array and dtype, the only classes that such a file needs, have stand-ins that keep what they are given,
and any other name ends the reading.

Shapes: N images.
"""

import io
import pickle
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Name = Literal["cifar10", "cifar100"]


class CifarFiles(NamedTuple):
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
KNOWN: dict[str, CifarFiles] = {
    "cifar10": CifarFiles(
        "CIFAR-10", 10, "cifar-10-batches-py", "cifar-10-batches-bin", _BATCHES, "test_batch", "labels", 1,
        (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": CifarFiles(
        "CIFAR-100", 100, "cifar-100-python", "cifar-100-binary", ("train",), "test", "fine_labels", 2,
        (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
    ),
}  # fmt: skip


def read_cifar(root: str | Path, name: Name = "cifar10") -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test part, each images ``(N, 3, 32, 32)`` uint8 and targets ``(N,)`` int64, in the published order.

    Raises:
        FileNotFoundError: if neither version is complete in ``root``; the message lists what is missing.
        ValueError: if a file is not what it should be, or its pickle asks for anything but arrays of bytes.
    """
    files, root = KNOWN[name], Path(root)
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


def _read_binary(path: Path, files: CifarFiles) -> tuple[Tensor, Tensor]:
    raw, width = path.read_bytes(), files.label_bytes + 3072
    if not raw or len(raw) % width:
        raise ValueError(
            f"{path} has {len(raw)} bytes, which is not a positive multiple of {width}: is it cut off, or another file?"
        )
    rows = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, width)
    return _checked(rows[:, files.label_bytes :].contiguous(), rows[:, files.label_bytes - 1].long(), path, files)


def _read_python(path: Path, files: CifarFiles) -> tuple[Tensor, Tensor]:
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


def _checked(images: Tensor, targets: Tensor, path: Path, files: CifarFiles) -> tuple[Tensor, Tensor]:
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
    files = KNOWN[name]
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
