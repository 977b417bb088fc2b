"""Handwritten digits beside a patch that mostly agrees with their class: an easy feature, and a harder one.

Nothing but the shifts of the augmentation draws from a random number generator: which patch stands beside a digit is a
hash of the seed and the number of the digit, as the split is (``digits.py``).

Shapes: N digits, C = 10 classes.
"""

import math
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader

from lightning_feat.data.digits import PIXEL_MEAN, PIXEL_STD, DigitsDataModule, DigitsPart
from lightning_feat.data.parts import by_hash, hash_of
from lightning_feat.joints.arguments import checked

Kind = Literal["colour", "texture"]
Otherwise = Literal["none", "other"]
Variant = Literal["same", "digit", "patch", "shuffled", "conflict"]

NUM_CLASSES, SIDE, NO_PATCH = 10, 8, -1
# Ten waves of an 8 x 8 patch (down, across) that are orthogonal to each other whatever their phases.
WAVES = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0), (1, 2), (2, 1), (1, -2), (2, -1))


class SpuriousDigitsDataModule(DigitsDataModule):
    r"""The digits of scikit-learn, a patch of 8 x 8 pixels at their right, in batches ``(images, targets)``.

    Images are ``(N, 3, 8, 16)`` float32: columns 0 to 7 hold the digit, equal in all colours and standardised, columns
    8 to 15 the patch, about zero in the mean and one in root mean square, times ``patch_scale``.
    ``"colour"`` patches have one of ten evenly spread colours, which a linear classifier reads; ``"texture"`` patches
    are grey waves, a frequency for each class and a phase for each digit, of which a linear classifier sees nothing.
    No patch is zeros.

    The patch is that of the digit's class with probability *strength* p, else that of one of the nine other classes,
    each as likely (``otherwise="other"``), or there is none (``"none"``, as in the theory of Nguyen et al., NeurIPS
    2024). A wrong label changes no image: the patch goes by the right class. After ``setup`` every part (``train_set``,
    ``val_set``, ``test_set``) has ``patch_classes`` (N,), -1 for none, and ``agrees`` (N,), whether the patch is that
    of the right class. Digits that agree at one strength do so at every higher one.

    **What can be reached.** Given the class, digit and patch are independent. The patch alone is right with probability
    :math:`\max(p, (1 - p) / 9)` (``"other"``) or :math:`p + (1 - p) / 10` (``"none"``), classes being about equally
    frequent. With the posterior q of the digit alone the best classifier takes the largest :math:`q_c P(\text{patch}
    \mid c)`; ``patch_likelihood`` gives the last factor. With ``"other"`` the patch multiplies the odds of its class by
    :math:`9 p / (1 - p)`, 81 at p = 0.9, and so overrules all but clear digits. With ``"none"`` a patch is proof, and
    the error is :math:`(1 - p)` times that of the best reader of digits: a network that reads digits poorly because
    the patch explained most of them loses on the same distribution already. Digits alone are read right 98 times in
    100 after training on all of them; ``train_per_class`` and ``label_noise`` make that harder.

    Args:
        kind: ``"colour"`` or ``"texture"``.
        train_strength: p of the training part, in [0, 1]; with ``"other"`` 0.1 tells nothing.
        val_strength: p of the validation part; None for that of training.
        test_strength: p of the test part; None for that of training.
        otherwise: what stands beside the other digits.
        test_variant: what the test loader gives, see ``variant``.
        patch_scale: how loud the patch is; a louder feature is learned earlier.
        max_shift: augmentation of the training part: each digit moves by up to so many pixels in both directions each
            time it is fetched, by torch's global random numbers. The patch stays. ``clean_train_dataloader`` does not.
        batch_size: see ``DigitsDataModule``, as for all that follow.
        val_fraction: share of each class.
        test_fraction: share of each class.
        train_per_class: None for all.
        label_noise: share of training targets that are wrong.
        seed: of every choice but the order of batches and the shifts.
        num_workers: of each loader.
        return_index: batches become ``(images, targets, indices)``.

    Example:
        >>> data = SpuriousDigitsDataModule(train_strength=0.9, batch_size=32)
        >>> data.setup()
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> images.shape, round(float(data.train_set.agrees.double().mean()), 1)
        (torch.Size([32, 3, 8, 16]), 0.9)
    """

    train_set: "SpuriousDigitsPart"
    val_set: "SpuriousDigitsPart"
    test_set: "SpuriousDigitsPart"

    @checked
    def __init__(
        self,
        kind: Kind = "colour",
        train_strength: float = 0.9,
        val_strength: float | None = None,
        test_strength: float | None = None,
        otherwise: Otherwise = "none",
        test_variant: Variant = "same",
        patch_scale: float = 1.0,
        max_shift: int = 0,
        batch_size: int = 64,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        train_per_class: int | None = None,
        label_noise: float = 0.0,
        seed: int = 0,
        num_workers: int = 0,
        return_index: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            train_per_class=train_per_class,
            label_noise=label_noise,
            channels=3,
            seed=seed,
            num_workers=num_workers,
            return_index=return_index,
        )
        for name, value, choices in (
            ("kind", kind, get_args(Kind)),
            ("otherwise", otherwise, get_args(Otherwise)),
            ("test_variant", test_variant, get_args(Variant)),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}.")
        self.train_strength = train_strength
        self.val_strength = train_strength if val_strength is None else val_strength
        self.test_strength = train_strength if test_strength is None else test_strength
        for name in ("train_strength", "val_strength", "test_strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a probability in [0, 1].")
        if patch_scale < 0:
            raise ValueError(f"patch_scale={patch_scale}: give zero, for no patches at all, or more.")
        if not 0 <= max_shift <= SIDE:
            raise ValueError(f"max_shift={max_shift}: digits are {SIDE} pixels wide, so give 0 to {SIDE}.")
        self.kind, self.otherwise, self.test_variant = kind, otherwise, test_variant
        self.patch_scale, self.max_shift = patch_scale, max_shift

    def setup(self, stage: str | None = None) -> None:
        """Load the digits and make all three parts whatever the stage."""
        super().setup(stage)
        self.train_set = self._beside(self.train_set, self.train_indices, self.train_strength, self.max_shift)
        self.val_set = self._beside(self.val_set, self.val_indices, self.val_strength)
        self.test_set = self._beside(self.test_set, self.test_indices, self.test_strength)

    def variant(self, name: Variant, part: Literal["val", "test"] = "test") -> "SpuriousDigitsPart":
        """The test or validation part, in its order, with other patches or without digits.

        ``"same"``: as it is. ``"digit"``: no patches. ``"patch"``: no ink, the patch alone. ``"shuffled"``: the patches
        are dealt out among the digits of the part anew, which keeps how often each comes and breaks what it tells
        (one in ten still agrees by chance): the test of Shah et al., NeurIPS 2020, for what a network relies on.
        ``"conflict"``: every patch is that of another class, whatever the strength.
        """
        if name not in get_args(Variant):
            raise ValueError(f"variant {name!r}: choose one of {', '.join(map(repr, get_args(Variant)))}.")
        found = self.test_set if part == "test" else self.val_set
        indices = (self.test_indices if part == "test" else self.val_indices).tolist()
        if name == "same":
            return found
        if name == "digit":
            return found.with_patches(torch.full_like(found.patch_classes, NO_PATCH))
        if name == "patch":
            return found.without_digits()
        if name == "shuffled":
            place = {index: i for i, index in enumerate(indices)}
            order = torch.tensor([place[index] for index in by_hash(indices, f"{self.seed}:shuffled")])
            return found.with_patches(found.patch_classes[order], found.phases[order])
        return found.with_patches(self._others(found.clean_targets, indices))

    def clean_train_dataloader(self) -> DataLoader[tuple[Tensor | int, ...]]:
        """The training part in its order, without augmentation."""
        return self.loader(self.train_set.without_shifts())

    def test_dataloader(self) -> DataLoader[tuple[Tensor | int, ...]]:
        return self.loader(self.variant(self.test_variant))

    def predict_dataloader(self) -> DataLoader[tuple[Tensor | int, ...]]:
        """What ``test_dataloader`` gives, in the order of ``test_indices``."""
        return self.test_dataloader()

    def _beside(self, digits: DigitsPart, indices: Tensor, strength: float, max_shift: int = 0) -> "SpuriousDigitsPart":
        numbers = indices.tolist()
        agrees = torch.tensor([share_of(index, f"{self.seed}:agrees") < strength for index in numbers])
        others = self._others(digits.clean_targets, numbers)
        others = torch.full_like(others, NO_PATCH) if self.otherwise == "none" else others
        phases = torch.tensor([2 * math.pi * share_of(index, f"{self.seed}:phase") for index in numbers])
        patch_classes = torch.where(agrees, digits.clean_targets, others)
        return SpuriousDigitsPart(digits, self.kind, patch_classes, phases, self.patch_scale, max_shift)

    def _others(self, targets: Tensor, numbers: list[int]) -> Tensor:
        """For each digit another class than its own."""
        steps = torch.tensor([1 + hash_of(index, f"{self.seed}:other") % (NUM_CLASSES - 1) for index in numbers])
        return (targets + steps) % NUM_CLASSES


