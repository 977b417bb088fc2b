"""Measures of neural collapse beside their values where it is complete, for these class counts."""

import torch

from lightning_feat.report.measured import Measured
from lightning_feat.report.panels.panel import Panel, number

SAID = {
    "nc1_quotient": ("NC1: spread within classes over that between", "ratio of variances"),
    "cdnv": ("CDNV: spread of two classes over their distance", "ratio of variances"),
    "between_effective_rank": ("directions that the class means fill", "effective rank, directions"),
    "nc2_equinorm": ("NC2: how unequal the lengths of class means are", "standard deviation over mean"),
    "nc2_cosine_std": ("NC2: how unequal their angles are", "standard deviation of cosines"),
    "nc2_etf_error": ("NC2: distance of class means to a simplex", "Frobenius norm, 0 to 2"),
    "ncc_accuracy": ("samples nearest to the mean of their own class", "share"),
    "nc4_mismatch": ("NC4: classifier and nearest class mean disagree", "share"),
    "nc3": ("NC3: distance of classifier to class means", "Frobenius norm, 0 to 2"),
}
_MOST_PAIRS = 2000  # points
_ONE_ANGLE = 0.05  # expected cosines this near are one line


def collapse_panel(measured: Measured) -> Panel:
    """The measures in a table, and the angles of class means against those that are expected."""
    found, expected = measured.collapse, measured.expected
    rows = [
        [SAID[name][0], number(value), number(expected[name]) if expected else "not known", SAID[name][1]]
        for name, value in found.items()
    ]
    counts = measured.totals.counts[measured.totals.counts > 0]
    sizes = (
        f"{int(counts.min()):,}" if counts.min() == counts.max() else f"{int(counts.min()):,} to {int(counts.max()):,}"
    )
    text = f"Collapse measures of {len(counts)} classes with {sizes} samples each. "
    if expected:
        text += (
            "Expected: where every sample lies on its class mean, in the geometry that cross-entropy tends to for "
            "these counts as weight decay vanishes (SELI, Thrampoulidis et al., 2022); equal counts give a simplex. "
            "The counts are those of the samples on this page: where the training data have others, expect theirs."
        )
    else:
        text += (
            f"With {measured.features.shape[1]} features no simplex of {len(counts)} classes fits, so that no geometry "
            "is expected here."
        )
    chart = _angles(measured)
    return Panel(
        "collapse",
        "How far the classes have collapsed",
        "cosines of each two class means, no unit, against those expected for these class counts (dashed); units of "
        "the measures stand in the table.",
        text,
        [] if chart is None else [chart],
        ["measure", "here", "expected when collapsed", "unit"],
        rows,
        measured.layer,
        wide=True,
        data={"open": True},
    )


def _angles(measured: Measured) -> dict[str, object] | None:
    expected = measured.expected_cosines
    if expected is None or len(expected) < 2:
        return None
    labels = measured.rows.labels()
    seen = [int(c) for c in (measured.totals.counts > 0).nonzero()[:, 0]]
    i, j = torch.triu_indices(len(seen), len(seen), 1)
    step = max(1, -(-len(i) // _MOST_PAIRS))
    values = [
        {
            "pair": f"{labels[seen[a]]} · {labels[seen[b]]}",
            "here": float(f"{float(measured.cosines[a, b]):.4g}"),
            "expected": float(f"{float(expected[a, b]):.4g}"),
        }
        for a, b in zip(i[::step].tolist(), j[::step].tolist(), strict=True)
        if bool(measured.cosines[a, b].isfinite())
    ]
    ends = [value[key] for value in values for key in ("here", "expected")]
    if not ends:
        return None
    low, high = max(-1.0, min(ends) - 0.05), min(1.0, max(ends) + 0.05)  # type: ignore[type-var, operator]
    scale = {"domain": [low, high], "nice": False}
    tooltip = [{"field": "pair", "title": "classes"}]
    tooltip += [{"field": key, "type": "quantitative", "format": ".3f"} for key in ("here", "expected")]
    if max(value["expected"] for value in values) - min(value["expected"] for value in values) < _ONE_ANGLE:  # type: ignore[operator, type-var]
        return _histogram(values, low, high)
    same = {
        "data": {"values": [{"here": low, "expected": low}, {"here": high, "expected": high}]},
        "mark": {"type": "line", "strokeDash": [5, 4], "color": "#888", "strokeWidth": 1.4},
    }
    points = {
        "mark": {"type": "point", "filled": True, "size": 40, "opacity": 0.7, "color": "#0072b2"},
        "encoding": {"tooltip": tooltip},
    }
    return {
        "width": "container",
        "height": 300,
        "data": {"values": values},
        "encoding": {
            "x": {
                "field": "expected",
                "type": "quantitative",
                "title": "cosine expected when collapsed",
                "scale": scale,
            },
            "y": {"field": "here", "type": "quantitative", "title": "cosine here", "scale": scale},
        },
        "layer": [same, points],
    }


def _histogram(values: list[dict[str, object]], low: float, high: float) -> dict[str, object]:
    """Where the expected cosines are all the same: how many pairs have which."""
    x = {"field": "here", "type": "quantitative", "title": "cosine of two class means"}
    bars = {
        "mark": {"type": "bar", "color": "#0072b2", "opacity": 0.8},
        "encoding": {
            "x": {**x, "bin": {"maxbins": 30, "extent": [low, high]}},
            "y": {"aggregate": "count", "title": "pairs of classes"},
            "tooltip": [{"aggregate": "count", "title": "pairs"}],
        },
    }
    mean = {"aggregate": "mean", "field": "expected", "type": "quantitative"}
    line = {
        "mark": {"type": "rule", "strokeDash": [5, 4], "strokeWidth": 2},
        "encoding": {"x": mean, "tooltip": [{**mean, "title": "expected", "format": ".3f"}]},
    }
    return {"width": "container", "height": 300, "data": {"values": values}, "layer": [bars, line]}
