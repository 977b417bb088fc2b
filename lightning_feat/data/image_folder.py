"""Photographs in the layout of ImageNet: a folder for each part, in it a folder for each class."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_feat.data.parts import PartsDataModule
from lightning_feat.joints.arguments import checked

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFolderDataModule(PartsDataModule):
    """Images under ``root/train/<class>/`` and ``root/val/<class>/``, in batches ``(images, targets)``.

    Images are ``(N, 3, image_size, image_size)`` float32, targets ``(N,)`` int64: the place of the class folder in the
    sorted list of the training classes. Training images are cut and resized at random, mirrored half the time, and
    changed further as asked; validation images are resized and cut from the middle. The transforms are timm's. After
    ``setup``, ``classes`` lists the class folders, and ``train_set`` and ``val_set`` are torchvision ``ImageFolder`` s.
    The test part is ``root/<test_folder>``.

    Args:
        root: the folder that holds the parts.
        batch_size: images in a batch of one process. The last training batch is dropped if smaller, unless it is the
            only one.
        image_size: height and width in pixels.
        crop_pct: share of the resized side that the cut from the middle keeps.
        interpolation: ``bilinear`` or ``bicubic``.
        min_scale: least share of the area that a random cut keeps; the largest is all of it.
        color_jitter: largest relative change of brightness, contrast and saturation. With ``auto_augment`` timm leaves
            it out, unless that is ``3a``.
        auto_augment: a policy of timm, ``rand-m9-mstd0.5-inc1`` for instance, or ``3a`` (Touvron et al., "DeiT III",
            ECCV 2022).
        random_erasing: probability that a rectangle of a training image is replaced by noise (Zhong et al., AAAI 2020).
        mean: subtracted from each channel, after the pixels are scaled to [0, 1].
        std: each channel is divided by it.
        train_folder: name of the training part.
        val_folder: name of the validation part.
        test_folder: name of the test part; ImageNet has no targets for its own, so it is the validation part.
        num_workers: worker processes of each loader.

    Raises:
        ValueError: if an argument is out of range; in ``setup``, if a part is missing, holds no images, or has a class
            that training has not.

    Example:
        >>> from tempfile import mkdtemp
        >>> data = ImageFolderDataModule(write_example_folder(mkdtemp()), batch_size=4, image_size=32)
        >>> data.setup()
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> images.shape, data.classes
        (torch.Size([4, 3, 32, 32]), ['class_0', 'class_1', 'class_2'])
    """

    @checked
    def __init__(
        self,
        root: str | Path,
        batch_size: int = 32,
        image_size: int = 224,
        crop_pct: float = 0.875,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        min_scale: float = 0.08,
        color_jitter: float = 0.0,
        auto_augment: str | None = None,
        random_erasing: float = 0.0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        train_folder: str = "train",
        val_folder: str = "val",
        test_folder: str = "val",
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, "image")
        if image_size < 1:
            raise ValueError(f"image_size={image_size}: an image needs at least one pixel.")
        if not 0 < crop_pct <= 1 or not 0 < min_scale <= 1:
            raise ValueError(f"{crop_pct=} and {min_scale=}: give shares in (0, 1].")
        if color_jitter < 0 or not 0 <= random_erasing <= 1:
            raise ValueError(f"{color_jitter=} cannot be negative, and {random_erasing=} is a probability.")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"{mean=} and {std=}: give three numbers each, one a channel, the latter positive.")
        self.root = Path(root)
        self.train_folder, self.val_folder, self.test_folder = train_folder, val_folder, test_folder
        self.common: dict[str, Any] = {
            "input_size": image_size,
            "interpolation": interpolation,
            "mean": tuple(mean),
            "std": tuple(std),
        }
        self.crop_pct = crop_pct
        self.augmentation: dict[str, Any] = {
            "scale": (min_scale, 1.0),
            "color_jitter": color_jitter,
            "auto_augment": auto_augment,
            "re_prob": random_erasing,
            "re_mode": "pixel",
        }

    def setup(self, stage: str | None = None) -> None:
        """List the images of the parts that ``stage`` needs, those of training always."""
        from timm.data.transforms_factory import create_transform  # not above: it takes seconds

        plain = create_transform(**self.common, is_training=False, crop_pct=self.crop_pct)
        varied = create_transform(**self.common, is_training=True, **self.augmentation)
        self.train_set = self._part(self.train_folder, varied)
        self.classes: list[str] = self.train_set.classes
        if stage != "test":
            self.val_set = self._part(self.val_folder, plain)
        if stage in (None, "test", "predict"):
            self.test_set = self._part(self.test_folder, plain)

    def _part(self, name: str, transform: Any) -> "ImageFolder":
        from torchvision.datasets import ImageFolder

        folder = self.root / name
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: root={str(self.root)!r} needs one named {name!r}.")
        try:
            part = ImageFolder(str(folder), transform)
        except FileNotFoundError as error:  # from torchvision: no class folder, or one without an image
            raise ValueError(
                f"{folder} needs a folder for each class with its images, {name}/<class>/*.jpg: {error}"
            ) from error
        known = getattr(self, "train_set", part).class_to_idx
        unknown = [name for name in part.classes if name not in known]
        if unknown:
            raise ValueError(
                f"{folder} has {len(unknown)} classes that {self.train_folder} has not, {unknown[0]!r} for one: every "
                "class needs training images."
            )
        # A part may lack classes, which would shift the numbers of those after them.
        renumber = [known[name] for name in part.classes]
        part.samples = part.imgs = [(path, renumber[target]) for path, target in part.samples]
        part.targets = [target for _, target in part.samples]
        part.classes, part.class_to_idx = list(known), dict(known)
        return part

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        num_processes = 1 if self.trainer is None else self.trainer.world_size
        drop_last = len(self.train_set) // num_processes > self.batch_size
        return self.loader(self.train_set, shuffle=True, drop_last=drop_last)


def write_example_folder(
    root: str | Path, num_classes: int = 3, train_images: int = 8, val_images: int = 4, image_size: int = 64
) -> Path:
    """Write a small data set in the layout of ImageNet, to try a recipe on: noise around a colour for each class.

    Args:
        root: where ``train`` and ``val`` go; made if it is not there.
        num_classes: folders ``class_0``, ``class_1``, ... in each part.
        train_images: PNG files in each class of the training part.
        val_images: the same of the validation part.
        image_size: their height and width.

    Returns:
        ``root``.
    """
    from torchvision.utils import save_image

    generator = torch.Generator().manual_seed(0)
    digits = len(str(num_classes - 1))  # so that the sorted order is that of the numbers
    for target in range(num_classes):
        color = torch.rand(3, 1, 1, generator=generator)
        for part, count in (("train", train_images), ("val", val_images)):
            folder = Path(root) / part / f"class_{target:0{digits}d}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                noise = 0.2 * torch.randn(3, image_size, image_size, generator=generator)
                save_image((color + noise).clamp(0, 1), folder / f"{i}.png")
    return Path(root)
