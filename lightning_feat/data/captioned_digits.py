"""Pictures with captions in words, without a download: handwritten digits of scikit-learn in colours and places.

A scene is a digit in one of eight colours, on a background in one of five textures, at one of five places. Colour,
digit and texture make a composition, 400 in all. Of these 20 are the base classes of a classification task, 20 its
novel classes, and the others are what pre-training sees: both kinds of classes are new compositions of known words, and
of known pairs of words. The classes have four colours and two textures, so that few can be told without the digit.

Nothing here draws from a random number generator: every choice, and the grain of every picture, comes from a hash of
the seed and the number of the picture, so that two machines and any two versions of any library agree.
"""

from collections.abc import Sequence
from hashlib import shake_256
from itertools import product
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torch.utils.data import DataLoader, Dataset

from lightning_feat.data.digits import by_hash, load_digits

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {  # red, green and blue shares
    "red": (1.0, 0.1, 0.1),
    "orange": (1.0, 0.55, 0.1),
    "yellow": (0.95, 0.95, 0.15),
    "green": (0.1, 0.8, 0.2),
    "cyan": (0.15, 0.9, 0.95),
    "blue": (0.2, 0.3, 1.0),
    "purple": (0.6, 0.2, 0.9),
    "pink": (1.0, 0.55, 0.8),
}
TEXTURES = ("plain", "striped", "checkered", "dotted", "grainy")
# Middle of the digit, from -1 (left, top) to 1. Places are a quarter of the picture apart, so that a digit falls on the
# patches of a small transformer in the same way everywhere, which then learns to read in minutes.
PLACES = {
    "top left": (-0.5, -0.5),
    "top right": (0.5, -0.5),
    "bottom left": (-0.5, 0.5),
    "bottom right": (0.5, 0.5),
    "centre": (0.0, 0.0),
}
TEMPLATES = (
    "a {colour} {digit}.",
    "a photo of a {colour} {digit}.",
    "the number {digit} in {colour}.",
    "a {colour} {digit} at the {place}.",
    "a {colour} {digit} on a {texture} background.",
    "a picture of a {digit} on a {texture} background at the {place}.",
    "a photo of something {colour} on a {texture} background.",
    "a {texture} background with a {colour} {digit} at the {place}.",
)
# Shares of each digit's images: to pre-train on, to draw shots from, to validate on; the others are for the test.
PRETRAIN, SHOTS, VALIDATE = 0.5, 0.15, 0.1
PIXEL_MEAN, PIXEL_STD = 0.27, 0.15  # those of all channels in pre-training, about

Composition: TypeAlias = tuple[int, int, int]  # places of colour, digit and texture in the lists above


class Scenes(NamedTuple):
    """What is in N pictures: for each the number of its digit in the data set, and places in the lists above."""

    sources: Tensor
    digits: Tensor
    colours: Tensor
    textures: Tensor
    places: Tensor
    salts: list[str]  # from which the details are drawn


class CaptionedDigitsDataModule(LightningDataModule):
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
        super().__init__()
        if task not in ("classes", "pairs"):
            raise ValueError(f"task={task!r}: choose 'classes' or 'pairs'.")
        if min(batch_size, test_per_class, num_pairs) < 1 or num_workers < 0:
            raise ValueError(
                f"{batch_size=}, {test_per_class=} and {num_pairs=} are at least 1, {num_workers=} at least 0."
            )
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
        self.task, self.batch_size, self.num_workers = task, batch_size, num_workers
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
        compositions = [self.pretraining[place] for place in _places(draw_NK[:, 0], len(self.pretraining))]
        pools = [self._handwriting[part][digit] for _, digit, _ in compositions]
        sources = [pool[int(share * len(pool))] for pool, share in zip(pools, draw_NK[:, 1].tolist(), strict=True)]
        scenes = scenes_of(compositions, sources, salts)
        images = compose(self._images, scenes, 0.0, self.image_size)
        noisy = (draw_NK[:, 2] < self.caption_noise).tolist() if part == "pretrain" else [False] * size
        templates = _places(draw_NK[:, 3], len(TEMPLATES))
        captions = [
            caption_of(scenes, number, TEMPLATES[template], wrong)
            for number, (template, wrong) in enumerate(zip(templates, noisy, strict=True))
        ]
        return ComposedPart(images, captions, scenes)

    def _classes(self, compositions: Sequence["Composition"], part: str, per_class: int, salt: str) -> "ComposedPart":
        """Pictures of each composition, with its place as target; handwriting comes again where it is used up."""
        salts, sources = [], []
        for place, (_, digit, _) in enumerate(compositions):
            order = by_hash(self._handwriting[part][digit], f"{salt}:{place}")
            sources += [order[shot % len(order)] for shot in range(per_class)]
            salts += [f"{salt}:{place}:{shot}" for shot in range(per_class)]
        scenes = scenes_of([each for each in compositions for _ in range(per_class)], sources, salts)
        targets = [place for place in range(len(compositions)) for _ in range(per_class)]
        return ComposedPart(compose(self._images, scenes, self.shift, self.image_size), targets, scenes)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Any]]:
        return self._loader(self.train_set, training=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Any]]:
        return self._loader(self.val_set)

    def test_dataloader(self) -> list[DataLoader[tuple[Tensor, Any]]]:
        """Base and novel classes, one loader each."""
        if self.task == "pairs":
            raise ValueError("task='pairs' has no test: zero-shot accuracy is measured with task='classes'.")
        return [self._loader(self.test_set), self._loader(self.novel_test_set)]

    def _loader(self, part: "ComposedPart", training: bool = False) -> DataLoader[tuple[Tensor, Any]]:
        return DataLoader(
            part,
            # A contrastive loss sees more in a larger batch of evaluation, and cannot be compared between sizes.
            batch_size=self.batch_size if training or self.task == "pairs" else max(self.batch_size, 100),
            shuffle=training,
            drop_last=training and self.task == "pairs" and len(part) > self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


class ComposedPart(Dataset[tuple[Tensor, Any]]):
    """Pictures kept as bytes, as files would, each with its caption or target; ``scenes`` says what is in them."""

    def __init__(self, images: Tensor, labels: Sequence[Any], scenes: Scenes) -> None:
        self.images, self.labels, self.scenes = images, labels, scenes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")  # ends a plain `for` over the part
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Any]]:
        """What a ``DataLoader`` calls for a whole batch."""
        images = (self.images[indices].float() / 255 - PIXEL_MEAN) / PIXEL_STD
        return list(zip(images, [self.labels[index] for index in indices], strict=True))