class SpuriousDigitsPart(DigitsPart):
    """Some of the digits, each beside its patch."""

    def __init__(
        self, digits: DigitsPart, kind: Kind, patch_classes: Tensor, phases: Tensor, patch_scale: float, max_shift: int
    ) -> None:
        super().__init__(digits.images, digits.targets, digits.clean_targets, SIDE, 3, digits.return_index)
        self.kind, self.patch_classes, self.phases = kind, patch_classes, phases
        self.patch_scale, self.max_shift = patch_scale, max_shift
        self.agrees = patch_classes == digits.clean_targets
        self.patches = patch_scale * patch_images(kind, patch_classes, phases)

    def with_patches(self, patch_classes: Tensor, phases: Tensor | None = None) -> "SpuriousDigitsPart":
        """The same digits beside patches of the classes ``(N,)``, -1 for none; phases as they were, or ``(N,)``."""
        phases = self.phases if phases is None else phases
        return SpuriousDigitsPart(self, self.kind, patch_classes, phases, self.patch_scale, self.max_shift)

    def without_digits(self) -> "SpuriousDigitsPart":
        """The same patches beside nothing: digits without ink."""
        part = self.with_patches(self.patch_classes)
        part.images = torch.zeros_like(part.images)
        return part

    def without_shifts(self) -> "SpuriousDigitsPart":
        """The same, and no augmentation."""
        return SpuriousDigitsPart(self, self.kind, self.patch_classes, self.phases, self.patch_scale, max_shift=0)

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor | int, ...]]:
        digits = self.images[indices]
        if self.max_shift:
            digits = shifted(digits, torch.randint(-self.max_shift, self.max_shift + 1, (len(indices), 2)))
        digits = ((digits - PIXEL_MEAN) / PIXEL_STD)[:, None].expand(-1, 3, -1, -1)
        columns: list[list[Tensor] | list[int]] = [
            list(torch.cat([digits, self.patches[indices]], dim=3)),
            self.targets[indices].tolist(),
        ]
        if self.return_index:
            columns.append(indices)
        return list(zip(*columns, strict=True))


