"""What is averaged over all pairs of S vectors, in tiles: S^2 numbers are never held at once.

A product of matrices gives the inner products of a tile, and these the distances, where they do not cancel; the few
pairs that lie that near are taken again, by the difference of their vectors.

Shapes: S vectors, D features, A and B vectors on the sides of a tile, P pairs of a tile.
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

    def __init__(self, vectors: Tensor, lengths: Tensor, values: Tensor | None, sides: tuple[slice, slice]) -> None:
        self._vectors, self._lengths, self._values = vectors, lengths, values
        self._a, self._b = sides

    @cached_property
    def _inner(self) -> Tensor:
        return self._of_pairs(self._vectors[self._a] @ self._vectors[self._b].T)

    @cached_property
    def cosine(self) -> Tensor:
        return self._inner / self._of_pairs(self._lengths[self._a, None] * self._lengths[self._b])

    @cached_property
    def chord(self) -> Tensor:
        """Distance of the normalised vectors."""
        return _root(self._without_cancelling(2 - 2 * self.cosine, 2.0, self._lengths))

    @cached_property
    def log_chord(self) -> Tensor:
        return self.chord.log()

    @cached_property
    def off_simplex(self) -> Tensor:
        """How far the cosine is from that of a simplex."""
        return (self.cosine + 1 / max(len(self._vectors) - 1, 1)).abs()

    @cached_property
    def squared_distance(self) -> Tensor:
        squares = self._lengths.square()
        size_P = self._of_pairs(squares[self._a, None] + squares[self._b])
        return self._without_cancelling(size_P - 2 * self._inner, size_P.detach(), None)

    @cached_property
    def cdnv(self) -> Tensor:
        """Of class means and the variances of their classes: the mean variance over the squared distance."""
        if self._values is None:
            raise ValueError("this statistic of pairs needs the variances of the classes: give them.")
        return self._of_pairs(self._values[self._a, None] + self._values[self._b]) / (2 * self.squared_distance)

    def _of_pairs(self, matrix_AB: Tensor) -> Tensor:
        if self._a != self._b:
            return matrix_AB.reshape(-1)
        i_P, j_P = self._above_diagonal
        return matrix_AB[i_P, j_P]

    def _without_cancelling(self, square_P: Tensor, size: Tensor | float, lengths: Tensor | None) -> Tensor:
        """Squared distances of the vectors, over their ``lengths`` if given, those of near ones made anew."""
        near = (square_P.detach() < _NEAR * size).nonzero()[:, 0]
        if len(near) == 0:
            return square_P
        if self._a == self._b:
            i, j = (place[near] for place in self._above_diagonal)
        else:
            columns = self._b.stop - self._b.start
            i, j = near // columns, near % columns
        i, j = i + self._a.start, j + self._b.start

        def rows(places: Tensor) -> Tensor:
            return self._vectors[places] if lengths is None else self._vectors[places] / lengths[places, None]

        block = max(1, _CHUNK // max(self._vectors.shape[1], 1))
        pairs = zip(i.split(block), j.split(block), strict=True)
        exact = [(rows(first) - rows(second)).square().sum(1) for first, second in pairs]
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
    length_S = vector_norm(vectors, dim=1)
    sides = [slice(first, min(first + _SIDE, len(vectors))) for first in range(0, len(vectors), _SIDE)]
    for place, a in enumerate(sides):
        for b in sides[place:]:
            yield PairTile(vectors, length_S, values, (a, b))


def pair_statistics(vectors: Tensor, kinds: Collection[str], values: Tensor | None = None) -> dict[str, PairStatistics]:
    """Mean, variance and largest of chosen numbers over all pairs of the float64 vectors ``(S, D)``, in one sweep.

    Costs half the product of matrices ``(S, D)`` and ``(D, S)``, and memory for a few tiles.

    Args:
        vectors: ``(S, D)``.
        kinds: names of numbers of a :class:`PairTile`.
        values: ``(S,)``, for ``"cdnv"`` the variances of the classes whose means the vectors are.
    """
    check_shapes(vectors=(vectors, "SD"), values=(values, "S"))
    found: dict[str, tuple[int, PairStatistics]] = {}
    for tile in _tiles(vectors, values) if kinds else ():
        for kind in kinds:
            number_P: Tensor = getattr(tile, kind)
            if len(number_P):
                variance, mean = torch.var_mean(number_P, correction=0)
                here = len(number_P), PairStatistics(mean, variance, number_P.max())
                found[kind] = _joined(found[kind], here) if kind in found else here
    nan = vectors.sum() * torch.nan  # in the graph of the vectors
    return {kind: found[kind][1] if kind in found else PairStatistics(nan, nan, nan) for kind in kinds}


def _joined(first: tuple[int, PairStatistics], second: tuple[int, PairStatistics]) -> tuple[int, PairStatistics]:
    """Of both parts, without the difference of two large numbers.

    Tile by tile, and not of all at the end: small tensors kept of each would lie between the large ones that are freed,
    and the memory of a process would grow with the number of tiles.
    """
    (size, one), (other_size, other) = first, second
    share = other_size / (size + other_size)
    step = other.mean - one.mean
    variance = (1 - share) * one.variance + share * other.variance + share * (1 - share) * step.square()
    joined = PairStatistics(one.mean + share * step, variance, torch.maximum(one.largest, other.largest))
    return size + other_size, joined
