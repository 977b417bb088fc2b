"""Real images without a download: the 1,797 handwritten digits that come with scikit-learn.

Nothing here draws from a random number generator: every choice (the split, the few shots, the wrong labels) sorts by a
hash of the seed and the number of the digit, so that two machines and any two versions of any library agree.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_feat.data.parts import Part, PartsDataModule, by_hash, check_share, hash_of
from lightning_feat.joints.arguments import checked

# Mean and standard deviation of the pixels of all 1,797 digits, scaled from [0, 16] to [0, 1].
PIXEL_MEAN, PIXEL_STD = 0.30526, 0.37605


class DigitsDataModule(PartsDataModule):
    """The handwritten digits of scikit-learn, split by class, in batches ``(images, targets)``.

    Images are ``(N, channels, image_size, image_size)`` float32, about zero in the mean and one in standard deviation;
    targets ``(N,)`` int64. After ``setup``, ``train_indices``, ``val_indices`` and ``test_indices`` hold the numbers of
    the digits in each part, between 0 and 1,796, and ``train_set``, ``val_set`` and ``test_set`` the parts, each with
    its ``targets``. The test part depends on ``seed`` and ``test_fraction`` alone.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998, in scikit-learn's ``digits``.

    Args:
        batch_size: images in a batch, at most; the last one may be smaller.
        val_fraction: share of each class held out for validation.
        test_fraction: share of each class held out for the test.
        train_per_class: keep this many training images of each class; ``None`` keeps all (104 to 110 by default).
        imbalance_factor: size of class 0 over that of class 9 in training; between them the sizes fall exponentially,
            as in long-tailed CIFAR (Cui et al., "Class-Balanced Loss", CVPR 2019). Sizes are rounded. Class 0 keeps
            ``train_per_class`` images, or as many as the smallest class has.
        label_noise: share of the training targets replaced by another class, each of the nine as likely. The right
            ones are in ``train_set.clean_targets``.
        image_size: height and width in pixels, enlarged from 8 bilinearly.
        channels: 1, or 3 equal ones for networks made for colour.
        seed: of every choice above; the order of training batches follows the global seed.
        num_workers: worker processes of each loader. Fetching is so cheap that zero is fastest.
        return_index: batches become ``(images, targets, indices)``, with positions in ``train_set``, int64:
            digit number ``train_indices[indices]``. In the other parts likewise.

    Example:
        >>> data = DigitsDataModule(batch_size=32, image_size=16, channels=3)
        >>> data.setup()
        >>> images, targets = next(iter(data.val_dataloader()))
        >>> images.shape, targets.dtype
        (torch.Size([32, 3, 16, 16]), torch.int64)
    """

    num_classes = 10

    @checked
    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        train_per_class: int | None = None,
        imbalance_factor: float = 1.0,
        label_noise: float = 0.0,
        image_size: int = 8,
        channels: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        return_index: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, "image")
        check_share("val_fraction", val_fraction)
        check_share("test_fraction", test_fraction)
        if val_fraction + test_fraction >= 1:
            raise ValueError(f"{val_fraction=} and {test_fraction=} leave nothing to train on: their sum must be < 1.")
        if train_per_class is not None and train_per_class < 1:
            raise ValueError(f"train_per_class={train_per_class}: keep at least one image, or None for all.")
        if not 1 <= imbalance_factor < float("inf"):
            raise ValueError(f"imbalance_factor={imbalance_factor}: largest over smallest class is at least 1.")
        if not 0 <= label_noise <= 1:
            raise ValueError(f"label_noise={label_noise}: give the share of wrong labels as a number in [0, 1].")
        if image_size < 1:
            raise ValueError(f"image_size={image_size}: an image needs at least one pixel; the digits come with 8 x 8.")
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}: the digits are grey, so give 1, or 3 for equal colour channels.")
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.train_per_class, self.imbalance_factor, self.label_noise = train_per_class, imbalance_factor, label_noise
        self.image_size, self.channels, self.seed, self.return_index = image_size, channels, seed, return_index

    def setup(self, stage: str | None = None) -> None:
        """Load the digits, about 50 ms, and make all three parts whatever the stage."""
        images, targets = load_digits()
        train, self.val_indices, self.test_indices = self._split(targets)
        self.train_indices = self._thin_out(train, targets)
        noisy = flip_labels(targets, self.train_indices, self.label_noise, self.num_classes, self.seed)

        def part(indices: Tensor, given: Tensor) -> "DigitsPart":
            wanted = (self.image_size, self.channels, self.return_index)
            return DigitsPart(images[indices], given[indices], targets[indices], *wanted)

        self.train_set = part(self.train_indices, noisy)
        self.val_set, self.test_set = part(self.val_indices, targets), part(self.test_indices, targets)

    def _split(self, targets: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Numbers of the digits to train on by class, to validate on, and to test on."""
        train, val, test = [], [], []
        for target in range(self.num_classes):
            members = by_hash((targets == target).nonzero().flatten().tolist(), f"{self.seed}")
            num_test, num_val = (round(share * len(members)) for share in (self.test_fraction, self.val_fraction))
            test.append(torch.tensor(members[:num_test], dtype=torch.long))
            val.append(torch.tensor(members[num_test : num_test + num_val], dtype=torch.long))
            train.append(torch.tensor(members[num_test + num_val :], dtype=torch.long))
        if min(map(len, train)) == 0:
            raise ValueError(
                f"val_fraction={self.val_fraction} and test_fraction={self.test_fraction} leave a class without "
                "training images: lower one of them."
            )
        return train, torch.cat(val).sort().values, torch.cat(test).sort().values

    def _thin_out(self, train: list[Tensor], targets: Tensor) -> Tensor:
        """Numbers of the digits that are left after few-shot selection and imbalance, in rising order."""
        smallest = min(map(len, train))
        if self.train_per_class is not None and self.train_per_class > smallest:
            raise ValueError(
                f"train_per_class={self.train_per_class}, but the smallest class has {smallest} training images: "
                "take fewer, or lower val_fraction or test_fraction."
            )
        sizes = [len(members) if self.train_per_class is None else self.train_per_class for members in train]
        if self.imbalance_factor > 1:
            largest = smallest if self.train_per_class is None else self.train_per_class
            last = self.num_classes - 1
            sizes = [round(largest * self.imbalance_factor ** (-target / last)) for target in range(last + 1)]
            if sizes[last] == 0:
                raise ValueError(
                    f"imbalance_factor={self.imbalance_factor} with {largest} images in the largest class leaves "
                    f"class {last} without any: take less than {2 * largest}."
                )
        return torch.cat([members[:size] for members, size in zip(train, sizes, strict=True)]).sort().values


