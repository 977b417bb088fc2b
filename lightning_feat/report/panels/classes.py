"""Classes against each other: how alike their means are, and which are taken for which."""

import torch

from lightning_feat.report.feature_set import FeatureSet, known
from lightning_feat.report.measured import Measured
from lightning_feat.report.panels.panel import (
    MOST_CLASSES,
    Panel,
    by_similarity,
    heat_map,
    largest_classes,
    number,
    percent,
)

_COSINES = {"scheme": "blueorange", "domain": [-1, 1], "domainMid": 0}
_SHARES = {"scheme": "blues", "domain": [0, 1]}


def cosine_panel(measured: Measured) -> Panel:
    """Cosines between the centred class means, the classes ordered so that alike stands beside alike."""
    labels = measured.rows.labels()
    shown = largest_classes(measured.totals.counts)
    seen = [int(c) for c in (measured.totals.counts > 0).nonzero()[:, 0]]
    places = torch.tensor([seen.index(c) for c in shown])
    matrix = measured.cosines[places][:, places]
    order = by_similarity(matrix)
    matrix, names = matrix[order][:, order], [labels[shown[i]] for i in order]
    off = matrix.masked_fill(torch.eye(len(names), dtype=torch.bool), -torch.inf)
    most = divmod(int(off.argmax()), len(names))
    expected = -1 / (len(seen) - 1)
    text = (
        f"Most alike are the means of {names[most[0]]} and {names[most[1]]}, with cosine {number(float(off.max()))}. "
        f"Equally many samples of {len(seen)} classes end in a simplex, where every two have {number(expected)}."
    )
    cells = [[names[i], *(number(float(v)) for v in matrix[i])] for i in range(len(names))]
    chart = heat_map(matrix, names, names, ("class", "class"), "cosine of class means", _COSINES, ".2f", "both")
    note = f" The {MOST_CLASSES} largest of {len(seen)} classes." if len(shown) < len(seen) else ""
    return Panel(
        "cosines",
        "How alike the classes are",
        "cosine between class means, centred by their mean (no unit); classes ordered by similarity." + note,
        text,
        [chart],
        ["class", *names],
        cells,
        measured.layer,
    )


def confusion_panel(rows: FeatureSet) -> Panel:
    """Share of the samples of each class that is given to each."""
    targets, predicted = known(rows.targets, "targets"), known(rows.predicted, "logits")
    labels, size = rows.labels(), rows.num_classes
    count_CC = torch.zeros(size, size, dtype=torch.long)
    count_CC.view(-1).index_add_(0, targets * size + predicted, torch.ones_like(targets))
    counts = count_CC.sum(1)
    shown = largest_classes(counts)
    share = (count_CC / counts[:, None].clamp(min=1))[shown][:, shown]
    order = by_similarity(share + share.T)
    names, share = [labels[shown[i]] for i in order], share[order][:, order]
    wrong = count_CC.clone().fill_diagonal_(0)
    true, taken = divmod(int(wrong.argmax()), size)
    text = f"{percent(float(count_CC.diagonal().sum() / counts.sum()))} of the samples get their own class. " + (
        f"Most often {labels[true]} is taken for {labels[taken]}: {int(wrong.max())} of {int(counts[true])} samples."
        if wrong.max() > 0
        else "None is taken for another."
    )
    cells = [[labels[shown[i]], *(int(count_CC[shown[i], shown[j]]) for j in order)] for i in order]
    chart = heat_map(
        share, names, names, ("true class", "predicted class"), "share of the true class", _SHARES, ".0%", "high"
    )
    return Panel(
        "confusion",
        "What is taken for what",
        "share of the samples of a class (rows) that is given to each class (columns), in %; the table has counts.",
        text,
        [chart],
        ["true class", *names],
        cells,
    )