def split_compositions(seed: int) -> tuple[list[Composition], list[Composition], list[Composition]]:
    """Base classes, novel classes, and compositions for pre-training: 20, 20 and 360.

    Of four colours, ten digits and two textures a quarter is base and a quarter novel, in the pattern of a Latin
    square: each digit is in two base and two novel classes, each colour in five of both, each texture in ten. Of each
    pair of words pre-training sees four compositions at least.
    """
    colours, digits, textures = (
        by_hash(range(len(words)), f"{seed}:{name}")
        for name, words in (("colours", COLOURS), ("digits", DIGITS), ("textures", TEXTURES))
    )
    chosen: tuple[list[Composition], list[Composition]] = ([], [])
    for i, colour in enumerate(colours[:4]):
        for j, digit in enumerate(digits):
            for k, texture in enumerate(textures[:2]):
                quarter = (i + j + 2 * k) % 4
                if quarter < 2:
                    chosen[quarter].append((colour, digit, texture))
    base, novel = (
        [classes[place] for place in by_hash(range(len(classes)), f"{seed}:order:{number}")]
        for number, classes in enumerate(chosen)
    )
    every = product(range(len(COLOURS)), range(len(DIGITS)), range(len(TEXTURES)))
    return base, novel, [each for each in every if each not in {*base, *novel}]


def split_handwriting(targets: Tensor, seed: int) -> dict[str, list[list[int]]]:
    """Numbers of the images of each digit, in four disjoint parts."""
    parts: dict[str, list[list[int]]] = {"pretrain": [], "shots": [], "validate": [], "test": []}
    for digit in range(len(DIGITS)):
        members = by_hash((targets == digit).nonzero().flatten().tolist(), f"{seed}:handwriting")
        first, second, third = (
            round(share * len(members)) for share in (PRETRAIN, PRETRAIN + SHOTS, PRETRAIN + SHOTS + VALIDATE)
        )
        cut = (members[:first], members[first:second], members[second:third], members[third:])
        for part, numbers in zip(parts.values(), cut, strict=True):
            part.append(numbers)
    return parts


def scenes_of(compositions: Sequence[Composition], sources: Sequence[int], salts: list[str]) -> Scenes:
    """These compositions in this handwriting, each at a place that its salt decides."""
    colours, digits, textures = torch.tensor(compositions).unbind(1)
    places = torch.tensor(_places(draws([f"{salt}:place" for salt in salts], 1)[:, 0], len(PLACES)))
    return Scenes(torch.tensor(sources), digits, colours, textures, places, salts)


def compose(digit_images: Tensor, scenes: Scenes, shift: float, size: int) -> Tensor:
    """Pictures ``(N, 3, size, size)`` uint8 of scenes, from all digits ``(1797, 8, 8)`` in [0, 1]."""
    chunks = [
        _compose(digit_images, Scenes._make(column[i : i + 1000] for column in scenes), shift, size)
        for i in range(0, len(scenes.salts), 1000)  # 1,000 pictures of 32 pixels take 50 MB on the way
    ]
    return torch.cat(chunks)


