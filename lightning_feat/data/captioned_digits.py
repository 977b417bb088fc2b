"""Pictures with captions in words, without a download: handwritten digits of scikit-learn in colours and places.

Of the 400 compositions of colour, digit and texture 20 are the base classes of a classification task, 20 its novel
classes, and the others are what pre-training sees: both kinds of classes are new compositions of known words, and of
known pairs of words. The classes have four colours and two textures, so that few can be told without the digit. What a
scene is and how it comes about is in ``scenes``.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader

from lightning_feat.data.digits import load_digits
from lightning_feat.data.parts import Part, PartsDataModule, by_hash
from lightning_feat.data.scenes import (
    TEMPLATES,
    Composition,
    Scenes,
    caption_of,
    class_name,
    compose,
    draws,
    places_of,
    scenes_of,
    split_compositions,
    split_handwriting,
    vocabulary,
)
from lightning_feat.joints.arguments import checked

PIXEL_MEAN, PIXEL_STD = 0.27, 0.15  # those of all channels in pre-training, about


class CaptionedDigitsDataModule(PartsDataModule):
    """Composed digits, as pairs of images and captions to pre-train a CLIP on, or as few-shot classes to tune it on.

    Images are ``(N, 3, image_size, image_size)`` float32, about zero in the mean and one in standard deviation. With
    ``task="pairs"`` batches are ``(images, captions)``, the latter a list of strings; each caption follows one of
    several templates, some of which leave out the colour or the digit. With ``task="classes"`` batches are
    ``(images, targets)``: training and validation on base classes, and two test loaders, of the base and of the novel
    classes, each with targets from zero. Class names are such as ``"red three on a striped background"``.

    The images of the classification task look different, by ``shift``: colours fade into grey and a cast, and grain is
    added. Without that, zero-shot classification leaves little to learn: a small CLIP that had 87 % of the test images
    right at 0 had 70 % at 0.5 (one run; others learn later, and have less of both).

    The handwriting in training, validation and test is disjoint, and that of pre-training from all three.

    Available from the start: ``class_names``, ``novel_class_names``, and ``words``, the vocabulary of all captions and
    class names.

    Args:
        task: ``"classes"`` or ``"pairs"``.
        batch_size: images in a batch, at most.
        shots: training images of each base class, 16 at most.
        test_per_class: test images of each class.
        num_classes: base and novel classes together; the first half, rounded up, is base (Zhou et al., "Conditional
            Prompt Learning for Vision-Language Models", CVPR 2022). At most 40.
        num_pairs: pairs in an epoch of pre-training.
        caption_noise: share of the pre-training captions that name a wrong colour, digit, texture or place.
        shift: how different the images of the classification task look, from 0, not at all, to 1.
        image_size: height and width in pixels.
        seed: of the split of compositions and handwriting, of the pairs, and of validation and test images.
        shot_seed: draws the training images of the classification task. The order of training batches follows the
            global seed.
        num_workers: worker processes of each loader.

    Example:
        >>> data = CaptionedDigitsDataModule(batch_size=8)
        >>> data.setup()
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> images.shape, len(data.class_names), data.class_names[0]
        (torch.Size([8, 3, 32, 32]), 20, 'red three on a checkered background')
    """

    @checked
    def __init__(
        self,
        task: Literal["classes", "pairs"] = "classes",
        batch_size: int = 4,
        shots: int = 16,
        test_per_class: int = 50,
        num_classes: int = 40,
        num_pairs: int = 16_000,
        caption_noise: float = 0.0,
        shift: float = 0.5,
        image_size: int = 32,
        seed: int = 0,
        shot_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, "picture")
        if min(test_per_class, num_pairs) < 1:
            raise ValueError(f"{test_per_class=} and {num_pairs=} must be at least 1.")
        if not 1 <= shots <= 16:
            raise ValueError(f"shots={shots}: give 1 to 16; there is not enough handwriting for more.")
        if not 2 <= num_classes <= 40:
            raise ValueError(
                f"num_classes={num_classes}: give 2 to 40; the other 40 compositions are for pre-training."
            )
        if not 0 <= caption_noise <= 1 or not 0 <= shift <= 1:
            raise ValueError(f"{caption_noise=} and {shift=}: give numbers in [0, 1].")
        if image_size < 16:
            raise ValueError(f"image_size={image_size}: below 16 pixels a digit cannot be read at half the width.")
        self.task = task
        self.shots, self.test_per_class, self.num_pairs = shots, test_per_class, num_pairs
        self.caption_noise, self.shift, self.image_size = caption_noise, shift, image_size
        self.seed, self.shot_seed = seed, shot_seed
        half = -(-num_classes // 2)
        base, novel, self.pretraining = split_compositions(seed)
        self.base, self.novel = base[:half], novel[: num_classes - half]
        self.class_names = [class_name(composition) for composition in self.base]
        self.novel_class_names = [class_name(composition) for composition in self.novel]
        self.words = vocabulary()

    def setup(self, stage: str | None = None) -> None:
        """Compose all pictures of the task, whatever the stage: about 1 s for 16,000 pairs, 0.2 s for the classes."""
        self._images, targets = load_digits()
        self._handwriting = split_handwriting(targets, self.seed)
        if self.task == "pairs":
            self.train_set, self.val_set = self._pairs("pretrain", self.num_pairs), self._pairs("validate", 1000)
            return
        shots = f"{self.seed}:{self.shot_seed}:shots"
        self.train_set = self._classes(self.base, "shots", self.shots, shots)
        self.val_set = self._classes(self.base, "validate", 10, f"{self.seed}:val")
        self.test_set = self._classes(self.base, "test", self.test_per_class, f"{self.seed}:base")
        self.novel_test_set = self._classes(self.novel, "test", self.test_per_class, f"{self.seed}:novel")

    def _pairs(self, part: str, size: int) -> "ComposedPart":
        """Pictures of compositions for pre-training, with captions."""
        salts = [f"{self.seed}:{part}:{number}" for number in range(size)]
        draw_NK = draws([f"{salt}:caption" for salt in salts], 4)
        compositions = [self.pretraining[place] for place in places_of(draw_NK[:, 0], len(self.pretraining))]
        pools = [self._handwriting[part][digit] for _, digit, _ in compositions]
        sources = [pool[int(share * len(pool))] for pool, share in zip(pools, draw_NK[:, 1].tolist(), strict=True)]
        scenes = scenes_of(compositions, sources, salts)
        images = compose(self._images, scenes, 0.0, self.image_size)
        noisy = (draw_NK[:, 2] < self.caption_noise).tolist() if part == "pretrain" else [False] * size
        templates = places_of(draw_NK[:, 3], len(TEMPLATES))
        captions = [
            caption_of(scenes, number, TEMPLATES[template], wrong)
            for number, (template, wrong) in enumerate(zip(templates, noisy, strict=True))
        ]
        return ComposedPart(images, captions, scenes)

    def _classes(self, compositions: Sequence[Composition], part: str, per_class: int, salt: str) -> "ComposedPart":
        """Pictures of each composition, with its place as target; handwriting comes again where it is used up."""
        salts, sources = [], []
        for place, (_, digit, _) in enumerate(compositions):
            order = by_hash(self._handwriting[part][digit], f"{salt}:{place}")
            sources += [order[shot % len(order)] for shot in range(per_class)]
            salts += [f"{salt}:{place}:{shot}" for shot in range(per_class)]
        scenes = scenes_of([each for each in compositions for _ in range(per_class)], sources, salts)
        targets = [place for place in range(len(compositions)) for _ in range(per_class)]
        return ComposedPart(compose(self._images, scenes, self.shift, self.image_size), targets, scenes)

    def train_dataloader(self) -> DataLoader[Any]:
        pairs = self.task == "pairs"
        return self.loader(self.train_set, shuffle=True, drop_last=pairs and len(self.train_set) > self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._unshuffled(self.val_set)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Base and novel classes, one loader each."""
        if self.task == "pairs":
            raise ValueError("task='pairs' has no test: zero-shot accuracy is measured with task='classes'.")
        return [self._unshuffled(self.test_set), self._unshuffled(self.novel_test_set)]

    predict_dataloader = test_dataloader

    def _unshuffled(self, part: "ComposedPart") -> DataLoader[Any]:
        # A contrastive loss sees more in a larger batch of evaluation, and cannot be compared between sizes.
        return self.loader(part, batch_size=self.batch_size if self.task == "pairs" else max(self.batch_size, 100))


class ComposedPart(Part):
    """Pictures kept as bytes, as files would, each with its caption or target; ``scenes`` says what is in them."""

    thing = "picture"

    def __init__(self, images: Tensor, labels: Sequence[Any], scenes: Scenes) -> None:
        self.images, self.labels, self.targets, self.scenes = images, labels, labels, scenes

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Any]]:
        """What a ``DataLoader`` calls for a whole batch."""
        images = (self.images[indices].float() / 255 - PIXEL_MEAN) / PIXEL_STD
        return list(zip(images, [self.labels[index] for index in indices], strict=True))
