"""Photographs of solar cells, sound and broken, from a package of their own: 2,624 of 300 x 300 grey pixels.

The split sorts by a hash of the seed and the number of the photograph, as that of the digits, and is the same on every
machine. Mirroring of training images draws from torch's global generator.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_feat.data.parts import Part, PartsDataModule, by_hash
from lightning_feat.joints.arguments import checked

# Mean and standard deviation of the pixels of all 2,624 photographs, scaled from [0, 255] to [0, 1].
PIXEL_MEAN, PIXEL_STD = 0.59675, 0.16062


class ElpvDataModule(PartsDataModule):
    """Electroluminescence photographs of solar cells, split by defect and cell type, in batches ``(images, targets)``.

    Images are ``(N, channels, image_size, image_size)`` float32, about zero in the mean and one in standard deviation;
    targets ``(N,)`` int64. After ``setup``, ``train_indices``, ``val_indices`` and ``test_indices`` hold the numbers of
    the photographs in each part, and ``train_set``, ``val_set`` and ``test_set`` the parts, each with its ``targets``.
    Which cells come from one of the 44 modules is not published, so cells of one module are in several parts.

    Source: Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence
    Imagery", EU PVSEC 2018; the photographs are licensed CC BY-NC-SA 4.0, not for commercial use. They come with
    ``pip install "lightning-feat[elpv]"``, 91 MB.

    Args:
        batch_size: images in a batch, at most; the last one may be smaller.
        num_classes: 2 for sound (a defect probability of 0 or 1/3, 1,803 cells) and broken (2/3 or 1, 821 cells), or 4
            for the probabilities 0, 1/3, 2/3 and 1 themselves (1,508, 295, 106 and 715 cells).
        image_size: height and width in pixels, at most 300, averaged down once in ``setup``.
        channels: 1, or 3 equal ones for networks made for colour.
        flip: mirror each training image left to right and upside down, each half the time.
        val_fraction: share of each probability and cell type held out for validation.
        test_fraction: share of each held out for the test.
        seed: of the split; the order of training batches follows the global seed.
        num_workers: worker processes of each loader. Fetching is so cheap that zero is fastest.
    """

    @checked
    def __init__(
        self,
        batch_size: int = 64,
        num_classes: int = 2,
        image_size: int = 96,
        channels: int = 1,
        flip: bool = True,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, "photograph")
        if num_classes not in (2, 4):
            raise ValueError(f"num_classes={num_classes}: choose 2, sound and broken, or 4 defect probabilities.")
        if not 1 <= image_size <= 300:
            raise ValueError(f"image_size={image_size}: the photographs have 300 x 300 pixels, so give 1 to 300.")
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}: the photographs are grey, so give 1, or 3 for equal channels.")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ValueError(f"{val_fraction=} and {test_fraction=}: give shares in [0, 1) whose sum is below 1.")
        self.num_classes = num_classes
        self.image_size, self.channels, self.flip = image_size, channels, flip
        self.val_fraction, self.test_fraction, self.seed = val_fraction, test_fraction, seed

    def setup(self, stage: str | None = None) -> None:
        """Read all photographs, once, and make all parts whatever the stage: seconds, and 240 MB while it lasts."""
        if hasattr(self, "train_set"):
            return
        images, thirds, is_poly = load_elpv()
        images = torch.cat([shrink(batch, self.image_size) for batch in images.split(256)])
        targets = thirds if self.num_classes == 4 else (thirds >= 2).long()
        self.train_indices, self.val_indices, self.test_indices = self._split(2 * thirds + is_poly)
        self.train_set = ElpvPart(images, targets, self.train_indices, self.channels, self.flip)
        self.val_set = ElpvPart(images, targets, self.val_indices, self.channels)
        self.test_set = ElpvPart(images, targets, self.test_indices, self.channels)

    def _split(self, strata: Tensor) -> list[Tensor]:
        parts: list[list[int]] = [[], [], []]
        for stratum in strata.unique():
            members = by_hash((strata == stratum).nonzero()[:, 0].tolist(), f"{self.seed}")
            num_test, num_val = (round(share * len(members)) for share in (self.test_fraction, self.val_fraction))
            parts[0] += members[num_test + num_val :]
            parts[1] += members[num_test : num_test + num_val]
            parts[2] += members[:num_test]
        return [torch.tensor(sorted(part), dtype=torch.long) for part in parts]


class ElpvPart(Part):
    """Some of the photographs, kept as bytes ``(N, H, W)`` and standardised when they are asked for."""

    thing = "photograph"
    targets: Tensor

    def __init__(self, images: Tensor, targets: Tensor, indices: Tensor, channels: int, flip: bool = False) -> None:
        self.images, self.targets, self.channels, self.flip = images[indices], targets[indices], channels, flip

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """What a ``DataLoader`` calls for a whole batch."""
        images = (self.images[indices].unsqueeze(1).float() / 255 - PIXEL_MEAN) / PIXEL_STD
        if self.flip:
            for axis in (2, 3):
                mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
                images = torch.where(mirrored, images.flip(axis), images)
        images = images.expand(-1, self.channels, -1, -1)
        return list(zip(images, self.targets[indices].tolist(), strict=True))


def load_elpv() -> tuple[Tensor, Tensor, Tensor]:
    """All photographs ``(N, 300, 300)`` uint8, thrice their defect probability and whether polycrystalline, int64."""
    try:
        from elpv_dataset.utils import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'The photographs come with elpv-dataset, which is not installed: pip install "lightning-feat[elpv]"'
        ) from error
    found: tuple[Any, Any, Any] = load_dataset()
    images, probabilities, types = found
    thirds = (3 * torch.tensor(probabilities.tolist())).round().long()  # a column of records, which torch cannot view
    return torch.as_tensor(images), thirds, torch.tensor((types == "poly").tolist()).long()


def shrink(images: Tensor, size: int) -> Tensor:
    """Bytes ``(N, H, W)`` averaged down to ``(N, size, size)``."""
    if images.shape[-1] == size:
        return images
    return interpolate(images.unsqueeze(1).float(), (size, size), mode="area")[:, 0].round().byte()
