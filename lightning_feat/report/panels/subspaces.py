"""Where the classes of the head are subspaces: the angles between them."""

import torch

from lightning_feat.functional.grassmann import pairwise_principal_angles
from lightning_feat.report.feature_set import FeatureSet, known
from lightning_feat.report.panels.panel import Panel, by_similarity, heat_map, number

_MOST = 60


def mean_angles(basis: torch.Tensor) -> torch.Tensor:
    """``(C, C)`` mean principal angle of each two subspaces, in degrees; zero on the diagonal."""
    size = len(basis)
    angle_P = pairwise_principal_angles(basis).mean(1).rad2deg()
    i, j = torch.triu_indices(size, size, 1)
    matrix = angle_P.new_zeros(size, size)
    matrix[i, j] = matrix[j, i] = angle_P
    return matrix


def subspace_panel(rows: FeatureSet) -> Panel:
    """Mean principal angle of each two class subspaces."""
    basis = known(rows.head.basis, "a head of subspaces")
    matrix = mean_angles(basis[:_MOST])
    labels = rows.labels() if rows.num_classes >= len(matrix) else [rows.label(c) for c in range(len(matrix))]
    order = by_similarity(-matrix)
    names, matrix = [labels[i] for i in order], matrix[order][:, order]
    i, j = torch.triu_indices(len(matrix), len(matrix), 1)
    angles = matrix[i, j]
    least = int(angles.argmin())
    text = (
        f"The classes of {rows.head.layer} are subspaces of dimension {basis.shape[1]}. Every two lie "
        f"{number(float(angles.mean()))} degrees apart on average, closest are {names[i[least]]} and {names[j[least]]} "
        f"with {number(float(angles.min()))}; 90 degrees is orthogonal."
    )
    scheme = {"scheme": "viridis", "domain": [0, 90]}
    chart = heat_map(matrix, names, names, ("class", "class"), "mean principal angle (degrees)", scheme, ".0f", "low")
    cells = [[names[k], *(number(float(v)) for v in matrix[k])] for k in range(len(names))]
    return Panel(
        "subspaces",
        "Angles between the subspaces of the head",
        "mean principal angle of each two class subspaces, in degrees.",
        text,
        [chart],
        ["class", *names],
        cells,
    )
