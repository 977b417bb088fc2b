"""CIFAR-10 and CIFAR-100 from local files, augmented as usual.

Augmentation draws from torch's global generator, which each worker has its own of.

Shapes: N images.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader

from lightning_feat.data.cifar_files import KNOWN, Name, read_cifar
from lightning_feat.data.parts import Part, PartsDataModule, by_hash, check_share
from lightning_feat.joints.arguments import checked


class CifarDataModule(PartsDataModule):
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
        >>> from lightning_feat.data import write_example_cifar
        >>> data = CifarDataModule(write_example_cifar(mkdtemp()), batch_size=4)
        >>> data.setup()
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> images.shape, data.num_classes
        (torch.Size([4, 3, 32, 32]), 10)
    """

    @checked
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
        super().__init__(batch_size, num_workers, "image")
        if not 0 <= padding <= 32:
            raise ValueError(f"padding={padding}: images have 32 x 32 pixels, so give 0 to 32.")
        check_share("val_fraction", val_fraction)
        self.root, self.files = Path(root), KNOWN[name]
        self.dataset: Name = name
        self.num_classes = self.files.num_classes
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

    def clean_train_dataloader(self) -> DataLoader[Any]:
        """The training images in their order, without augmentation."""
        return self.loader(self.train_set.without_augmentation())


class CifarPart(Part):
    """Some of the images, kept as bytes ``(N, 3, 32, 32)``, augmented and standardised when they are asked for."""

    thing = "image"
    targets: Tensor

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
