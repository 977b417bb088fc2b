"""How class subspaces lie to one another, and how far they have moved; from a basis (C, k, D) with orthonormal rows.

Shapes: C classes, k dimensions of a subspace, D features, P pairs of classes.
"""

from abc import abstractmethod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import to_float64
from lightning_feat.functional.grassmann import geodesic_distance, orthonormality_error, principal_angles
from lightning_feat.functional.grassmann.angles import pairwise_principal_angles
from lightning_feat.joints.arguments import checked
from lightning_feat.metrics.common import SumsMetric, at_least_one

_BLOCK_BYTES = 64 * 2**20  # of the bases of the pairs that are compared at once


@torch.no_grad()
def subspace_angles(basis: Tensor, max_pairs: int = 10_000, seed: int = 0) -> Tensor:
    """Principal angles between class subspaces ``(P, k)``, ascending in each pair, in radians.

    Of all ``C (C - 1) / 2`` pairs where these are at most ``max_pairs`` (up to 141 classes by default); else of
    ``max_pairs`` different pairs, drawn by ``seed`` without touching the global random numbers, the same ones at every
    call. The smallest angle of a sample is not the smallest of all.
    """
    num_classes = len(basis)
    all_pairs = num_classes * (num_classes - 1) // 2
    if max_pairs < 1:
        raise ValueError(f"max_pairs={max_pairs} must be at least 1.")
    if all_pairs <= max_pairs:
        return pairwise_principal_angles(basis)
    lots_P = _distinct(all_pairs, max_pairs, torch.Generator().manual_seed(seed))
    first_P, second_P = (place.to(basis.device) for place in _pair_of(lots_P))
    block = max(1, _BLOCK_BYTES // (basis[0].numel() * basis.element_size()))
    angles = [
        principal_angles(basis[i], basis[j]) for i, j in zip(first_P.split(block), second_P.split(block), strict=True)
    ]
    return torch.cat(angles)


@torch.no_grad()
def subspace_distances(basis: Tensor, start: Tensor) -> Tensor:
    """Geodesic distance of each class subspace from where it started, ``(C,)``, in radians: at most sqrt(k) pi / 2."""
    if basis.shape != start.shape:
        raise ValueError(f"the subspaces have shape {tuple(basis.shape)} but started as {tuple(start.shape)}.")
    block = max(1, _BLOCK_BYTES // (basis[0].numel() * basis.element_size()))
    pairs = zip(basis.split(block), start.split(block), strict=True)
    return torch.cat([geodesic_distance(now, then.to(now)) for now, then in pairs])


class SubspaceGeometry(NamedTuple):
    """How class subspaces lie and have moved."""

    angles: Tensor  # (P, k) principal angles of the pairs that were compared, in degrees
    values: dict[str, Tensor]  # scalars by name: angles in degrees, distances in radians


@torch.no_grad()
def subspace_geometry(
    basis: Tensor, start: Tensor | None = None, max_pairs: int = 10_000, seed: int = 0, alone: bool = True
) -> SubspaceGeometry:
    """All numbers that tell how class subspaces lie to one another, and how far they are from where they started.

    Args:
        basis: ``(C, k, D)`` with orthonormal rows.
        start: the basis that they started from; None leaves out ``distance_from_start_mean`` and ``_max``.
        max_pairs: see :func:`subspace_angles`, of which ``angle_mean`` is the mean.
        seed: of the pairs.
        alone: with ``smallest_angle``, of all pairs, which takes longest; False where a ``GrassmannHead`` gives it.

    Returns:
        What there is: a single class has no angles.
    """
    values = {"orthonormality_error": orthonormality_error(basis).max()}
    if start is not None:
        distances = subspace_distances(basis, start)
        values |= {"distance_from_start_mean": distances.mean(), "distance_from_start_max": distances.max()}
    angles = subspace_angles(basis, max_pairs, seed).rad2deg()
    if len(angles):
        values["angle_mean"] = angles.mean()
        if alone:
            values["smallest_angle"] = pairwise_principal_angles(basis).min().rad2deg()
    return SubspaceGeometry(angles, values)


class _BasisMetric(SumsMetric):
    """Mean of a number of a basis over the calls of ``update`` since ``reset``; the same on every process."""

    plot_lower_bound = 0.0
    _state: str

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Named by the class: of two metrics with equal states a MetricCollection keeps one.
        for name in (self._state, f"{self._state}_updates"):
            self._add_sum(name)

    def update(self, basis: Tensor) -> None:
        """Add the number of this ``basis``, ``(C, k, D)`` with orthonormal rows, all of it on every process."""
        if basis.ndim != 3:
            raise ValueError(f"basis must be (C, k, D), got {tuple(basis.shape)}: store a basis as rows")
        value = to_float64(self._measure(basis.detach())).to(getattr(self, self._state))
        setattr(self, self._state, getattr(self, self._state) + value)
        setattr(self, f"{self._state}_updates", getattr(self, f"{self._state}_updates") + 1)

    @abstractmethod
    def _measure(self, basis: Tensor) -> Tensor:
        """The number of one basis."""

    def compute(self) -> Tensor:
        """A float64 scalar; nan before any update."""
        value: Tensor = getattr(self, self._state) / getattr(self, f"{self._state}_updates")
        return value


class SubspaceAngle(_BasisMetric):
    """Principal angle between class subspaces, in degrees: the mean of all, or the smallest of any two.

    Call ``update`` once where you measure, an epoch's end for example; several calls are averaged.

    Args:
        statistic: ``"mean"`` over the angles of all pairs, or of ``max_pairs`` drawn ones; ``"smallest"`` of all pairs.
        max_pairs: how many pairs the mean takes at most.
        seed: of the pairs that are drawn.
        **kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> metric = SubspaceAngle()
        >>> metric.update(torch.eye(4).view(2, 2, 4))  # two orthogonal planes
        >>> metric.compute()
        tensor(90., dtype=torch.float64)
    """

    plot_upper_bound = 90.0

    @checked
    def __init__(
        self,
        statistic: Literal["mean", "smallest"] = "mean",
        max_pairs: int = 10_000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if statistic not in ("mean", "smallest"):
            raise ValueError(f"statistic={statistic!r}: choose 'mean' or 'smallest'")
        self._state = f"{statistic}_subspace_angle"
        super().__init__(**kwargs)
        self.statistic, self.seed = statistic, seed
        (self.max_pairs,) = at_least_one(max_pairs=max_pairs)

    def _measure(self, basis: Tensor) -> Tensor:
        if self.statistic == "mean":
            return subspace_angles(basis, self.max_pairs, self.seed).mean().rad2deg()
        angles = pairwise_principal_angles(basis).flatten()
        return angles.min().rad2deg() if len(angles) else angles.new_full((), torch.nan)


class SubspaceDistance(_BasisMetric):
    """Geodesic distance of class subspaces from where they started, in radians: the mean over classes or the largest.

    Args:
        start: the basis ``(C, k, D)`` to measure from; None takes that of the first ``update``, which ``reset`` keeps.
        statistic: ``"mean"`` or ``"largest"``.
        **kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> metric = SubspaceDistance(start=torch.tensor([[[1.0, 0.0]]]))
        >>> metric.update(torch.tensor([[[0.0, 1.0]]]))
        >>> metric.compute()  # a right angle
        tensor(1.5708, dtype=torch.float64)
    """

    @checked
    def __init__(
        self, start: Tensor | None = None, statistic: Literal["mean", "largest"] = "mean", **kwargs: Any
    ) -> None:
        if statistic not in ("mean", "largest"):
            raise ValueError(f"statistic={statistic!r}: choose 'mean' or 'largest'")
        self._state = f"{statistic}_subspace_distance"
        super().__init__(**kwargs)
        self.statistic = statistic
        self.start = None if start is None else start.detach().clone()

    def _measure(self, basis: Tensor) -> Tensor:
        if self.start is None:
            self.start = basis.clone()
        distances = subspace_distances(basis, self.start.to(basis.device))
        return distances.mean() if self.statistic == "mean" else distances.max()


class OrthonormalityError(_BasisMetric):
    """Largest entry of ``abs(S S^T - I)`` over all class subspaces; zero is orthonormal.

    Some 1e-6 is the rounding of float32; from 1e-4 on the basis has left its manifold.

    Example:
        >>> metric = OrthonormalityError()
        >>> metric.update(2 * torch.eye(2)[None])
        >>> metric.compute()
        tensor(3., dtype=torch.float64)
    """

    higher_is_better = False
    _state = "orthonormality_error"

    def _measure(self, basis: Tensor) -> Tensor:
        return orthonormality_error(basis).max()


def _distinct(size: int, number: int, generator: torch.Generator) -> Tensor:
    """``number`` different integers below ``size``, ascending, in memory that does not grow with ``size``."""
    if size <= 4 * number:
        return torch.randperm(size, generator=generator)[:number].sort().values
    drawn = torch.randint(size, (2 * number,), generator=generator).unique()  # at least 7 / 4 of number, but for luck
    while len(drawn) < number:
        drawn = torch.cat([drawn, torch.randint(size, (number,), generator=generator)]).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)[:number]].sort().values


def _pair_of(lots_P: Tensor) -> tuple[Tensor, Tensor]:
    """The pair ``(i, j)``, i < j, that stands at place ``j (j - 1) / 2 + i`` of all pairs."""
    j_P = ((1 + (1 + 8 * lots_P.double()).sqrt()) / 2).floor().long()
    j_P = j_P - (j_P * (j_P - 1) // 2 > lots_P).long()  # rounding at a whole number
    j_P = j_P + (j_P * (j_P + 1) // 2 <= lots_P).long()
    return lots_P - j_P * (j_P - 1) // 2, j_P
