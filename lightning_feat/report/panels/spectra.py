"""In how many directions features spread: within classes, between them, or as a whole."""

from torch import Tensor

from lightning_feat.functional.neural_collapse import effective_rank
from lightning_feat.report.measured import Measured
from lightning_feat.report.panels.panel import Panel, number

_MOST = 512  # points of a curve
_COLOURS = {"within classes": "#d55e00", "between classes": "#0072b2", "all samples": "#0072b2"}


def spectra_panel(measured: Measured) -> Panel:
    """Eigenvalues of the covariances, largest first, and how many directions they fill."""
    if measured.rows.kind == "classes" and int((measured.totals.counts > 0).sum()) > 1:
        curves = {"between classes": measured.between, "within classes": measured.within}
    else:
        curves = {"all samples": measured.whole}
    ranks = {name: float(effective_rank(values)) for name, values in curves.items()}
    points = [point for name, values in curves.items() for point in _points(name, values)]
    said = " and ".join(f"{number(rank)} directions {name.replace('all', 'for all')}" for name, rank in ranks.items())
    text = f"The spread fills {said} (effective rank), of {measured.features.shape[1]} features."
    if "within classes" in curves:
        classes = int((measured.totals.counts > 0).sum())
        text += f" Class means can fill {min(classes - 1, measured.features.shape[1])} at most."
    shown = [name for name in curves if any(p["kind"] == name for p in points)]
    colour = {
        "field": "kind",
        "type": "nominal",
        "title": None,
        "scale": {"domain": shown, "range": [_COLOURS[name] for name in shown]},
        "legend": {"orient": "top", "symbolType": "stroke"},
    }
    log = {"type": "log", "nice": False}
    x: dict[str, object] = {"field": "n", "type": "quantitative", "title": "direction, by size", "scale": log}
    y: dict[str, object] = {"field": "v", "type": "quantitative", "title": "variance (squared unit of the features)"}
    y |= {"scale": log, "axis": {"format": ".0e", "tickCount": 6}}
    x |= {"axis": {"tickCount": 6, "format": "d"}}
    lines = {"mark": {"type": "line", "strokeWidth": 1.8, "point": {"size": 16}}}
    rules = {
        "data": {"values": [{"kind": name, "n": ranks[name]} for name in shown if ranks[name] >= 1]},
        "mark": {"type": "rule", "strokeDash": [4, 4], "strokeWidth": 1.4},
        "encoding": {"y": None, "tooltip": [{"field": "n", "title": "effective rank", "format": ".3~g"}]},
    }
    chart = {
        "width": "container",
        "height": 300,
        "data": {"values": points},
        "encoding": {"x": x, "y": y, "color": colour},
        "layer": [lines, rules],
    }
    rows = [[name, number(ranks[name]), *(number(float(v)) for v in values[:5])] for name, values in curves.items()]
    return Panel(
        "spectra",
        "In how many directions they spread",
        "variance along each principal direction, in the squared unit of the features, both axes logarithmic; dashed: "
        "effective rank (directions).",
        text,
        [chart] if points else [],
        ["spread", "effective rank", "largest", "second", "third", "fourth", "fifth"],
        [[*row, *[""] * (7 - len(row))] for row in rows],
        measured.layer,
    )


def _points(name: str, values: Tensor) -> list[dict[str, object]]:
    """Those that a logarithmic axis can show; of many, evenly spaced on it."""
    largest = float(values.max()) if len(values) else 0.0
    kept = [i for i, value in enumerate(values.tolist()) if value > 1e-9 * largest and value > 0]
    if len(kept) > _MOST:
        steps = {round(len(kept) ** (i / (_MOST - 1))) - 1 for i in range(_MOST)}
        kept = [kept[i] for i in sorted(steps)]
    return [{"kind": name, "n": i + 1, "v": float(f"{float(values[i]):.5g}")} for i in kept]
