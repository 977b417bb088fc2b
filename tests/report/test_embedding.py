"""Maps of samples by the packages that are installed."""

import importlib.util
import warnings

import pytest
import torch

from lightning_feat.functional.common.pictures import principal_coordinates
from lightning_feat.report import embedding
from lightning_feat.report.embedding import embeddings

MAPS = [("tsne", "sklearn"), ("tsne", "openTSNE"), ("umap", "umap")]


def mapped(features, name, package, monkeypatch):
    pytest.importorskip(package, exc_type=ImportError)
    if package == "sklearn":
        monkeypatch.setattr(embedding, "find_spec", lambda name: name == "sklearn" and importlib.util.find_spec(name))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        warnings.filterwarnings("error", category=RuntimeWarning)
        return embeddings(features, principal_coordinates(features, 3), name, 0)


def groups(samples=60):
    targets = torch.arange(samples) % 3
    noise = torch.randn(samples, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise + 8 * torch.eye(3, 8, dtype=torch.float64)[targets], targets


@pytest.mark.parametrize(("name", "package"), MAPS)
def test_groups_stay_groups_and_the_seed_decides(name, package, monkeypatch):
    features, targets = groups()
    found, pca = mapped(features, name, package, monkeypatch)
    assert pca.name == "PCA"
    assert found.name == {"tsne": "t-SNE", "umap": "UMAP"}[name]
    assert found.coordinates.shape == (60, 2)
    apart = torch.cdist(found.coordinates, found.coordinates).fill_diagonal_(torch.inf)
    assert torch.equal(targets[apart.argmin(1)], targets)
    again, _ = mapped(features, name, package, monkeypatch)
    assert torch.equal(again.coordinates, found.coordinates)


@pytest.mark.parametrize(("name", "package"), MAPS)
@pytest.mark.parametrize("which", ["eleven", "one feature", "twins", "two places"])
def test_what_is_small_or_flat_has_places(which, name, package, monkeypatch):
    features, _ = groups()
    features = {
        "eleven": features[:11],
        "one feature": features[:, :1],
        "twins": features[:12].repeat(2, 1),
        "two places": (torch.arange(24) % 2).double()[:, None].expand(24, 4).contiguous(),
    }[which]
    found = mapped(features, name, package, monkeypatch)
    assert len(found) == 2
    assert found[0].coordinates.isfinite().all()


@pytest.mark.parametrize(("name", "package"), MAPS)
def test_samples_that_are_all_the_same_have_no_map_but_pca(name, package, monkeypatch):
    assert [found.name for found in mapped(torch.ones(20, 4), name, package, monkeypatch)] == ["PCA"]