def _compose(digit_images: Tensor, scenes: Scenes, shift: float, size: int) -> Tensor:
    detail_NK = draws([f"{salt}:detail" for salt in scenes.salts], 10)
    # A digit is half as wide as the picture, a little more or less, and a little turned and off its place.
    zoom_N, angle_N = 0.48 + 0.05 * detail_NK[:, 0], 0.2 * (detail_NK[:, 1] - 0.5)
    middle_N2 = torch.tensor(list(PLACES.values()))[scenes.places] + 0.06 * (detail_NK[:, 2:4] - 0.5)
    cos_N, sin_N = angle_N.cos() / zoom_N, angle_N.sin() / zoom_N
    turn_N22 = torch.stack([torch.stack([cos_N, sin_N], 1), torch.stack([-sin_N, cos_N], 1)], 1)
    affine_N23 = torch.cat([turn_N22, -turn_N22 @ middle_N2[:, :, None]], 2)
    grid = affine_grid(affine_N23, [len(zoom_N), 1, size, size], align_corners=False)
    ink_N1SS = grid_sample(digit_images[scenes.sources][:, None], grid, align_corners=False)
    dark_N, bright_N = 0.05 + 0.15 * detail_NK[:, 4], 0.3 + 0.2 * detail_NK[:, 5]
    grain_NSS = draws([f"{salt}:grain" for salt in scenes.salts], size * size).reshape(-1, size, size)
    pattern_NSS = _patterns(scenes.textures, detail_NK[:, 6:8], grain_NSS, size)
    back_NSS = dark_N[:, None, None] + (bright_N - dark_N)[:, None, None] * pattern_NSS
    colour_N3 = torch.tensor(list(COLOURS.values()))[scenes.colours] * (0.8 + 0.2 * detail_NK[:, 8:9])
    picture = ink_N1SS * colour_N3[:, :, None, None] + (1 - ink_N1SS) * back_NSS[:, None]
    if shift:
        noise = draws([f"{salt}:noise" for salt in scenes.salts], 3 * size * size).reshape(picture.shape) - 0.5
        faded = torch.lerp(picture, picture.mean(1, keepdim=True), 0.6 * shift)
        cast = 1 - shift * torch.tensor([0.1, 0.3, 0.5])
        picture = faded * cast[:, None, None] + 0.6 * shift * noise
    return (255 * picture.clamp(0, 1)).round().to(torch.uint8)


def _patterns(textures: Tensor, offsets: Tensor, grain: Tensor, size: int) -> Tensor:
    """Backgrounds ``(N, size, size)`` in [0, 1], moved by ``offsets`` ``(N, 2)`` of a period, which is a quarter of the
    size.
    """
    axis = 4 * torch.arange(size) / size
    row, column = ((axis + offset[:, None]) % 1 for offset in offsets.unbind(1))
    row, column = row[:, :, None].expand(-1, -1, size), column[:, None, :].expand(-1, size, -1)
    dots = ((row - 0.5).square() + (column - 0.5).square() < 0.07).float()
    kinds = [torch.full_like(grain, 0.5), (row < 0.5).float(), ((row < 0.5) ^ (column < 0.5)).float(), dots, grain]
    return torch.stack(kinds)[textures, torch.arange(len(textures))]


def class_name(composition: Composition) -> str:
    """Such as ``"red three on a striped background"``."""
    colour, digit, texture = composition
    return f"{list(COLOURS)[colour]} {DIGITS[digit]} on a {TEXTURES[texture]} background"


def vocabulary() -> list[str]:
    """All words of all captions, in alphabetical order, and the full stop."""
    fixed = " ".join(TEMPLATES).replace(".", " ").split()
    words = " ".join([*DIGITS, *COLOURS, *TEXTURES, *PLACES]).split()
    return sorted({".", *words, *(word for word in fixed if not word.startswith("{"))})


def caption_of(scenes: Scenes, number: int, template: str, wrong: bool) -> str:
    """The template in words for one of the scenes, with one wrong word, or two of a place, if asked."""
    lists = {"digit": DIGITS, "colour": [*COLOURS], "texture": TEXTURES, "place": [*PLACES]}
    columns = {"digit": scenes.digits, "colour": scenes.colours, "texture": scenes.textures, "place": scenes.places}
    chosen = {slot: int(column[number]) for slot, column in columns.items()}
    if wrong:
        slots = [slot for slot in lists if f"{{{slot}}}" in template]
        which, step = draws([f"{scenes.salts[number]}:wrong"], 2)[0].tolist()
        slot = slots[int(which * len(slots))]
        others = len(lists[slot]) - 1
        chosen[slot] = (chosen[slot] + 1 + int(step * others)) % (others + 1)
    return template.format(**{slot: lists[slot][place] for slot, place in chosen.items()})


def draws(salts: Sequence[str], count: int) -> Tensor:
    """Numbers ``(len(salts), count)`` float32 in [0, 1) that look uniform, in steps of 1/65,536."""
    data = b"".join(shake_256(salt.encode()).digest(2 * count) for salt in salts)
    pairs = torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(len(salts), count, 2).float()
    return (pairs[..., 0] + 256 * pairs[..., 1]) / 65536


def _places(shares: Tensor, size: int) -> list[int]:
    """Numbers in [0, 1) as places in a list of this size."""
    return (shares * size).long().tolist()
