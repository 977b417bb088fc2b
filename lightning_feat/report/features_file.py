"""Features in a file: ``.safetensors`` or ``.npz``, with the names that other tools look for.

``features`` ``(N, D)``, ``targets``, ``logits``, ``indices``, and ``layer``; of several layers the others are
``features.1``, ``features.2``, ..., their names in ``layer`` in the same order. What else a page shows stands beside.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_feat.report.feature_set import FeatureSet, Head, Pictures, as_tensor

ENDINGS = (".safetensors", ".npz")
_HEAD = ("weight", "bias", "basis")


def check_file(path: str, argument: str, exists: bool) -> None:
    """Raise a ``ValueError`` where this is no place for features, or where there should be some and are none."""
    file = Path(path)
    if file.suffix not in ENDINGS:
        raise ValueError(
            f"{argument} {path}: features are kept in {' or '.join(ENDINGS)} files; give one of these endings."
        )
    if exists and not file.is_file():
        raise ValueError(f"{argument} {path}: there is no such file.")
    if not exists and not file.absolute().parent.is_dir():
        raise ValueError(f"{argument} {path}: there is no folder {file.absolute().parent}; make it first.")
    if file.suffix == ".safetensors":
        from importlib.util import find_spec

        if not find_spec("safetensors"):
            raise ModuleNotFoundError(f"{argument} {path} needs safetensors: pip install safetensors, or take .npz.")


def save_features(rows: FeatureSet, path: str) -> None:
    """Write the set; the file is written aside and moved.

    Args:
        rows: what is kept.
        path: ends in ``.safetensors`` or ``.npz``.
    """
    check_file(path, "save", exists=False)
    tensors = {"features" if i == 0 else f"features.{i}": h for i, h in enumerate(rows.features.values())}
    optional: dict[str, Tensor | None] = {
        "targets": rows.targets,
        "logits": rows.logits,
        "indices": rows.indices,
        "tokens": rows.tokens,
        **{f"head.{name}": getattr(rows.head, name) for name in _HEAD},
    }
    if rows.pictures is not None:
        optional |= {"pictures": rows.pictures.tiles, "pictures.of_row": rows.pictures.of_row}
    tensors |= {name: value for name, value in optional.items() if value is not None}
    said = {
        "class_names": rows.class_names,
        "names": rows.names,
        "total": rows.total,
        "head": rows.head.layer,
        "feeds": rows.head.feeds,
        "source": rows.source,
        "notes": rows.notes,
    }
    aside = Path(path).with_name(f".{Path(path).name}.part")
    try:
        if path.endswith(".npz"):
            import numpy as np

            arrays: dict[str, Any] = {name: value.contiguous().numpy() for name, value in tensors.items()}
            with aside.open("wb") as file:
                np.savez(file, layer=np.array(rows.layers), about=np.array(json.dumps(said)), **arrays)
        else:
            from safetensors.torch import save_file

            whole = {name: value.contiguous().clone() for name, value in tensors.items()}
            save_file(whole, aside, metadata={"layer": json.dumps(rows.layers), "about": json.dumps(said)})
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def load_features(path: str) -> FeatureSet:
    """The set in a file, also one that another tool wrote with at least ``features``.

    Raises:
        ValueError: if it is no such file; the message says what it holds.
    """
    check_file(path, "features", exists=True)
    try:
        arrays, layers, said = _read_npz(path) if path.endswith(".npz") else _read_safetensors(path)
    except Exception as error:  # of three libraries
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    if "features" not in arrays:
        raise ValueError(f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}, but no array called 'features'.")
    parts = [arrays["features"]]
    while f"features.{len(parts)}" in arrays:
        parts.append(arrays[f"features.{len(parts)}"])
    names = [layers[i] if i < len(layers) else f"layer {i}" for i in range(len(parts))]
    head = Head(str(said.get("head") or ""), said.get("feeds"), *(arrays.get(f"head.{name}") for name in _HEAD))
    pictures = None
    if "pictures" in arrays:
        tiles = arrays["pictures"]
        pictures = Pictures(tiles, arrays.get("pictures.of_row", torch.arange(len(tiles))))
    return FeatureSet(
        {name: h.float() for name, h in zip(names, parts, strict=True)},
        arrays.get("targets"),
        arrays.get("logits"),
        arrays.get("indices", torch.zeros(0, dtype=torch.long)),
        arrays.get("tokens"),
        int(said.get("total") or 0),
        pictures,
        said.get("names"),
        [str(name) for name in said.get("class_names") or []],
        head,
        str(said.get("source") or Path(path).name),
        [str(note) for note in said.get("notes") or []],
    )


def _read_npz(path: str) -> tuple[dict[str, Tensor], list[str], dict[str, Any]]:
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    layer = [str(name) for name in np.atleast_1d(arrays.pop("layer", np.array([], dtype=str)))]
    about = arrays.pop("about", None)
    numeric = {name: as_tensor(value, name) for name, value in arrays.items() if value.dtype.kind in "biuf"}
    return numeric, layer, {} if about is None else json.loads(str(about))


def _read_safetensors(path: str) -> tuple[dict[str, Tensor], list[str], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        kept = file.metadata() or {}
    try:
        layers = json.loads(kept.get("layer", "[]"))
    except json.JSONDecodeError:
        layers = kept["layer"]  # the name itself
    return arrays, [layers] if isinstance(layers, str) else [*map(str, layers)], json.loads(kept.get("about", "{}"))
