"""Subspaces as classes: logits, angles, distances, and steps along their manifold."""

from lightning_feat.functional.common.precision import full_precision
from lightning_feat.functional.grassmann.angles import pairwise_principal_angles
from lightning_feat.functional.grassmann.geodesic import cos_and_sinc, geodesic_
from lightning_feat.functional.grassmann.subspaces import (
    chordal_distance,
    geodesic_distance,
    orthonormality_error,
    polar_projection,
    principal_angles,
    random_basis,
    subspace_logits,
    svdvals_or_nan,
    tangent_projection,
)

__all__ = [
    "chordal_distance",
    "cos_and_sinc",
    "full_precision",
    "geodesic_",
    "geodesic_distance",
    "orthonormality_error",
    "pairwise_principal_angles",
    "polar_projection",
    "principal_angles",
    "random_basis",
    "subspace_logits",
    "svdvals_or_nan",
    "tangent_projection",
]
