"""The page about features, for those who have arrays; the command and the callback come here, too."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_feat.functional.common.lots import lowest_lots
from lightning_feat.report.embedding import Map, check_map, embeddings
from lightning_feat.report.feature_set import (
    MOST_ROWS,
    FeatureSet,
    Head,
    as_layers,
    as_tensor,
    check_features,
    sequence_of_names,
)
from lightning_feat.report.features_file import check_file, save_features
from lightning_feat.report.learned import Learned
from lightning_feat.report.measured import Measured
from lightning_feat.report.page import as_html, check_installed
from lightning_feat.report.panels.classes import confusion_panel, cosine_panel
from lightning_feat.report.panels.collapse import collapse_panel
from lightning_feat.report.panels.examples import hardest_panel, latest_panel
from lightning_feat.report.panels.maps import map_panel, neighbour_data
from lightning_feat.report.panels.movement import movement_panel
from lightning_feat.report.panels.panel import Panel
from lightning_feat.report.panels.spectra import spectra_panel
from lightning_feat.report.panels.subspaces import subspace_panel
from lightning_feat.report.pictures import pictures_given
from lightning_feat.report.summary import Headline, headlines_of_layer, headlines_of_run


@dataclass
class FeaturePage:
    """A page that is written.

    Attributes:
        path: of the file.
        numbers: the headline numbers by their names, of a layer ``name/layer``.
        notes: what a reader must know, as the page says it.
        panels: keys of the panels, of a layer ``key/layer``.
    """

    path: Path
    numbers: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    panels: list[str] = field(default_factory=list)


def feature_report(
    features: Any,
    targets: Any = None,
    *,
    logits: Any = None,
    indices: Any = None,
    pictures: Any = None,
    names: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    before: Any = None,
    weight: Any = None,
    basis: Any = None,
    out: str | os.PathLike[str] = "features.html",
    title: str = "Features",
    map: Map = "pca",
    max_samples: int = 10_000,
    seed: int = 0,
    save: str | None = None,
) -> FeaturePage:
    """Write one self-contained HTML page about features; what is not given is left out of it.

    Args:
        features: ``(N, D)``, any array; or a dict of them by layer, of the same samples.
        targets: ``(N,)`` class indices, ``(N, C)`` shares of classes, or float values of a regression ``(N,)``,
            ``(N, K)``.
        logits: ``(N, C)``, or ``(N, 1)`` of two classes; of a regression what was predicted.
        indices: ``(N,)`` what samples are called; by default their rows.
        pictures: ``(N, H, W)``, ``(N, 3, H, W)`` or ``(N, H, W, 3)``, shown for samples.
        names: file name of each sample.
        class_names: of class 0, 1, ...
        before: features of the same samples at another time, as ``features``, to show how far they moved.
        weight: ``(C, D)`` of a linear classifier of the first layer's features.
        basis: ``(C, k, D)`` orthonormal rows, of a classifier whose classes are subspaces.
        out: the file; its folder must be there.
        title: of the page.
        map: in which samples are shown first, ``"pca"``, or ``"tsne"`` (scikit-learn or openTSNE) or ``"umap"``
            (umap-learn) beside it.
        max_samples: of more, a sample is drawn; 20,000 at most.
        seed: of what is drawn.
        save: file for the features, ``.safetensors`` or ``.npz``, which ``lightning-feat report --features`` reads.

    Raises:
        ValueError: for what does not fit, before anything is computed.
        ModuleNotFoundError: where a package is missing, with what to install.

    Cost: ``2 N^2 D`` operations for the neighbours, eigenvalues of ``(D, D)``, and some copies of the features.
    """
    check_output(out, map, max_samples, save)
    layers = as_layers(features)
    given = {
        name: None if value is None else as_tensor(value, name)
        for name, value in (("targets", targets), ("logits", logits), ("weight", weight), ("basis", basis))
    }
    _check_classifier(layers, given["weight"], given["basis"])
    check_features(layers)
    size = len(next(iter(layers.values())))
    rows = FeatureSet(
        {name: h.float() for name, h in layers.items()},
        given["targets"],
        given["logits"],
        torch.zeros(0, dtype=torch.long) if indices is None else as_tensor(indices, "indices").long(),
        pictures=pictures_given(pictures, size),
        names=None if names is None else sequence_of_names(names),
        class_names=sequence_of_names(class_names),
        head=Head("the classifier", next(iter(layers)), given["weight"], None, given["basis"]),
    )
    start = None
    if before is not None:
        start = FeatureSet(
            {name: h.float() for name, h in as_layers(before, rows.layers[0]).items()},
            indices=rows.indices,
            source="the features before",
        )
        shapes = [{name: tuple(h.shape) for name, h in one.features.items()} for one in (start, rows)]
        if not any(shapes[1].get(name) == shape for name, shape in shapes[0].items()):
            raise ValueError(
                f"before: shapes {shapes[0]} do not fit features {shapes[1]}: give the same samples and layers."
            )
    return write_report(rows, out, title=title, map=map, max_samples=max_samples, seed=seed, save=save, before=start)


def write_report(
    rows: FeatureSet,
    out: str | os.PathLike[str],
    *,
    title: str = "Features",
    map: Map = "pca",
    max_samples: int = 10_000,
    seed: int = 0,
    save: str | None = None,
    before: FeatureSet | None = None,
    learned: Learned | None = None,
) -> FeaturePage:
    """Write the page of a set; arguments as in ``feature_report``.

    Args:
        rows: the set.
        out: the file.
        title: of the page.
        map: of the samples.
        max_samples: of more rows, a sample is drawn.
        seed: of what is drawn.
        save: file for the features.
        before: the same samples at another checkpoint.
        learned: of the rows of ``rows``, where it is known.
    """
    if save is not None:
        save_features(rows, save)
    rows, learned = _fit_to_show(rows, learned, max_samples, seed)
    headlines, panels, neighbours = _parts(rows, map, seed, before, learned)
    text = as_html(title, rows, headlines, panels, neighbours)
    path = Path(out)
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    numbers = {_key(h.key, h.layer): h.value for h in headlines}
    return FeaturePage(path, numbers, [*dict.fromkeys(rows.notes)], [_key(p.key, p.layer) for p in panels])


def check_output(out: str | os.PathLike[str], map: str, max_samples: int, save: str | None) -> None:
    """Raise, before anything is computed, where the page could not be written in the end."""
    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"out={str(out)!r}: the page is an HTML file; give a name that ends in .html.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"out={str(out)!r}: there is no folder {path.absolute().parent}; make it first.")
    if not 2 <= max_samples <= MOST_ROWS:
        raise ValueError(f"max_samples={max_samples}: give 2 to {MOST_ROWS}, so that the page stays under 15 MB.")
    if save is not None:
        check_file(str(save), "save", exists=False)
    check_map(map)
    check_installed()


def _key(name: str, layer: str) -> str:
    return f"{name}/{layer}" if layer else name


def _check_classifier(layers: dict[str, Tensor], weight: Tensor | None, basis: Tensor | None) -> None:
    first, h = next(iter(layers.items()), ("", torch.zeros(0, 0)))
    width = h.shape[1] if h.ndim == 2 else None
    if weight is not None and (weight.ndim != 2 or weight.shape[1] != width):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: give (C, {width}), as the features of {first!r} are."
        )
    if basis is not None and (basis.ndim != 3 or basis.shape[2] != width):
        raise ValueError(
            f"basis has shape {tuple(basis.shape)}: give (C, k, {width}), as the features of {first!r} are."
        )


def _fit_to_show(rows: FeatureSet, learned: Learned | None, most: int, seed: int) -> tuple[FeatureSet, Learned | None]:
    """Without what is not finite, and no more than fits."""
    keep = torch.ones(len(rows), dtype=torch.bool)
    for h in rows.features.values():
        keep &= h.isfinite().all(1)
    kept = keep.nonzero()[:, 0]
    if len(kept) < 2:
        raise ValueError(
            f"features: of {len(rows)} samples {len(rows) - len(kept)} are not finite; nothing is left to show."
        )
    said = []
    if len(kept) < len(rows):
        said.append(f"{len(rows) - len(kept):,} samples have features that are not finite, and are left out.")
    if len(kept) > most:
        said.append(
            f"Of {len(kept):,} rows {most:,} are shown, drawn at random with seed {seed}; numbers are those of these."
        )
        kept = kept[lowest_lots(kept, most, seed)]
    if not said:
        return rows, learned
    some = rows.take(kept)
    some.notes += said
    return some, None if learned is None else learned.take(kept)


def _parts(
    rows: FeatureSet, map: Map, seed: int, before: FeatureSet | None, learned: Learned | None
) -> tuple[list[Headline], list[Panel], dict[str, Any]]:
    headlines, panels, neighbours = headlines_of_run(rows), [], {}
    seen = 0 if rows.targets is None or rows.kind != "classes" else len(rows.targets.unique())
    for layer in rows.layers:
        measured = Measured(rows, layer)
        headlines += headlines_of_layer(measured)
        panels.append(map_panel(measured, embeddings(measured.features, measured.principal, map, seed)))
        neighbours[layer] = neighbour_data(measured)
        if seen > 1:
            panels.append(cosine_panel(measured))
        panels.append(spectra_panel(measured))
        if seen > 1:
            panels.append(collapse_panel(measured))
    if rows.losses is not None:
        panels.append(hardest_panel(rows))
    makers: list[tuple[bool, Callable[[], Panel | None]]] = [
        (learned is not None and rows.losses is not None, lambda: latest_panel(rows, learned.since, learned.times)),  # type: ignore[union-attr]
        (seen > 1 and rows.predicted is not None, lambda: confusion_panel(rows)),
        (rows.head.basis is not None and len(rows.head.basis) > 1, lambda: subspace_panel(rows)),
        (before is not None, lambda: movement_panel(rows, before)),  # type: ignore[arg-type]
    ]
    panels += [panel for wanted, make in makers if wanted and (panel := make()) is not None]
    return headlines, panels, neighbours
