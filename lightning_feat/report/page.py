"""From panels to one HTML file that needs nothing else: no network, no folder beside it."""

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_feat.report.feature_set import FeatureSet
from lightning_feat.report.panels.examples import said_of, truth_and_guess
from lightning_feat.report.panels.panel import Panel, palette
from lightning_feat.report.pictures import Sheet, sheet_of
from lightning_feat.report.summary import Headline

_ASSETS = Path(__file__).parent / "assets"
_MOST_BYTES = 14_500_000  # of a page
NEEDED = {"vl_convert": "vl-convert-python", "PIL": "pillow"}


def check_installed() -> None:
    """Raise a ``ModuleNotFoundError`` that names the extra where a library of the page is missing."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f'the page about features needs {" and ".join(missing)}: pip install "lightning-feat[report]"'
        )


@cache
def vega_bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    import vl_convert

    made: Any = vl_convert
    return str(made.javascript_bundle()).replace("</script", "<\\/script")


def as_html(
    title: str, rows: FeatureSet, headlines: Sequence[Headline], panels: Sequence[Panel], neighbours: dict[str, Any]
) -> str:
    """The page.

    Args:
        title: of the page.
        rows: what it is about.
        headlines: in their order.
        panels: in their order, those of no layer first.
        neighbours: of each layer, as the script of the page takes them.
    """
    layers = [layer for layer in rows.layers if any(panel.layer == layer for panel in panels)]
    general = [panel for panel in panels if not panel.layer]
    parts = [_cards([h for h in headlines if not h.layer])]
    if rows.notes:
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in dict.fromkeys(rows.notes))
        parts.append(f'<aside class="notes" aria-label="Notes"><h2>What to know</h2><ul>{notes}</ul></aside>')
    for i, layer in enumerate(layers):
        own = [panel for panel in panels if panel.layer == layer]
        inside = _cards([h for h in headlines if h.layer == layer]) + _grid(own, i)
        name, width = html.escape(layer), rows.features[layer].shape[1]
        head = f'Layer <code>{name}</code> <span class="quiet">{width} features</span>'
        if i == 0:
            parts.append(f'<section class="layer" id="layer-{i}"><h2>{head}</h2>{inside}</section>')
        else:
            parts.append(f'<details class="layer" id="layer-{i}"><summary><h2>{head}</h2></summary>{inside}</details>')
        if i == 0 and general:
            parts.append(f'<section class="layer"><h2>The network as a whole</h2>{_grid(general, "all")}</section>')
    if not layers and general:
        parts.append(f'<section class="layer"><h2>The network as a whole</h2>{_grid(general, "all")}</section>')
    data = _data(rows, panels, layers, neighbours)
    budget = _MOST_BYTES - len(vega_bundle()) - sum(map(len, parts)) - len(json.dumps(data)) - 100_000
    sheet = None if rows.pictures is None else sheet_of(rows.pictures, max(0, min(4_500_000, budget * 3 // 4)))
    data["sheet"] = None if sheet is None else _sheet(sheet)
    texts = {
        "title": html.escape(title),
        "source": html.escape(rows.source),
        "style": (_ASSETS / "page.css").read_text(encoding="utf-8"),
        "body": "\n".join(parts),
        "data": as_json(data),
        "vega": vega_bundle(),
        "script": (_ASSETS / "page.js").read_text(encoding="utf-8"),
    }
    frame = (_ASSETS / "page.html").read_text(encoding="utf-8")
    pieces = frame.split("%%")  # text, name, text, name, ...: what is put in is not looked through again
    return "".join(piece if i % 2 == 0 else texts[piece] for i, piece in enumerate(pieces))


def as_json(data: Any) -> str:
    """JSON that can stand in a script element, whatever a label holds."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(rows: FeatureSet, panels: Sequence[Panel], layers: list[str], neighbours: dict[str, Any]) -> dict[str, Any]:
    size = rows.num_classes
    truth = [truth_and_guess(rows, i) for i in range(len(rows))] if rows.kind == "values" else None
    classes = rows.kind == "classes"
    predicted = rows.predicted.tolist() if classes and rows.predicted is not None else None
    values = rows.targets[:, :4].tolist() if rows.kind == "values" and rows.targets is not None else None
    return {
        "rows": {
            "name": [said_of(rows, i) for i in range(len(rows))],
            "index": rows.indices.tolist(),
            "target": rows.targets.tolist() if classes and rows.targets is not None else None,
            "predicted": predicted,
            "values": None if values is None else [[_rounded(v) for v in row] for row in values],
            "words": truth,
            "loss": None if rows.losses is None else [_rounded(v) for v in rows.losses.tolist()],
            "picture": None if rows.pictures is None else rows.pictures.of_row.tolist(),
        },
        "classes": rows.labels(),
        "palette": palette(size),
        "counts": [] if not classes or rows.targets is None else _counts(rows.targets, size),
        "layers": layers,
        "neighbours": [neighbours[layer] for layer in layers],
        "panels": {_id(panel, layers): {"charts": panel.charts, **panel.data} for panel in panels},
    }


