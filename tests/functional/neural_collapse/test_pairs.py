"""What is averaged over pairs, in tiles."""

import pytest
import torch

from lightning_feat.functional.neural_collapse import pairs
from lightning_feat.functional.neural_collapse.pairs import pair_statistics


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [2, 3, 7, 12])
def test_tiles_of_any_number_are_all_pairs(monkeypatch, size):
    monkeypatch.setattr(pairs, "_SIDE", 3)
    vectors, variances = normal(size, 5), normal(size, seed=1).square()
    found = pair_statistics(vectors, ["cosine", "chord", "log_chord", "off_simplex", "cdnv"], variances)
    units = vectors / vectors.norm(dim=1, keepdim=True)
    i, j = torch.triu_indices(size, size, 1)
    expected = {
        "cosine": (units @ units.T)[i, j],
        "chord": torch.pdist(units),
        "log_chord": torch.pdist(units).log(),
        "off_simplex": ((units @ units.T)[i, j] + 1 / (size - 1)).abs(),
        "cdnv": (variances[i] + variances[j]) / (2 * torch.pdist(vectors).square()),
    }
    for name, values in expected.items():
        torch.testing.assert_close(found[name].mean, values.mean())
        torch.testing.assert_close(found[name].variance, values.var(correction=0))
        torch.testing.assert_close(found[name].largest, values.max())


@pytest.mark.parametrize("side", [2, 512])
def test_vectors_that_nearly_coincide_keep_their_distance(monkeypatch, side):
    monkeypatch.setattr(pairs, "_SIDE", side)
    vectors = normal(6, 4)
    vectors[4:] = vectors[:2] + 1e-9 * normal(2, 4, seed=3)
    found = pair_statistics(vectors, ["log_chord", "cdnv"], torch.ones(6).double())
    units = vectors / vectors.norm(dim=1, keepdim=True)
    # 1e-16 in the unit vectors, over 1e-9
    torch.testing.assert_close(found["log_chord"].mean, torch.pdist(units).log().mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["cdnv"].mean, torch.pdist(vectors).square().reciprocal().mean(), rtol=1e-6, atol=0)


def test_gradients_are_those_of_the_definition_also_where_vectors_coincide(monkeypatch):
    monkeypatch.setattr(pairs, "_SIDE", 2)
    vectors = normal(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, s: pair_statistics(v, ["cdnv"], s.square())["cdnv"].mean, (vectors, normal(5).requires_grad_())
    )
    doubled = torch.cat([vectors[:1], vectors]).detach().requires_grad_()
    pair_statistics(doubled, ["chord"])["chord"].mean.backward()
    assert doubled.grad.isfinite().all()


def test_no_pair_is_nan():
    for size in (0, 1):
        assert all(value.isnan() for value in pair_statistics(normal(size, 3), ["cosine"])["cosine"])