class DigitsPart(Part):
    """Some of the digits, kept 8 x 8 and enlarged when they are asked for: at 224 pixels all would fill a gigabyte."""

    thing = "digit"
    targets: Tensor

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        clean_targets: Tensor,
        image_size: int,
        channels: int,
        return_index: bool,
    ) -> None:
        self.images, self.targets, self.clean_targets = images, targets, clean_targets
        self.image_size, self.channels, self.return_index = image_size, channels, return_index

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor | int, ...]]:
        """What a ``DataLoader`` calls for a whole batch: one resize for all."""
        images = self.images[indices].unsqueeze(1)
        if self.image_size != images.shape[-1]:
            images = interpolate(images, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False)
        images = ((images - PIXEL_MEAN) / PIXEL_STD).expand(-1, self.channels, -1, -1)
        columns: list[Sequence[Tensor | int]] = [list(images), self.targets[indices].tolist()]
        if self.return_index:
            columns.append(indices)
        return list(zip(*columns, strict=True))


def load_digits() -> tuple[Tensor, Tensor]:
    """All digits: images ``(1797, 8, 8)`` float32 in [0, 1], targets ``(1797,)`` int64."""
    try:
        from sklearn.datasets import load_digits as load_bunch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'The digits come with scikit-learn, which is not installed: pip install "lightning-feat[recipes]"'
        ) from error
    bunch: dict[str, Any] = load_bunch()
    return torch.as_tensor(bunch["images"], dtype=torch.float32) / 16, torch.as_tensor(bunch["target"]).long()


def flip_labels(targets: Tensor, indices: Tensor, share: float, num_classes: int, seed: int) -> Tensor:
    """Targets, with ``round(share * len(indices))`` of those at ``indices`` replaced by another class."""
    flipped = targets.clone()
    for index in by_hash(indices.tolist(), f"{seed}:noisy")[: round(share * len(indices))]:
        step = 1 + hash_of(index, f"{seed}:class") % (num_classes - 1)  # never zero: always another class
        flipped[index] = (flipped[index] + step) % num_classes
    return flipped
