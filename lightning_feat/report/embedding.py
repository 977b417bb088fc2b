"""Places of samples in a plane: PCA by our own function, t-SNE and UMAP by the packages that are there."""

from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_feat.functional.common.pictures import PrincipalCoordinates, principal_coordinates
from lightning_feat.report.panels.panel import percent

Map: TypeAlias = Literal["pca", "tsne", "umap"]
MAPS = ("pca", "tsne", "umap")
_PACKAGES = {"tsne": ("openTSNE", "sklearn"), "umap": ("umap",)}
_INSTALLS = {"tsne": "pip install scikit-learn, or openTSNE", "umap": "pip install umap-learn"}
_DIRECTIONS = 50  # in which neighbours are sought, as the authors of t-SNE do


class Embedding(NamedTuple):
    """Places in a plane."""

    name: str
    coordinates: Tensor  # (N, 2)
    axes: tuple[str, str]  # their titles, with their unit


def check_map(name: str) -> None:
    """Raise a ``ValueError`` for an unknown map, a ``ModuleNotFoundError`` for one whose package is missing."""
    if name not in MAPS:
        raise ValueError(f"map={name!r}: choose from {', '.join(MAPS)}.")
    if name != "pca" and not any(find_spec(package) for package in _PACKAGES[name]):
        raise ModuleNotFoundError(f"map={name!r} needs a package that is not installed: {_INSTALLS[name]}.")


def embeddings(features: Tensor, principal: PrincipalCoordinates, name: Map, seed: int) -> list[Embedding]:
    """PCA, and before it the map that is asked for; PCA alone for ten samples or fewer, or where all are the same.

    Args:
        features: ``(N, D)``, finite.
        principal: of the same features.
        name: of the map.
        seed: of what is drawn.
    """
    shares = [percent(float(share)) for share in principal.shares]
    axes = (f"first component ({shares[0]} of the variance)", f"second component ({shares[1]})")
    found = [Embedding("PCA", principal.coordinates, axes)]
    if name != "pca" and len(features) > 10:
        places = principal_coordinates(features, min(_DIRECTIONS, *features.shape)).coordinates.float().numpy()
        if not bool((places != places[0]).any()):
            return found
        title = {"tsne": "t-SNE", "umap": "UMAP"}[name]
        made = torch.as_tensor(_tsne(places, seed) if name == "tsne" else _umap(places, seed))
        found.insert(0, Embedding(title, made.double(), (f"{title} 1 (no unit)", f"{title} 2 (no unit)")))
    return found


def _tsne(places: Any, seed: int) -> Any:
    size, width = places.shape
    perplexity = min(30.0, (size - 1) / 4)
    begin = "pca" if width > 1 else "random"  # of a single direction there is no second component
    if find_spec("openTSNE"):
        from openTSNE import TSNE as Open

        return Open(perplexity=perplexity, random_state=seed, initialization=begin).fit(places)
    from sklearn.manifold import TSNE

    return TSNE(perplexity=perplexity, random_state=seed, init=begin).fit_transform(places)


def _umap(places: Any, seed: int) -> Any:
    from umap import UMAP

    # Its own defaults, said beforehand: it warns of each number that it changes itself.
    return UMAP(n_neighbors=min(15, len(places) - 1), n_jobs=1, random_state=seed).fit_transform(places)
