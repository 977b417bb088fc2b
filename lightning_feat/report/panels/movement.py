"""Two checkpoints: how far each class has moved in each layer."""

from typing import Any

import torch

from lightning_feat.functional.common.class_sums import class_means, class_sums
from lightning_feat.functional.common.pictures import principal_coordinates
from lightning_feat.functional.feature_shift import cosine_shift, relative_shift
from lightning_feat.report.feature_set import FeatureSet, known
from lightning_feat.report.measured import is_usable
from lightning_feat.report.panels.panel import Panel, largest_classes, number, palette, percent, plain

ALL = "all samples"


def shared_rows(after: FeatureSet, before: FeatureSet) -> tuple[FeatureSet, FeatureSet]:
    """The samples that both have, in one order."""
    keys = [one.ids for one in (after, before)]
    here = torch.isin(keys[0], keys[1]).nonzero()[:, 0]
    there = torch.isin(keys[1], keys[0]).nonzero()[:, 0]
    here, there = here[keys[0][here].argsort()], there[keys[1][there].argsort()]
    return after.take(here), before.take(there)


def shifts(after: FeatureSet, before: FeatureSet) -> dict[str, dict[str, tuple[float, float]]]:
    """``relative_shift`` and ``cosine_shift`` by layer, of all samples and of each class."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for layer, h in after.features.items():
        start = before.features.get(layer)
        if start is None or start.shape != h.shape or not (is_usable(h) and is_usable(start)):
            continue
        groups = {ALL: torch.ones(len(h), dtype=torch.bool)}
        if after.kind == "classes":
            labels, targets = after.labels(), known(after.targets, "targets")
            counts = torch.bincount(targets, minlength=after.num_classes)
            groups |= {labels[c]: targets == c for c in largest_classes(counts)}
        found[layer] = {
            name: (float(relative_shift(h[some], start[some])), float(cosine_shift(h[some], start[some])))
            for name, some in groups.items()
        }
    return found


def movement_panel(after: FeatureSet, before: FeatureSet) -> Panel | None:
    """Bars of one axis for all layers and classes, and paths of the class means; None where nothing compares."""
    after, before = shared_rows(after, before)
    if not len(after):
        return None
    found = shifts(after, before)
    if not found:
        return None
    whole = {layer: values[ALL][0] for layer, values in found.items()}
    furthest = max(whole, key=lambda layer: whole[layer])
    text = (
        f"Between {before.source or 'those before'} and {after.source or 'these'} features moved by "
        + ", ".join(f"{_far(value)} their length in {layer}" for layer, value in whole.items())
        + "."
    )
    classes = {name: value for name, (value, _) in found[furthest].items() if name != ALL}
    if classes:
        far = max(classes, key=lambda name: classes[name])
        text += f" In {furthest} the class {far} moved furthest: {_far(classes[far])} its length."
    paths = [_paths(after, before, layer) for layer in found] if after.kind == "classes" else []
    return Panel(
        "movement",
        "How far classes and layers have moved",
        "mean distance of features to those of the other checkpoint, as a share of their mean length there (1 = as far "
        "as they are long); one axis for all layers. Paths: class means "
        "from the other checkpoint (ring) to this one (dot), in the plane of all of them.",
        text,
        [_bars(found), *(path for path in paths if path is not None)],
        ["layer", "class", "relative shift (share of length)", "turn (1 - cosine)"],
        [[layer, name, number(r), number(c)] for layer, values in found.items() for name, (r, c) in values.items()],
        wide=True,
    )


def _far(value: float) -> str:
    return f"{percent(value)} of" if not value >= 2 else f"{number(value)} times"


def _bars(found: dict[str, dict[str, tuple[float, float]]]) -> dict[str, Any]:
    values = [
        {"layer": layer, "class": name, "v": plain(relative), "turn": plain(cosine)}
        for layer, of_layer in found.items()
        for name, (relative, cosine) in of_layer.items()
    ]
    layers, names = [*found], [*dict.fromkeys(name for of_layer in found.values() for name in of_layer)]
    legend = {"orient": "top", "columns": 2, "labelLimit": 200}
    tooltip = [{"field": "layer"}, {"field": "class"}]
    tooltip += [{"field": "v", "type": "quantitative", "title": "relative shift", "format": ".3~g"}]
    tooltip += [{"field": "turn", "type": "quantitative", "title": "1 - cosine", "format": ".3~g"}]
    return {
        "width": "container",
        "height": max(90, len(names) * (20 if len(names) < 20 else 12)),
        "data": {"values": values},
        "mark": {"type": "point", "filled": True, "size": 70, "opacity": 0.9},
        "encoding": {
            "y": {
                "field": "class",
                "type": "nominal",
                "sort": names,
                "title": None,
                "axis": {"labelLimit": 110, "grid": True},
            },
            "x": {
                "field": "v",
                "type": "quantitative",
                "title": "relative shift (share of the length)",
                "scale": {"zero": True},
            },
            "color": {
                "field": "layer",
                "type": "nominal",
                "sort": layers,
                "title": "layer",
                "scale": {"domain": layers, "range": palette(len(layers))},
                "legend": legend,
            },
            "shape": {
                "field": "layer",
                "type": "nominal",
                "sort": layers,
                "title": "layer",
                "scale": {"domain": layers},
                "legend": legend,
            },
            "tooltip": tooltip,
        },
    }


def _paths(after: FeatureSet, before: FeatureSet, layer: str) -> dict[str, Any] | None:
    """Class means of both in one plane, that of the principal components of all of them."""
    size, targets = after.num_classes, known(after.targets, "targets")
    means = [class_means(class_sums(rows.features[layer], targets, size)) for rows in (before, after)]
    counts = torch.bincount(targets, minlength=size)
    shown = largest_classes(counts)
    stacked = torch.cat([mean[shown] for mean in means])
    if len(shown) < 2 or not is_usable(stacked):
        return None
    place = principal_coordinates(stacked).coordinates
    labels, colours = after.labels(), palette(size)
    ends = [{"class": labels[c], "x": float(place[i, 0]), "y": float(place[i, 1])} for i, c in enumerate(shown)]
    for i, end in enumerate(ends):
        end |= {"x2": float(place[len(shown) + i, 0]), "y2": float(place[len(shown) + i, 1])}
    scale = {"domain": [labels[c] for c in shown], "range": [colours[c] for c in shown]}
    colour = {"field": "class", "type": "nominal", "scale": scale, "legend": None}
    flat = {"zero": False}
    x = {"field": "x", "type": "quantitative", "title": "first component of the class means", "scale": flat}
    y = {"field": "y", "type": "quantitative", "title": "second component", "scale": flat}
    x2, y2 = {**x, "field": "x2"}, {**y, "field": "y2"}
    tooltip = [{"field": "class"}]
    return {
        "title": {"text": f"{layer}", "fontSize": 12, "limit": 300},
        "width": "container",
        "height": 300,
        "data": {"values": ends},
        "encoding": {"color": colour, "tooltip": tooltip},
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 1.4, "opacity": 0.7},
                "encoding": {"x": x, "y": y, "x2": {"field": "x2"}, "y2": {"field": "y2"}},
            },
            {"mark": {"type": "point", "filled": False, "size": 45}, "encoding": {"x": x, "y": y}},
            {"mark": {"type": "point", "filled": True, "size": 75, "opacity": 1}, "encoding": {"x": x2, "y": y2}},
            {
                "mark": {"type": "text", "dx": 7, "align": "left", "fontSize": 10, "limit": 90, "aria": False},
                "encoding": {"x": x2, "y": y2, "text": {"field": "class"}, "color": None},
            },
        ],
    }