def _counts(targets: Tensor, size: int) -> list[int]:
    return [int(n) for n in torch.bincount(targets, minlength=size)]


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if abs(value) < float("inf") else None


def _sheet(sheet: Sheet) -> dict[str, Any]:
    return asdict(sheet)


def _id(panel: Panel, layers: list[str]) -> str:
    return f"{panel.key}-{layers.index(panel.layer) if panel.layer in layers else 'all'}"


def _cards(headlines: Sequence[Headline]) -> str:
    cards = [
        f'<div class="card" data-key="{html.escape(h.key)}"><dt>{html.escape(h.title)}</dt>'
        f'<dd class="value">{html.escape(h.shown)}</dd><dd class="meaning">{html.escape(h.meaning)}</dd></div>'
        for h in headlines
    ]
    return f'<dl class="cards">{"".join(cards)}</dl>' if cards else ""


def _grid(panels: Sequence[Panel], layer: int | str) -> str:
    return f'<div class="grid">{"".join(_panel(panel, f"{panel.key}-{layer}") for panel in panels)}</div>'


def _panel(panel: Panel, name: str) -> str:
    heads = "".join(f'<th scope="col">{html.escape(head)}</th>' for head in panel.heads)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(str(row[0]))}</th>'
        + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in panel.rows
    )
    table = (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )
    opened = " open" if panel.data.get("open") else ""
    numbers = f'<details class="numbers"{opened}><summary>Numbers</summary>{table}</details>' if panel.rows else ""
    charts = "".join(f'<div class="chart" data-chart="{i}"></div>' for i in range(len(panel.charts)))
    if len(panel.charts) > 2:
        first, _, rest = charts.partition('<div class="chart" data-chart="1">')
        charts = f'{first}<div class="halves"><div class="chart" data-chart="1">{rest}</div>'
    inside = {"map": _MAP}.get(panel.key, '<div class="gallery"></div>' if "gallery" in panel.data else charts)
    wide = " wide" if panel.wide else ""
    if opened:
        inside, numbers = f'<div class="halves"><div>{inside}</div><div>{numbers}</div></div>', ""
    return (
        f'<article class="panel{wide}" id="{name}" aria-labelledby="{name}-title">'
        f'<h3 id="{name}-title">{html.escape(panel.title)}</h3><p class="unit">{html.escape(panel.unit)}</p>'
        f"{inside}<p>{html.escape(panel.text)}</p>{numbers}</article>"
    )


_MAP = """<div class="controls"><label>Colour <select class="colour"></select></label>
<label class="of-map">Map <select class="embedding"></select></label>
<label>Sample <input class="which" type="number" min="0" step="1" inputmode="numeric" placeholder="#"></label></div>
<div class="legend" role="group" aria-label="Show only these classes"></div>
<div class="beside"><div class="chart map"></div>
<div class="chosen" aria-live="polite"><p class="quiet">Choose a point, or type the number of a sample, to see its
nearest neighbours.</p></div></div>"""
