"""Composed scenes: what is in them, how they look, and what can be said of them.

A scene is a digit in one of eight colours, on a background in one of five textures, at one of five places. Colour,
digit and texture make a composition, 400 in all.

Nothing here draws from a random number generator: every choice, and the grain of every picture, comes from a hash of
the seed and the number of the picture, so that two machines and any two versions of any library agree.

Shapes: N pictures, S height and width of a picture, K draws.
"""

from collections.abc import Sequence
from hashlib import shake_256
from itertools import product
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from lightning_feat.data.parts import by_hash

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

Composition: TypeAlias = tuple[int, int, int]  # places of colour, digit and texture in the lists above


class Scenes(NamedTuple):
    """What is in N pictures: for each the number of its digit in the data set, and places in the lists above."""

    sources: Tensor
    digits: Tensor
    colours: Tensor
    textures: Tensor
    places: Tensor
    salts: list[str]  # from which the details are drawn


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
    places = torch.tensor(places_of(draws([f"{salt}:place" for salt in salts], 1)[:, 0], len(PLACES)))
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


def places_of(shares: Tensor, size: int) -> list[int]:
    """Numbers in [0, 1) as places in a list of this size."""
    return (shares * size).long().tolist()
