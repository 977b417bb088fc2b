"""Two features, one fast and one slow to learn: the synthetic data on which simplicity bias can be computed by hand.

Shapes: N examples, P patches in each, D numbers in a patch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_feat.data.parts import Part, PartsDataModule, hash_of
from lightning_feat.joints.arguments import checked

SLOW_AXIS, FAST_AXIS = 0, 1  # the directions of the features within a patch


class TwoFeaturePatches(NamedTuple):
    """Examples and what they are made of."""

    patches: Tensor  # (N, P, D) float32
    targets: Tensor  # (N,) int64, class 0 for y = -1 and class 1 for y = +1
    has_fast: Tensor  # (N,) bool, whether the fast feature is there


def two_feature_patches(
    num_examples: int,
    num_patches: int = 3,
    patch_size: int = 50,
    slow_strength: float = 0.2,
    fast_strength: float = 1.0,
    fast_share: float = 0.9,
    noise: float = 0.125,
    seed: int = 0,
) -> TwoFeaturePatches:
    r"""Draw examples of two classes that differ in two features, the weaker of which is always there.

    With :math:`y = \pm 1` at equal odds and orthonormal directions :math:`v_d, v_e` in D dimensions, an example has

    - one patch :math:`\beta_d\, y\, v_d`, the slow feature;
    - one patch :math:`\beta_e\, y\, v_e`, the fast feature, with probability :math:`\alpha`, otherwise zero;
    - P - 2 patches of noise, :math:`N(0, \sigma^2 I)` in the D - 2 dimensions that are orthogonal to both,

    in an order drawn for each example. On the network of ``baselines.CubicCNN``, gradient descent with rate
    :math:`\eta` from small weights makes the largest product of a filter with a feature grow by

    .. math:: \dot w_e = \tfrac{3}{2} \eta\, \alpha\, \beta_e^3\, w_e^2, \qquad
              \dot w_d = \tfrac{3}{2} \eta\, \beta_d^3\, w_d^2

    as long as outputs are small: each feature stays as it is, and is then learned all at once, at about :math:`2 / (3
    \eta \alpha \beta_e^3 w_e(0))` iterations and :math:`2 / (3 \eta \beta_d^3 w_d(0))`. Once the fast one is there, the
    examples that have it cost nothing more, so that the slow one is left with the share :math:`1 - \alpha` of its
    gradient. Showing those without it k times raises their share to :math:`k (1 - \alpha) / (\alpha + k (1 - \alpha))`.
    The label can be read off without error from the slow feature alone; from the fast one alone it can in a share
    :math:`\alpha + (1 - \alpha) / 2`.

    Source of the distribution: Nguyen, Haddad, Gan, Mirzasoleiman, "Changing the training data distribution to reduce
    simplicity bias improves in-distribution generalization", NeurIPS 2024, arXiv 2404.17768, with the strengths 0.2 and
    1 and the share 0.9 of their figure, and the activation of ``CubicCNN``. Ours are the other defaults, the noise
    without part along the features (which their proofs assume), the features along the first two axes (plain gradient
    descent from weights without preferred direction does not know the difference), and the equations of growth, which
    leave out the noise.

    Args:
        num_examples: number N.
        num_patches: number P, at least 2.
        patch_size: numbers D in a patch, at least 3.
        slow_strength: :math:`\beta_d`.
        fast_strength: :math:`\beta_e`.
        fast_share: :math:`\alpha`, in [0, 1].
        noise: standard deviation :math:`\sigma` of each number; a patch of noise has a length of about
            :math:`\sigma \sqrt{D}`.
        seed: of a generator of its own on the CPU.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> patches, targets, has_fast = two_feature_patches(num_examples=4)
        >>> patches.shape, targets.dtype, has_fast.dtype
        (torch.Size([4, 3, 50]), torch.int64, torch.bool)
        >>> (patches @ torch.eye(50)[SLOW_AXIS]).sum(1).abs()  # the slow feature is in each of them
        tensor([0.2000, 0.2000, 0.2000, 0.2000])
    """
    _check(num_examples, num_patches, patch_size, slow_strength, fast_strength, fast_share, noise)
    generator = torch.Generator().manual_seed(seed)
    targets_N = torch.randint(2, (num_examples,), generator=generator)
    has_fast_N = torch.rand(num_examples, generator=generator) < fast_share
    sign_N = 2.0 * targets_N - 1
    patches_NPD = noise * torch.randn(num_examples, num_patches, patch_size, generator=generator)
    patches_NPD[:, :2] = 0
    patches_NPD[:, :, [SLOW_AXIS, FAST_AXIS]] = 0
    patches_NPD[:, 0, SLOW_AXIS] = slow_strength * sign_N
    patches_NPD[:, 1, FAST_AXIS] = fast_strength * sign_N * has_fast_N
    order_NP = torch.rand(num_examples, num_patches, generator=generator).argsort(1)
    patches_NPD = patches_NPD.gather(1, order_NP[:, :, None].expand(-1, -1, patch_size))
    return TwoFeaturePatches(patches_NPD, targets_N, has_fast_N)


class TwoFeaturePatchesDataModule(PartsDataModule):
    """Examples of :func:`two_feature_patches`, which says what they are, in batches ``(patches, targets)``.

    After ``setup``, ``train_set``, ``val_set`` and ``test_set`` are the parts, each with its ``patches``, ``targets``
    and ``has_fast``. A part depends on its size, the arguments of the distribution and the seed alone; the parts of one
    seed are drawn independently.

    Args:
        batch_size: examples in a batch, at most; ``num_train`` makes the full batches of the theory.
        num_train: examples to train on.
        num_val: examples to validate on.
        num_test: examples to test on.
        num_patches: number P.
        patch_size: numbers D in a patch.
        slow_strength: of the feature that is always there.
        fast_strength: of the other one.
        fast_share: share of examples that have it.
        test_fast_share: share in the test part; 0 tests on the slow feature alone, ``None`` takes ``fast_share``.
        noise: standard deviation of each number in the other patches.
        seed: of every draw; the order of training batches follows the global seed.
        num_workers: worker processes of each loader. Fetching is so cheap that zero is fastest.
        return_index: batches become ``(patches, targets, indices)``, with positions in the part, int64.

    Example:
        >>> data = TwoFeaturePatchesDataModule(batch_size=32, num_train=100)
        >>> data.setup()
        >>> patches, targets = next(iter(data.train_dataloader()))
        >>> patches.shape, targets.dtype
        (torch.Size([32, 3, 50]), torch.int64)
    """

    num_classes = 2

    @checked
    def __init__(
        self,
        batch_size: int = 64,
        num_train: int = 2000,
        num_val: int = 500,
        num_test: int = 2000,
        num_patches: int = 3,
        patch_size: int = 50,
        slow_strength: float = 0.2,
        fast_strength: float = 1.0,
        fast_share: float = 0.9,
        test_fast_share: float | None = None,
        noise: float = 0.125,
        seed: int = 0,
        num_workers: int = 0,
        return_index: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers)
        if min(num_train, num_val, num_test) < 1:
            raise ValueError(f"{num_train=}, {num_val=} and {num_test=}: each part needs at least one example.")
        test_share = fast_share if test_fast_share is None else test_fast_share
        for share in (fast_share, test_share):
            _check(num_train, num_patches, patch_size, slow_strength, fast_strength, share, noise)
        self.return_index, self.seed = return_index, seed
        self.sizes = {"train": num_train, "val": num_val, "test": num_test}
        self.shares = {"train": fast_share, "val": fast_share, "test": test_share}
        self.distribution = (num_patches, patch_size, slow_strength, fast_strength)
        self.noise = noise

    def setup(self, stage: str | None = None) -> None:
        """Draw all three parts whatever the stage; 10 ms at the default size."""
        self.train_set, self.val_set, self.test_set = map(self._part, ("train", "val", "test"))

    def _part(self, name: str) -> "PatchesPart":
        # By a hash: neighbouring seeds, the three parts and the weights of a network must not share random numbers.
        seed = hash_of(name, f"{self.seed}") >> 200  # 56 bits are left
        drawn = two_feature_patches(self.sizes[name], *self.distribution, self.shares[name], self.noise, seed)
        return PatchesPart(drawn, self.return_index)


class PatchesPart(Part):
    """Examples of one part, as the loader wants them."""

    targets: Tensor

    def __init__(self, drawn: TwoFeaturePatches, return_index: bool) -> None:
        self.patches, self.targets, self.has_fast = drawn
        self.return_index = return_index

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor | int, ...]]:
        """What a ``DataLoader`` calls for a whole batch."""
        columns: list[Sequence[Tensor | int]] = [list(self.patches[indices]), self.targets[indices].tolist()]
        if self.return_index:
            columns.append(indices)
        return list(zip(*columns, strict=True))


def _check(
    num_examples: int,
    num_patches: int,
    patch_size: int,
    slow_strength: float,
    fast_strength: float,
    fast_share: float,
    noise: float,
) -> None:
    if num_examples < 1:
        raise ValueError(f"num_examples={num_examples}: draw at least one.")
    if num_patches < 2:
        raise ValueError(f"num_patches={num_patches}: each of the two features takes a patch.")
    if patch_size < 3:
        raise ValueError(f"patch_size={patch_size}: two directions are the features', and noise needs one of its own.")
    for name, value in (("slow_strength", slow_strength), ("fast_strength", fast_strength), ("noise", noise)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value}: give a finite number, zero or more.")
    if slow_strength > fast_strength:
        raise ValueError(f"{slow_strength=} is more than {fast_strength=}: the slow feature is the weaker one.")
    if not 0 <= fast_share <= 1:
        raise ValueError(f"{fast_share=}: give the share of examples as a number in [0, 1].")