def patch_images(kind: Kind, patch_classes: Tensor, phases: Tensor) -> Tensor:
    """Patches ``(N, 3, 8, 8)`` of the classes ``(N,)``, zeros for -1; one in root mean square (waves: over phases)."""
    if kind == "colour":
        patches = colours()[patch_classes][:, :, None, None].expand(-1, -1, SIDE, SIDE)
    else:
        pixel = 2 * math.pi / SIDE * torch.arange(SIDE)
        down, across = torch.tensor(WAVES).T[:, patch_classes, None, None]
        wave = torch.cos(down * pixel[:, None] + across * pixel + phases[:, None, None])
        patches = math.sqrt(2) * wave[:, None].expand(-1, 3, -1, -1)
    return patches * (patch_classes != NO_PATCH)[:, None, None, None]


@cache
def colours() -> Tensor:
    """Ten colours ``(10, 3)`` evenly spread over a sphere, by a golden spiral; each is one in root mean square."""
    height = 1 - (2 * torch.arange(NUM_CLASSES) + 1) / NUM_CLASSES
    angle = math.pi * (3 - math.sqrt(5)) * torch.arange(NUM_CLASSES)
    radius = (1 - height.square()).sqrt()
    return math.sqrt(3) * torch.stack([radius * angle.cos(), radius * angle.sin(), height], dim=1)


def patch_likelihood(patch_classes: Tensor, strength: float, otherwise: Otherwise) -> Tensor:
    """Probability ``(N, C)`` of the patch beside a digit, for each class that the digit may have."""
    own = patch_classes[:, None] == torch.arange(NUM_CLASSES)
    if otherwise == "other":
        return torch.where(own, strength, (1 - strength) / (NUM_CLASSES - 1))
    return torch.where((patch_classes == NO_PATCH)[:, None], 1 - strength, strength * own.float())


def shifted(images: Tensor, moves: Tensor) -> Tensor:
    """Images ``(N, 8, 8)`` moved by ``(N, 2)`` pixels down and to the right; what comes in from outside has no ink."""
    frame = int(moves.abs().max())
    windows = pad(images, (frame, frame, frame, frame)).unfold(1, SIDE, 1).unfold(2, SIDE, 1)
    return windows[torch.arange(len(images)), frame - moves[:, 0], frame - moves[:, 1]]


def share_of(index: int, salt: str) -> float:
    """A number in [0, 1) that looks random, and is the same everywhere."""
    return (hash_of(index, salt) >> 203) / 2**53  # the 53 leading bits of 256, as many as a float keeps
