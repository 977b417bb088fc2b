"""What a panel is, and the parts that several of them draw."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_feat.functional.common.pictures import similarity_order

MOST_CLASSES = 60  # in one heat map; of more the largest
# Okabe and Ito's colours, which most colour-blind readers tell apart; grey-blue and brown for nine and ten.
_TEN = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#b8a800", "#7f6bc4", "#8c6d4f", "#7f7f7f")


@dataclass
class Panel:
    """One panel.

    Attributes:
        key: its name in the page.
        title: above it.
        unit: what is drawn, and in which unit.
        text: what it says, in plain words; a screen reader has this and the table.
        charts: Vega-Lite specifications, drawn one after the other.
        heads: of the table behind the chart.
        rows: of that table.
        layer: whose it is; empty for the whole network.
        wide: whether it takes the whole width.
        data: what the script of the page needs beside.
    """

    key: str
    title: str
    unit: str
    text: str
    charts: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    layer: str = ""
    wide: bool = False
    data: dict[str, Any] = field(default_factory=dict)


def palette(count: int) -> list[str]:
    """Colours of classes: told apart by eye up to ten, by hue and lightness beyond."""
    if count <= len(_TEN):
        return list(_TEN[:count])
    return [
        _hsl(360 * i / count * 7 % 360 if count % 7 else 360 * i / count, (45, 58, 36)[i % 3]) for i in range(count)
    ]


def _hsl(hue: float, lightness: float) -> str:
    a = 0.62 * min(lightness / 100, 1 - lightness / 100)
    parts = []
    for n in (0, 8, 4):
        k = (n + hue / 30) % 12
        parts.append(round(255 * (lightness / 100 - a * max(-1, min(k - 3, 9 - k, 1)))))
    return "#" + "".join(f"{part:02x}" for part in parts)


def number(value: float, digits: int = 3) -> str:
    """Some digits that count, as one writes it."""
    if not math.isfinite(value):
        return "not defined" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{decimals}f}"
        return text.replace("-", "\N{MINUS SIGN}")
    return f"{value:.{digits - 1}e}".replace("-", "\N{MINUS SIGN}")


def percent(share: float) -> str:
    """A share, as one writes it."""
    return "not defined" if math.isnan(share) else f"{100 * share:.1f} %"


def plain(value: float | Tensor) -> float | None:
    """A number for JSON, which has no nan."""
    value = float(value)
    return value if math.isfinite(value) else None


def largest_classes(counts: Tensor) -> list[int]:
    """The classes with samples that a heat map shows, in their order; the largest where there are too many."""
    seen = (counts > 0).nonzero()[:, 0]
    if len(seen) > MOST_CLASSES:
        seen = seen[counts[seen].argsort(descending=True, stable=True)[:MOST_CLASSES]].sort().values
    return [int(c) for c in seen]


def by_similarity(matrix: Tensor) -> list[int]:
    """Places in an order in which what is alike stands beside alike."""
    return [int(i) for i in similarity_order(matrix)]


def heat_map(
    matrix: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    axes: tuple[str, str],
    value: str,
    scheme: dict[str, Any],
    form: str,
    dark: Literal["high", "low", "both"],
) -> dict[str, Any]:
    """A specification of a matrix with labels, its numbers in the cells where there is room.

    Args:
        matrix: ``(R, S)``.
        rows: names of the rows, each once.
        columns: names of the columns, each once.
        axes: titles of rows and columns.
        value: title of the colours, with its unit.
        scheme: the scale of the colours, of Vega-Lite.
        form: format of a number.
        dark: which ends of the scale are dark, and have light numbers.
    """
    cells = [
        {"r": row, "c": column, "v": plain(matrix[i, j])}
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]
    names = {"r": list(rows), "c": list(columns)}
    few = max(len(rows), len(columns)) <= 12

    def axis(key: str, title: str) -> dict[str, Any]:
        shown = {
            "labelLimit": 110,
            "labelOverlap": False if len(rows) <= 20 else "greedy",
            "domain": False,
            "ticks": False,
            "labelPadding": 4,
        }
        turned = {"labelAngle": -45 if max(map(len, names[key])) > 2 else 0} if key == "c" else {}
        return {"field": key, "type": "nominal", "sort": names[key], "title": title, "axis": {**shown, **turned}}

    base = {"x": axis("c", axes[1]), "y": axis("r", axes[0])}
    colour = {"field": "v", "type": "quantitative", "title": value, "scale": scheme}
    colour |= {"legend": {"orient": "top", "gradientLength": 180, "titleLimit": 400, "format": form}}
    tooltip = [
        {"field": "r", "type": "nominal", "title": axes[0]},
        {"field": "c", "type": "nominal", "title": axes[1]},
        {"field": "v", "type": "quantitative", "title": value, "format": ".4~g"},
    ]
    layers: list[dict[str, Any]] = [
        {"mark": {"type": "rect", "invalid": None}, "encoding": {"color": colour, "tooltip": tooltip}}
    ]
    if few:
        ends = scheme["domain"]
        place = f"(datum.v - {ends[0]}) / {ends[-1] - ends[0]}"
        strong = {"high": f"{place} > 0.5", "low": f"{place} < 0.55", "both": f"{place} < 0.2 || {place} > 0.8"}[dark]
        ink = {"condition": {"test": strong, "value": "#fff"}, "value": "#111"}
        text = {"field": "v", "type": "quantitative", "format": form}
        layers.append(
            {
                "mark": {"type": "text", "fontSize": {"expr": "width < 330 ? 8 : 11"}, "aria": False},
                "encoding": {"text": text, "color": ink},
            }
        )
    side = max(220, min(560, 46 + 30 * len(rows) if len(rows) < 20 else 12 * len(rows)))
    return {"data": {"values": cells}, "width": "container", "height": side, "encoding": base, "layer": layers}


def finite(values: Tensor) -> list[float]:
    """The values that are there, as numbers."""
    return [float(v) for v in torch.as_tensor(values) if math.isfinite(float(v))]
