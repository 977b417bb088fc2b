"""What is averaged over all pairs of S vectors, in tiles: S^2 numbers are never held at once.

A product of matrices gives the inner products of a tile, and these the distances, where they do not cancel; the few
pairs that lie that near are taken again, by the difference of their vectors.

Shapes: S vectors, D features, A and B vectors on the sides of a tile, P pairs of a tile, T tiles.
"""

from collections.abc import Collection, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_feat.functional.common.shapes import check_shapes

_SIDE = 512  # of a tile: 2 MiB for each number of a pair, which stay in the cache
_NEAR = 1e-3  # squared distance over squared lengths, down to which an inner product leaves 1e-12 of it or better
_CHUNK = 2**21  # entries of the differences held at once: 16 MiB


class PairStatistics(NamedTuple):
    """Of one number over all pairs; all nan where there is none."""

    mean: Tensor
    variance: Tensor  # over P and not P - 1
    largest: Tensor

    @property
    def std(self) -> Tensor:
        return _root(self.variance)


class PairTile:
    """Pairs of vectors, and numbers ``(P,)`` of each pair, made on demand."""

    def __init__(
        self, vectors: Tensor, units: Tensor, squares: Tensor, values: Tensor | None, sides: tuple[slice, slice]
    ) -> None:
        self._vectors, self._units, self._squares, self._values = vectors, units, squares, values
        self._a, self._b = sides

    @cached_property
    def cosine(self) -> Tensor:
        return self._of_pairs(self._units[self._a] @ self._units[self._b].T)

    @cached_property
    def chord(self) -> Tensor:
        """Distance of the normalised vectors."""
        rough_P = 2 - 2 * self.cosine
        return _root(self._without_cancelling(rough_P, torch.full_like(rough_P, 2.0), self._units))

    @cached_property
    def log_chord(self) -> Tensor:
        return self.chord.log()

    @cached_property
    def off_simplex(self) -> Tensor:
        """How far the cosine is from that of a simplex."""
        return (self.cosine + 1 / max(len(self._vectors) - 1, 1)).abs()

    @cached_property
    def squared_distance(self) -> Tensor:
        size_P = self._of_pairs(self._squares[self._a, None] + self._squares[self._b])
        inner_P = self._of_pairs(self._vectors[self._a] @ self._vectors[self._b].T)
        return self._without_cancelling(size_P - 2 * inner_P, size_P, self._vectors)

    @cached_property
    def cdnv(self) -> Tensor:
        """Of class means and the variances of their classes: the mean variance over the squared distance."""
        assert self._values is not None, "give the variances of the classes"
        return self._of_pairs(self._values[self._a, None] + self._values[self._b]) / (2 * self.squared_distance)

    def _of_pairs(self, matrix_AB: Tensor) -> Tensor:
        if self._a != self._b:
            return matrix_AB.reshape(-1)
        i_P, j_P = self._above_diagonal
        return matrix_AB[i_P, j_P]

    def _without_cancelling(self, square_P: Tensor, size_P: Tensor, vectors: Tensor) -> Tensor:
        near = (square_P.detach() < _NEAR * size_P.detach()).nonzero()[:, 0]
        if len(near) == 0:
            return square_P
        if self._a == self._b:
            i, j = (place[near] for place in self._above_diagonal)
        else:
            columns = self._b.stop - self._b.start
            i, j = near // columns, near % columns
        i, j = i + self._a.start, j + self._b.start
        block = max(1, _CHUNK // max(vectors.shape[1], 1))
        pairs = zip(i.split(block), j.split(block), strict=True)
        exact = [(vectors[first] - vectors[second]).square().sum(1) for first, second in pairs]
        return square_P.index_put((near,), torch.cat(exact))

    @cached_property
    def _above_diagonal(self) -> tuple[Tensor, Tensor]:
        size = self._a.stop - self._a.start
        i_P, j_P = torch.triu_indices(size, size, 1, device=self._vectors.device)
        return i_P, j_P


def _root(square: Tensor) -> Tensor:
    """Square root, of gradient zero, and not infinite, at zero."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), square)


def _tiles(vectors: Tensor, values: Tensor | None) -> Iterator[PairTile]:
    """Tiles that hold each pair once."""
    unit_SD, square_S = vectors / vector_norm(vectors, dim=1, keepdim=True), vectors.square().sum(1)
    sides = [slice(first, min(first + _SIDE, len(vectors))) for first in range(0, len(vectors), _SIDE)]
    for place, a in enumerate(sides):
        for b in sides[place:]:
            yield PairTile(vectors, unit_SD, square_S, values, (a, b))


def pair_statistics(vectors: Tensor, kinds: Collection[str], values: Tensor | None = None) -> dict[str, PairStatistics]:
    """Mean, variance and largest of chosen numbers over all pairs of the float64 vectors ``(S, D)``, in one sweep.

    Costs half the product of matrices ``(S, D)`` and ``(D, S)``, and memory for a few tiles.

    Args:
        vectors: ``(S, D)``.
        kinds: names of numbers of a :class:`PairTile`.
        values: ``(S,)``, for ``"cdnv"`` the variances of the classes whose means the vectors are.
    """
    check_shapes(vectors=(vectors, "SD"), values=(values, "S"))
    parts: dict[str, list[tuple[int, Tensor, Tensor, Tensor]]] = {kind: [] for kind in kinds}
    for tile in _tiles(vectors, values) if kinds else ():
        for kind, part in parts.items():
            number_P: Tensor = getattr(tile, kind)
            if len(number_P):
                variance, mean = torch.var_mean(number_P, correction=0)
                part.append((len(number_P), mean, variance, number_P.max()))
    return {kind: _joined(part, vectors) for kind, part in parts.items()}


def _joined(parts: list[tuple[int, Tensor, Tensor, Tensor]], like: Tensor) -> PairStatistics:
    if not parts:
        nan = like.sum() * torch.nan  # in the graph of the vectors
        return PairStatistics(nan, nan, nan)
    share_T = like.new_tensor([number for number, *_ in parts])
    share_T = share_T / share_T.sum()
    mean_T, variance_T, largest_T = (torch.stack(values) for values in list(zip(*parts, strict=True))[1:])
    mean = (share_T * mean_T).sum()
    # Within the tiles and between them, without the difference of two large numbers.
    return PairStatistics(mean, (share_T * (variance_T + (mean_T - mean).square())).sum(), largest_T.max())
