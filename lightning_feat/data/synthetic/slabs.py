"""Blocks of graded simplicity, each of which tells the class: from a linear one to many slabs.

Shapes: N examples, B blocks of one number each.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_feat.data.parts import PartsDataModule
from lightning_feat.data.synthetic.drawn import DrawnPart, check_sizes, random_rotation, seed_of
from lightning_feat.joints.arguments import checked


class SlabBlocks(NamedTuple):
    """Examples and what they are made of."""

    inputs: Tensor  # (N, B) float32, the blocks or their rotation
    targets: Tensor  # (N,) int64, 0 or 1
    blocks: Tensor  # (N, B) float32 in [-1, 1]
    noisy: Tensor  # (N, B) bool, where a block tells nothing


def slab_blocks(
    num_examples: int,
    slabs: Sequence[int] = (2, 5, 5, 5, 5),
    gap: float = 0.1,
    noise: float | Sequence[float] = 0.0,
    rotation: Tensor | None = None,
    seed: int = 0,
) -> SlabBlocks:
    r"""Draw examples of two classes, of which each block alone tells the class, by a rule that is more or less simple.

    Both classes are as likely. Given the class the blocks are independent. A block of k slabs is a number in [-1, 1],
    uniform in one of k intervals of equal width, which lie ``gap`` apart and belong to the classes in turn, each
    interval of the class as likely as its others. Two slabs are the **linear** block: a threshold tells the class, with
    a margin of ``gap``. With an odd k the outermost two belong to class 1.

    **What can be reached.** From a block that is not noisy the class can be read without error, by k - 1 thresholds; by
    one threshold it is right in

    .. math:: \tfrac12 + \tfrac{1}{k + 1} \ (k \text{ odd}), \qquad \tfrac12 + \tfrac1k \ (k \text{ even}).

    For odd k both classes have the mean zero, so that a linear discriminant gets nothing of the block. With
    the share p of ``noise`` a block alone is right in :math:`1 - p / 2`; where another block has none, the best rule
    still makes no error. So ``slabs=(2, 5, 5, 5, 5)`` with noise in the first block asks whether a network is content
    with the simple feature at an error of :math:`p / 2`, or learns one of the others, which have none. Kernel machines
    and networks that take what is simplest read the linear block alone (Shah et al.).

    Source: Shah, Tamuly, Raghunathan, Jain, Netrapalli, "The pitfalls of simplicity bias in neural networks", NeurIPS
    2020, arXiv 2006.07710, whose LMS-k are ``(2, k, k, ...)`` and whose MS-(5, 7) are ``(5, 7, 7, ...)``. From memory
    of the paper: the sets, the rotation, and that noise puts the linear block into its margin. Ours: widths, that all
    slabs of a class are as likely, and noise of other blocks, which lies in one of their gaps.

    Args:
        num_examples: number N.
        slabs: k of each block, at least 2.
        gap: between two slabs of a block.
        noise: share p of examples of which a block tells nothing: it lies in one of its gaps, whatever the class. One
            for all blocks, or one for each.
        rotation: ``(B, B)``, orthogonal: inputs are ``blocks @ rotation.T``, so that no axis shows a block.
        seed: of a generator of its own on the CPU.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> inputs, targets, blocks, noisy = slab_blocks(4, slabs=(2, 3))
        >>> (inputs[:, 0] > 0).long() == targets  # the linear block
        tensor([True, True, True, True])
        >>> (inputs[:, 1].abs() > 1 / 3).long() == targets  # three slabs
        tensor([True, True, True, True])
    """
    shares = _check(num_examples, slabs, gap, noise, rotation)
    generator = torch.Generator().manual_seed(seed)
    targets_N = torch.randint(2, (num_examples,), generator=generator)
    columns, noisy = [], []
    for k, share in zip(slabs, shares, strict=True):
        draws_4N = torch.rand(4, num_examples, generator=generator, dtype=torch.float64)
        width = (2 - (k - 1) * gap) / k
        first_N = torch.where(targets_N == (k % 2), 0, 1)  # of the slabs of that class, from the left
        number_N = torch.where(first_N == 0, (k + 1) // 2, k // 2)
        slab_N = first_N + 2 * (draws_4N[0] * number_N).long().clamp(max=k - 1)
        inside_N = -1 + slab_N * (width + gap) + width * draws_4N[1]
        gap_N = (draws_4N[0] * (k - 1)).long()
        between_N = -1 + width + gap_N * (width + gap) + gap * draws_4N[2]
        noisy.append(draws_4N[3] < share)
        columns.append(torch.where(noisy[-1], between_N, inside_N))
    blocks_NB = torch.stack(columns, dim=1).float()
    inputs_NB = blocks_NB if rotation is None else blocks_NB @ rotation.T.to(blocks_NB)
    return SlabBlocks(inputs_NB, targets_N, blocks_NB, torch.stack(noisy, dim=1))


def block_classes(blocks: Tensor, slabs: Sequence[int], gap: float = 0.1) -> Tensor:
    """Class ``(N, B)`` that each block ``(N, B)`` stands for: that of the slab it lies in, or next to.

    Example:
        >>> block_classes(torch.tensor([[0.6, 0.0], [-0.6, 0.9]]), slabs=(2, 3))
        tensor([[1, 0],
                [0, 1]])
    """
    k_B = torch.tensor([*slabs], device=blocks.device)
    slab_NB = ((blocks.double() + 1 + gap / 2) / ((2 + gap) / k_B)).floor().long()
    return (slab_NB.clamp(min=0).minimum(k_B - 1) + k_B % 2) % 2


class SlabBlocksDataModule(PartsDataModule):
    """Examples of :func:`slab_blocks`, which says what they are, in batches ``(inputs, targets)``.

    After ``setup``, ``train_set``, ``val_set`` and ``test_set`` are the parts, each with ``inputs`` ``(N, B)``,
    ``targets``, ``latents`` (the blocks) and ``noisy``. A part depends on its size, the arguments of the distribution
    and the seed alone.

    Args:
        batch_size: examples in a batch, at most.
        num_train: examples to train on.
        num_val: examples to validate on.
        num_test: examples to test on.
        slabs: k of each block: ``(2, k, k, ...)`` for LMS-k, ``(5, 7, 7, ...)`` for MS-(5, 7).
        gap: between two slabs of a block.
        noise: share of examples of which a block tells nothing, one for all blocks or one for each.
        rotate: turn the blocks by one random rotation, the same for all parts.
        seed: of every draw and the rotation; the order of training batches follows the global seed.
        num_workers: worker processes of each loader. Fetching is so cheap that zero is fastest.
        return_index: batches become ``(inputs, targets, indices)``, with positions in the part, int64.

    Attributes:
        rotation: ``(B, B)``; None without one.

    Example:
        >>> data = SlabBlocksDataModule(batch_size=32, num_train=100, noise=[0.1, 0, 0, 0, 0])
        >>> data.setup()
        >>> inputs, targets = next(iter(data.train_dataloader()))
        >>> inputs.shape, targets.dtype
        (torch.Size([32, 5]), torch.int64)
    """

    num_classes = 2

    @checked
    def __init__(
        self,
        batch_size: int = 64,
        num_train: int = 10_000,
        num_val: int = 2_000,
        num_test: int = 2_000,
        slabs: Sequence[int] = (2, 5, 5, 5, 5),
        gap: float = 0.1,
        noise: float | Sequence[float] = 0.0,
        rotate: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        return_index: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers)
        check_sizes(num_train, num_val, num_test)
        _check(num_train, slabs, gap, noise, None)
        self.sizes = {"train": num_train, "val": num_val, "test": num_test}
        self.slabs, self.gap, self.noise, self.seed, self.return_index = tuple(slabs), gap, noise, seed, return_index
        self.rotation = random_rotation(len(self.slabs), seed_of("rotation", seed)) if rotate else None

    def setup(self, stage: str | None = None) -> None:
        """Draw all three parts whatever the stage."""
        self.train_set, self.val_set, self.test_set = map(self._part, ("train", "val", "test"))

    def exchange(self, block: int) -> Callable[[Tensor, Tensor], Tensor]:
        """A function of inputs and others ``(N, B)`` that gives the inputs this block of the others, and leaves the
        rest; of rotated inputs, too. ``callbacks.FeatureRelianceMonitor`` takes it for a block.
        """
        if not 0 <= block < len(self.slabs):
            raise ValueError(f"block={block}: there are {len(self.slabs)} blocks, from 0 on.")
        axis = torch.eye(len(self.slabs))[block] if self.rotation is None else self.rotation[:, block]
        return _Exchange(axis)

    def _part(self, name: str) -> "SlabsPart":
        drawn = slab_blocks(self.sizes[name], self.slabs, self.gap, self.noise, self.rotation, seed_of(name, self.seed))
        return SlabsPart(drawn, self.return_index)


class SlabsPart(DrawnPart):
    """Examples of one part, with ``noisy`` ``(N, B)``."""

    def __init__(self, drawn: SlabBlocks, return_index: bool) -> None:
        super().__init__(drawn.inputs, drawn.targets, drawn.blocks, return_index)
        self.noisy = drawn.noisy


class _Exchange:
    """Along one direction; an object, because callbacks are pickled."""

    def __init__(self, axis: Tensor) -> None:
        self.axis = axis

    def __call__(self, inputs: Tensor, others: Tensor) -> Tensor:
        axis = self.axis.to(inputs)
        return inputs + ((others - inputs) @ axis)[:, None] * axis


def _check(
    num_examples: int, slabs: Sequence[int], gap: float, noise: float | Sequence[float], rotation: Tensor | None
) -> list[float]:
    if num_examples < 1:
        raise ValueError(f"num_examples={num_examples}: draw at least one.")
    if not slabs or min(slabs) < 2:
        raise ValueError(f"slabs={[*slabs]}: give at least one block, each of 2 slabs (linear) or more.")
    most = 2 / (max(slabs) - 1)
    if not 0 <= gap < most:
        raise ValueError(f"gap={gap}: {max(slabs)} slabs in [-1, 1] leave room for gaps from 0 to below {most:.3g}.")
    shares = [float(noise)] * len(slabs) if isinstance(noise, (int, float)) else [float(share) for share in noise]
    if len(shares) != len(slabs) or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"noise={noise}: give a share in [0, 1] for all {len(slabs)} blocks, or one for each.")
    if any(shares) and gap == 0:
        raise ValueError(f"noise={noise} lies in the gaps between the slabs, but gap=0.")
    if rotation is not None and rotation.shape != (len(slabs), len(slabs)):
        raise ValueError(f"rotation {tuple(rotation.shape)} must be ({len(slabs)}, {len(slabs)}).")
    return shares
