"""What of neural collapse is worth a picture, and no single number says: all angles, and all directions.

Shapes: D features, C classes, S classes with samples, V classes shown, R directions that the class means span.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_feat.functional.common.class_sums import ClassSums, GlobalMean, centered_class_means
from lightning_feat.functional.common.directions import FLOAT32_ROUNDING
from lightning_feat.functional.neural_collapse.means import cosine_matrix
from lightning_feat.functional.neural_collapse.variability import between_class_spectrum, covariance_spectrum


class CollapsePicture(NamedTuple):
    """Angles and spectra of one moment."""

    classes: Tensor  # (V,) indices of the classes shown
    cosines: Tensor  # (V, V) cosines of their centred means
    num_classes: int  # S, classes with samples
    num_features: int  # D
    between: Tensor  # (R,) eigenvalues of the scatter between classes, largest first; R is at most S - 1
    within: Tensor | None  # (D,) eigenvalues of the scatter within classes, largest first; None where not known

    @property
    def simplex_cosine(self) -> float | None:
        """The cosine of any two corners of a simplex of S classes; None where D features cannot hold it."""
        fits = self.num_classes > 1 and self.num_features >= self.num_classes - 1
        return -1 / (self.num_classes - 1) if fits else None


def collapse_picture(
    totals: ClassSums,
    within: Tensor | None = None,
    global_mean: GlobalMean = "classes",
    most_classes: int = 100,
    rounding: float = FLOAT32_ROUNDING,
) -> CollapsePicture:
    """Angles of the class means, and the spectra of the scatter between and within classes.

    Costs the eigenvectors of a Gram matrix of the class means, and with ``within`` the eigenvalues of a ``(D, D)``
    matrix.

    Args:
        totals: sums of the first pass.
        within: ``(D, D)`` within-class covariance of the same samples, from ``within_class_covariance`` or
            ``within_class_scatter``.
        global_mean: what class means are centred by.
        most_classes: of more classes as many as these are shown, evenly spaced.
        rounding: relative rounding of the features, ``rounding_of`` the dtype they came in.
    """
    seen_S = (totals.counts > 0).nonzero()[:, 0]
    mean_SD = centered_class_means(totals, global_mean)
    shown_V = torch.arange(len(seen_S), device=seen_S.device)
    if len(seen_S) > most_classes:
        shown_V = torch.linspace(0, len(seen_S) - 1, most_classes, dtype=torch.float64).long().to(seen_S.device)
    return CollapsePicture(
        classes=seen_S[shown_V],
        cosines=cosine_matrix(mean_SD[shown_V]),
        num_classes=len(seen_S),
        num_features=totals.sums.shape[1],
        between=between_class_spectrum(totals, global_mean, rounding),
        within=None if within is None else covariance_spectrum(within),
    )
