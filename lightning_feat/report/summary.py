"""The headline numbers, each in plain words with what it means."""

import math
from dataclasses import dataclass

import torch

from lightning_feat.functional.neural_collapse import effective_rank, explained_variance_ratio
from lightning_feat.functional.transfer import neighbour_accuracy
from lightning_feat.report.feature_set import FeatureSet
from lightning_feat.report.measured import Measured
from lightning_feat.report.panels.panel import number, percent


@dataclass
class Headline:
    """One number.

    Attributes:
        key: its name for programs.
        value: as it was computed.
        shown: as one reads it, with its unit.
        title: what it is.
        meaning: in plain words.
        layer: whose it is; empty for the whole network.
    """

    key: str
    value: float
    shown: str
    title: str
    meaning: str
    layer: str = ""


def headlines_of_run(rows: FeatureSet) -> list[Headline]:
    """What is known without features: how good the predictions are."""
    found = []
    size = f"{len(rows):,}" + (f" of {rows.total:,}" if rows.total > len(rows) else "")
    found.append(Headline("samples", float(len(rows)), size, "samples on this page", _kind_said(rows)))
    if rows.predicted is None or rows.targets is None or rows.losses is None:
        return found
    loss = float(rows.losses.mean())
    if rows.kind == "classes":
        right = float((rows.predicted == rows.targets).double().mean())
        counts = torch.bincount(rows.targets)
        largest = float(counts.max()) / len(rows)
        found.append(
            Headline(
                "accuracy",
                right,
                percent(right),
                "accuracy",
                f"share of samples that get their own class; always saying the commonest one gives {percent(largest)}.",
            )
        )
        chance = math.log(rows.num_classes)
        meaning = f"0 is certain and right; knowing nothing of {rows.num_classes} classes gives {number(chance)}."
        found.append(Headline("loss", loss, f"{number(loss)} nats", "cross-entropy", meaning))
    else:
        spread = float(rows.targets.double().var(0, unbiased=False).sum())
        explained = 1 - loss / spread if spread > 0 else math.nan
        found.append(
            Headline(
                "r2",
                explained,
                percent(explained),
                "variance of the target explained",
                "100 % is exact, 0 % no better than always saying the mean, if the output is the target.",
            )
        )
    return found


def headlines_of_layer(measured: Measured) -> list[Headline]:
    """What the features of one layer say."""
    rows, layer, width = measured.rows, measured.layer, measured.features.shape[1]
    found = []
    rank = float(effective_rank(measured.whole))
    found.append(
        Headline(
            "effective_rank",
            rank,
            f"{number(rank)} of {width}",
            "directions in use",
            _rank_said(rank, rows),
            layer,
        )
    )
    if rows.kind == "classes" and int((measured.totals.counts > 0).sum()) > 1:
        collapse = measured.collapse
        index, _ = measured.neighbours
        near = float(neighbour_accuracy(index, measured.targets))
        found.append(
            Headline(
                "neighbour_accuracy",
                near,
                percent(near),
                f"right by their {index.shape[1]} neighbours",
                "share of samples whose nearest neighbours are mostly of their own class: what the features know "
                "without a classifier.",
                layer,
            )
        )
        found.append(
            Headline(
                "ncc_accuracy",
                collapse["ncc_accuracy"],
                percent(collapse["ncc_accuracy"]),
                "nearest to their class mean",
                "share of samples that lie nearer to the mean of their own class than to any other.",
                layer,
            )
        )
        value = collapse["nc1_quotient"]
        found.append(
            Headline("nc1_quotient", value, number(value), "spread within over between", _spread_said(value), layer)
        )
        value = collapse["nc2_cosine_std"]
        found.append(
            Headline(
                "nc2_cosine_std",
                value,
                number(value),
                "inequality of class angles",
                "standard deviation of the cosines between class means; 0 where all classes are equally far apart.",
                layer,
            )
        )
    if rows.kind == "values" and rows.targets is not None:
        count = min(rows.targets.shape[1], width)
        share = float(explained_variance_ratio(measured.features, count).sum())
        found.append(
            Headline(
                "explained_variance",
                share,
                percent(share),
                f"of the spread in {count} direction{'s' if count > 1 else ''}",
                f"a regression of {count} value{'s' if count > 1 else ''} needs no more directions; at 100 % features "
                "have collapsed to them.",
                layer,
            )
        )
    return found


def _kind_said(rows: FeatureSet) -> str:
    if rows.kind == "classes":
        seen = len(rows.targets.unique()) if rows.targets is not None else 0
        return f"of {seen} classes" + (", each a token." if rows.tokens is not None else ".")
    return "with values to predict." if rows.kind == "values" else "without labels."


def _rank_said(rank: float, rows: FeatureSet) -> str:
    said = "effective rank: in how many directions features spread."
    if rows.kind == "classes" and rows.targets is not None:
        classes = len(rows.targets.unique())
        return f"{said} {classes} classes can be told apart in {max(1, classes - 1)}."
    return said


def _spread_said(value: float) -> str:
    said = "variance within classes over that between their means (NC1); 0 is complete collapse. "
    if math.isnan(value):
        return said + "Not defined here."
    if value < 0.1:
        return said + "Here classes are tight beside their distances."
    return said + (
        "Here classes are clusters of some width." if value < 1 else "Here classes are wider than they are apart."
    )
