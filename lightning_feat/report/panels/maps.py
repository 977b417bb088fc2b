"""The map: samples in a plane, and the nearest neighbours of one that is chosen."""

import base64
from typing import Any

import torch
from torch import Tensor

from lightning_feat.report.embedding import Embedding
from lightning_feat.report.feature_set import FeatureSet, known
from lightning_feat.report.measured import Measured
from lightning_feat.report.panels.panel import Panel, palette, percent


def map_panel(measured: Measured, embeddings: list[Embedding]) -> Panel:
    """All samples as points, coloured by class, correctness, loss or target."""
    rows, shares = measured.rows, [float(share) for share in measured.principal.shares]
    first = embeddings[0]
    words = {"classes": "class", "values": "target", "none": "nothing, as there are no labels"}[rows.kind]
    others = f"; {' and '.join(e.name for e in embeddings[1:])} can be chosen beside it" if len(embeddings) > 1 else ""
    text = (
        f"{len(rows):,} samples, each a point, coloured by {words}. The two directions of the principal component "
        f"analysis hold {percent(shares[0])} and {percent(shares[1])} of the spread{others}. Points that are near on a "
        "map need not be near in all directions: choose one to see its nearest neighbours."
    )
    return Panel(
        "map",
        "Map of the samples",
        f"{first.name}: {first.axes[0]}, {first.axes[1]}",
        text,
        layer=measured.layer,
        wide=True,
        data={"maps": [_coordinates(e) for e in embeddings], "colours": colours_of(rows), "spec": _spec()},
    )


def neighbour_data(measured: Measured) -> dict[str, Any]:
    """Neighbours of each sample for the script of the page: little-endian integers, cosines in units of 1e-4."""
    index_NK, cosine_NK = measured.neighbours
    cosines = (cosine_NK.clamp(-1, 1) * 1e4).round()
    return {
        "per": index_NK.shape[1],
        "rows": _packed(index_NK.to(torch.int32), "<i4"),
        "cosines": _packed(cosines.to(torch.int32), "<i2"),
    }


def colours_of(rows: FeatureSet) -> dict[str, Any]:
    """What points can be coloured by, the first at once: encodings of Vega-Lite by their names."""
    found: dict[str, Any] = {}
    if rows.kind == "classes":
        scale = {"domain": list(range(rows.num_classes)), "range": palette(rows.num_classes)}
        found["class"] = {"field": "c", "type": "nominal", "scale": scale, "legend": None}
        if rows.predicted is not None:
            right = {"domain": ["right", "wrong"], "range": ["#56b4e9", "#d55e00"]}
            found["correctness"] = {"field": "ok", "type": "nominal", "scale": right, "title": "prediction"}
    if rows.kind == "values":
        targets = known(rows.targets, "targets")
        for k in range(min(4, targets.shape[1])):
            name = "target" if targets.shape[1] == 1 else f"target {k}"
            found[name] = _gradient(f"t{k}", name, targets[:, k], "viridis")
    if rows.losses is not None:
        unit = "cross-entropy, nats" if rows.kind == "classes" else "squared error"
        found["loss"] = _gradient("l", f"loss ({unit})", rows.losses, "plasma")
    return found or {"nothing": {"value": "#0072b2"}}


def _gradient(field: str, title: str, values: Tensor, scheme: str) -> dict[str, Any]:
    some = values.double()[values.isfinite()]
    ends = [float(some.quantile(q)) for q in (0.01, 0.99)] if len(some) else [0.0, 1.0]
    ends = ends if ends[1] > ends[0] else [ends[0], ends[0] + 1]
    scale = {"domain": ends, "scheme": scheme, "clamp": True}
    legend = {"orient": "top", "gradientLength": 180, "titleLimit": 300}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, "legend": legend}


def _coordinates(embedding: Embedding) -> dict[str, Any]:
    places = embedding.coordinates.double()
    digits = 5
    x, y = ([float(f"{value:.{digits}g}") for value in column] for column in places.T.tolist())
    domains = []
    for column in places.T:
        low, high = float(column.min()), float(column.max())
        room = 0.04 * (high - low) or 1.0
        domains.append([low - room, high + room])
    return {"name": embedding.name, "x": x, "y": y, "axes": list(embedding.axes), "domains": domains}


def _spec() -> dict[str, Any]:
    position = {
        axis: {
            "field": axis,
            "type": "quantitative",
            "scale": {"zero": False, "nice": False},
            "axis": {"tickCount": 5, "grid": True},
        }
        for axis in ("x", "y")
    }
    points = {
        "mark": {"type": "point", "filled": True, "strokeWidth": 0, "tooltip": None},
        "encoding": {
            "size": {"value": {"expr": "clamp(22000 / length(data('points')), 12, 60)"}},
            "opacity": {"value": {"expr": "length(data('points')) > 3000 ? 0.6 : 0.8"}},
        },
    }
    near = {
        "transform": [{"filter": "indexof(near, datum.i) >= 0"}],
        "mark": {"type": "point", "filled": False, "size": 130, "strokeWidth": 2, "color": {"expr": "ink"}},
    }
    picked = {
        "transform": [{"filter": "datum.i == picked"}],
        "mark": {
            "type": "point",
            "shape": "cross",
            "size": 260,
            "filled": True,
            "color": {"expr": "ink"},
            "stroke": {"expr": "paper"},
            "strokeWidth": 1.5,
        },
    }
    return {
        "width": "container",
        "height": 440,
        "data": {"name": "points"},
        "params": [
            {"name": "shown", "value": []},
            {"name": "near", "value": []},
            {"name": "picked", "value": -1},
            {"name": "ink", "value": "#000"},
            {"name": "paper", "value": "#fff"},
        ],
        "transform": [{"filter": "length(shown) == 0 || indexof(shown, datum.c) >= 0"}],
        "encoding": position,
        "layer": [points, near, picked],
    }


def _packed(values: Tensor, kind: str) -> str:
    return base64.b64encode(values.contiguous().numpy().astype(kind).tobytes()).decode()
