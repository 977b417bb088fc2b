"""The numbers of one layer that several panels show, each made once by ``functional``."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import ClassSums, class_sums
from lightning_feat.functional.common.pictures import PrincipalCoordinates, principal_coordinates
from lightning_feat.functional.common.second_pass import CenterSums, center_sums, class_centers
from lightning_feat.functional.neural_collapse import (
    between_class_spectrum,
    centered_class_means,
    collapse_measures,
    cosine_matrix,
    covariance_spectrum,
    seli_vectors,
    within_class_scatter,
)
from lightning_feat.functional.transfer import nearest_neighbours
from lightning_feat.report.feature_set import FeatureSet, Head, known

NEIGHBOURS = 8
MEASURES = (
    "nc1_quotient",
    "cdnv",
    "between_effective_rank",
    "nc2_equinorm",
    "nc2_cosine_std",
    "nc2_etf_error",
    "ncc_accuracy",
    "nc4_mismatch",
    "nc3",
)


@dataclass
class Measured:
    """One layer of a set.

    Args:
        rows: the set; features must be finite.
        layer: label of the layer.
    """

    rows: FeatureSet
    layer: str

    @property
    def features(self) -> Tensor:
        """``(N, D)``."""
        return self.rows.features[self.layer]

    @property
    def targets(self) -> Tensor:
        """``(N,)`` class indices."""
        return known(self.rows.targets, "targets")

    @cached_property
    def principal(self) -> PrincipalCoordinates:
        """The two directions of largest spread."""
        return principal_coordinates(self.features)

    @cached_property
    def neighbours(self) -> tuple[Tensor, Tensor]:
        """Indices and cosines of the nearest samples, features centred: else all cosines of ReLU features are large."""
        return nearest_neighbours(self.features - self.features.mean(0), NEIGHBOURS)

    @cached_property
    def totals(self) -> ClassSums:
        """Sums of each class."""
        return class_sums(self.features, self.targets, self.rows.num_classes)

    @cached_property
    def residuals(self) -> CenterSums:
        """Sums of the second pass."""
        logits = self.rows.class_scores if self.layer == self.rows.head.feeds else None
        if logits is not None and logits.shape[1] != self.rows.num_classes:
            logits = None
        return center_sums(self.features, self.targets, logits, class_centers(self.totals))

    @cached_property
    def within(self) -> Tensor:
        """``(D,)`` eigenvalues of the covariance within classes."""
        scatter = within_class_scatter(self.features, self.targets, class_centers(self.totals))
        return covariance_spectrum(scatter / len(self.features))

    @cached_property
    def between(self) -> Tensor:
        """``(R,)`` eigenvalues of the covariance of the class means."""
        return between_class_spectrum(self.totals)

    @cached_property
    def whole(self) -> Tensor:
        """``(D,)`` eigenvalues of the covariance of all samples."""
        centred = self.features.double() - self.features.double().mean(0)
        return covariance_spectrum(centred.T @ centred / len(centred))

    @cached_property
    def cosines(self) -> Tensor:
        """``(S, S)`` of the centred means of the classes with samples."""
        return cosine_matrix(centered_class_means(self.totals))

    @property
    def head(self) -> Head | None:
        """The classifier, where it gets the features of this layer."""
        head = self.rows.head
        fits = head.weight is not None and head.weight.shape == (self.rows.num_classes, self.features.shape[1])
        return head if head.feeds == self.layer and fits else None

    @cached_property
    def collapse(self) -> dict[str, float]:
        """The measures of collapse that are defined here, by name."""
        weight = None if self.head is None else self.head.weight
        wanted = [name for name in MEASURES if name != "nc3" or weight is not None]
        found = collapse_measures(self.totals, residuals=self.residuals, weight=weight, measures=wanted)
        return {name: float(found[name]) for name in MEASURES if name in found}

    @cached_property
    def expected(self) -> dict[str, float]:
        """The same where all samples lie on class means in the geometry of ``seli_vectors`` for these class counts;
        empty where the layer is too narrow for it, or there is one class.
        """
        counts = self.totals.counts[self.totals.counts > 0]
        if len(counts) < 2 or self.features.shape[1] < len(counts) - 1:
            return {}
        weight, mean = seli_vectors(counts)
        totals = ClassSums(counts, mean * counts[:, None], mean.square().sum(1) * counts)
        names = ["between_effective_rank", "nc2_equinorm", "nc2_cosine_std", "nc2_etf_error", "nc3"]
        found = {name: float(value) for name, value in collapse_measures(totals, weight=weight, measures=names).items()}
        collapsed = {"nc1_quotient": 0.0, "cdnv": 0.0, "ncc_accuracy": 1.0, "nc4_mismatch": 0.0}
        return {name: {**collapsed, **found}[name] for name in self.collapse}

    @cached_property
    def expected_cosines(self) -> Tensor | None:
        """``(S, S)`` of the class means in that geometry."""
        counts = self.totals.counts[self.totals.counts > 0]
        if not self.expected:
            return None
        return cosine_matrix(seli_vectors(counts)[1])


def is_usable(features: Tensor) -> bool:
    """Whether all numbers are finite."""
    return bool(torch.isfinite(features).all())
