"""Few images of half of the classes, and tests on both halves: the protocol of prompt learning."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_feat.data.image_folder import ImageFolderDataModule
from lightning_feat.data.parts import by_hash
from lightning_feat.joints.arguments import checked

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class BaseToNovelDataModule(ImageFolderDataModule):
    """Photographs for prompt learning from base classes to novel ones (Zhou et al., "Conditional Prompt Learning for
    Vision-Language Models", CVPR 2022), in the folders of ``ImageFolderDataModule``.

    The first half of the sorted class folders, rounded up, is base, the rest novel. Training sees ``shots`` images of
    each base class; validation the base classes; the test has two loaders, of the base and of the novel classes, each
    with targets from zero. Images are resized and cut by bicubic interpolation, and standardised as CLIP's.

    After ``setup``: ``class_names`` and ``novel_class_names``, for the texts.

    Args:
        root: folder that holds the parts.
        shots: training images of each base class; all of a class that has fewer.
        batch_size: images in a batch of one process.
        image_size: height and width in pixels.
        min_scale: least share of the area that a random cut of a training image keeps.
        names: JSON file that maps folders to names; without it a folder's name, underscores as spaces.
        seed: draws the shots, by the paths of the images.
        train_folder: name of the training part.
        val_folder: name of the validation part.
        test_folder: name of the test part, where images of all classes are; ImageNet's protocol takes its validation
            part.
        num_workers: worker processes of each loader.

    Example:
        >>> from tempfile import mkdtemp
        >>> from lightning_feat.data import write_example_folder
        >>> data = BaseToNovelDataModule(write_example_folder(mkdtemp(), num_classes=5), shots=2, image_size=32)
        >>> data.setup()
        >>> data.class_names, data.novel_class_names, len(data.train_dataloader().dataset)
        (['class 0', 'class 1', 'class 2'], ['class 3', 'class 4'], 6)
    """

    @checked
    def __init__(
        self,
        root: str | Path,
        shots: int = 16,
        batch_size: int = 4,
        image_size: int = 224,
        min_scale: float = 0.08,
        names: str | None = None,
        seed: int = 0,
        train_folder: str = "train",
        val_folder: str = "val",
        test_folder: str = "val",
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            root,
            batch_size,
            image_size,
            crop_pct=1.0,
            interpolation="bicubic",
            min_scale=min_scale,
            mean=CLIP_MEAN,
            std=CLIP_STD,
            train_folder=train_folder,
            val_folder=val_folder,
            test_folder=test_folder,
            num_workers=num_workers,
        )
        if shots < 1:
            raise ValueError(f"shots={shots} must be at least 1.")
        self.shots, self.names, self.seed = shots, names, seed

    def setup(self, stage: str | None = None) -> None:
        """List the images, and draw the shots."""
        super().setup(None)
        if len(self.classes) < 4:
            raise ValueError(
                f"{self.root / self.train_folder} has {len(self.classes)} classes, but two base and two novel ones are "
                "needed at least."
            )
        named = self._names()
        half = -(-len(self.classes) // 2)
        self.class_names, self.novel_class_names = named[:half], named[half:]
        rows = self._rows_by_class(self.train_set)
        shots = [
            row for c in range(half) for row in by_hash(rows[c], f"{self.seed}:{self.classes[c]}:shots")[: self.shots]
        ]
        self.few_set = Subset(self.train_set, sorted(shots))
        self.base_val_set = self._half(self.val_set, range(half))
        self.base_test_set = self._half(self.test_set, range(half))
        self.novel_test_set = _Renumbered(self._half(self.test_set, range(half, len(self.classes))), half)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        return self.loader(self.few_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        return self.loader(self.base_val_set)

    def test_dataloader(self) -> Any:
        """Of the base classes, and of the novel ones."""
        return [self.loader(self.base_test_set), self.loader(self.novel_test_set)]

    def predict_dataloader(self) -> Any:
        """As the test."""
        return self.test_dataloader()

    def _names(self) -> list[str]:
        if self.names is None:
            return [folder.replace("_", " ") for folder in self.classes]
        known: dict[str, str] = json.loads(Path(self.names).read_text())
        missing = [folder for folder in self.classes if folder not in known]
        if missing:
            raise ValueError(f"{self.names} has no name for {len(missing)} classes, {missing[0]!r} for one.")
        return [known[folder] for folder in self.classes]

    @staticmethod
    def _rows_by_class(part: Any) -> dict[int, list[int]]:
        rows: dict[int, list[int]] = {c: [] for c in range(len(part.classes))}
        for row, target in enumerate(part.targets):
            rows[target].append(row)
        return rows

    def _half(self, part: Any, classes: range) -> Subset[Any]:
        rows = self._rows_by_class(part)
        found = sorted(row for c in classes for row in rows[c])
        if not found:
            raise ValueError(f"{part.root} has no image of the classes {self.classes[classes[0]]!r} and after.")
        return Subset(part, found)


class _Renumbered(Subset[Any]):
    """Targets less ``first``, so that they begin at zero."""

    def __init__(self, part: Subset[Any], first: int) -> None:
        super().__init__(part.dataset, part.indices)
        self.first = first

    def __getitem__(self, index: Any) -> Any:
        image, target = super().__getitem__(index)
        return image, target - self.first

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]
