"""What the synthetic sets of vectors share: a part of drawn examples, a seed for each part, a random rotation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_feat.data.parts import Part, hash_of


class DrawnPart(Part):
    """Examples of one part, as the loader wants them.

    Attributes:
        inputs: ``(N, D)`` float32.
        targets: ``(N,)`` 0 or 1.
        latents: ``(N, ...)`` what the inputs were made of.
    """

    targets: Tensor

    def __init__(self, inputs: Tensor, targets: Tensor, latents: Tensor, return_index: bool) -> None:
        self.inputs, self.targets, self.latents, self.return_index = inputs, targets, latents, return_index

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor | int, ...]]:
        columns: list[Sequence[Tensor | int]] = [list(self.inputs[indices]), self.targets[indices].tolist()]
        if self.return_index:
            columns.append(indices)
        return list(zip(*columns, strict=True))


def seed_of(name: str, seed: int) -> int:
    """By a hash: neighbouring seeds, the parts and the weights of a network must not share random numbers."""
    return hash_of(name, f"{seed}") >> 200  # 56 bits are left


def random_rotation(size: int, seed: int) -> Tensor:
    """An orthogonal matrix ``(size, size)``, float32, uniformly distributed, by a generator of its own on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()  # without the signs it would not be uniform


def check_sizes(num_train: int, num_val: int, num_test: int) -> None:
    """Raise a ``ValueError`` unless each part has an example."""
    if min(num_train, num_val, num_test) < 1:
        raise ValueError(f"{num_train=}, {num_val=} and {num_test=}: each part needs at least one example.")
