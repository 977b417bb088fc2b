import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from lightning_feat.functional.common.class_sums import class_means, class_sums
from lightning_feat.functional.transfer import calibrated_prototypes, nearest_mean_scores, neighbour_votes, voting


def drawn(size, width=6, seed=0):
    return torch.randn(size, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labelled(size=60, classes=4):
    targets = torch.arange(size) % classes
    return 0.8 * drawn(classes, seed=9)[targets] + drawn(size), targets


@pytest.mark.parametrize("temperature", [0.07, 1.0, float("inf")])
def test_votes_are_those_of_scikit_learn(temperature):
    (h, t), queries = labelled(), drawn(25, seed=3)
    theirs = KNeighborsClassifier(
        7, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
    )
    theirs.fit(h, t)
    votes = neighbour_votes(h, t, queries, 4, 7, temperature)
    assert torch.allclose(votes, torch.from_numpy(theirs.predict_proba(queries)), atol=1e-10)


def test_votes_in_blocks_are_the_whole(monkeypatch):
    (h, t), queries = labelled(), drawn(25, seed=3)
    whole = neighbour_votes(h, t, queries, 4)
    monkeypatch.setattr(voting, "_BLOCK", 130)
    assert torch.allclose(neighbour_votes(h, t, queries, 4), whole, atol=1e-14)


def test_votes_do_not_see_lengths_and_take_what_neighbours_there_are():
    (h, t), queries = labelled(), drawn(5, seed=3)
    longer = h * drawn(60, 1, seed=4).abs()
    assert torch.allclose(neighbour_votes(longer, t, 3 * queries, 4, 1000), neighbour_votes(h, t, queries, 4, 60))
    far = neighbour_votes(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 1]), torch.tensor([[1.0, 0.0]]), 2)
    assert float(far[0, 0]) == pytest.approx(1)  # exp of 1 / 0.07 does not overflow


def test_votes_without_samples_or_numbers_are_nan():
    (h, t), queries = labelled(), drawn(3, seed=3)
    assert neighbour_votes(h[:0], t[:0], queries, 4).isnan().all()
    queries[1] = torch.nan
    assert neighbour_votes(h, t, queries, 4).isnan().any(1).tolist() == [False, True, False]
    h[0] = torch.inf
    with pytest.raises(ValueError, match="leave these samples out"):
        neighbour_votes(h, t, queries, 4)
    with pytest.raises(ValueError, match="num_neighbours=0"):
        neighbour_votes(h, t, queries, 4, 0)
    with pytest.raises(ValueError, match="temperature=0"):
        neighbour_votes(h, t, queries, 4, temperature=0)


def test_nearest_means_are_those_of_scikit_learn():
    (h, t), queries = labelled(), drawn(40, seed=3)
    means = class_means(class_sums(h, t, 5))  # of the last class there is none
    scores = nearest_mean_scores(queries, means, "euclidean")
    assert scores.argmax(1).tolist() == NearestCentroid().fit(h, t).predict(queries).tolist()
    assert (scores[:, 4] == -torch.inf).all()
    distances = torch.cdist(queries, means[:4]).square() / 2
    assert torch.allclose(scores[:, :4] + distances, (queries.square().sum(1) / 2)[:, None].expand(-1, 4))
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], means[None, :4], dim=2)
    assert torch.allclose(nearest_mean_scores(queries, means)[:, :4], cosines)


def test_calibrated_prototypes_are_the_slow_definition():
    few, many = drawn(3), drawn(5, seed=1)
    found = calibrated_prototypes(few, many, temperature=8.0, share=0.3)
    unit = [row / row.norm() for row in many]
    for row, result in zip(few, found, strict=True):
        c = row / row.norm()
        weight = torch.stack([torch.exp(8.0 * c @ b) for b in unit])
        delta = sum(w / weight.sum() * b for w, b in zip(weight, unit, strict=True))
        assert torch.allclose(result, 0.7 * c + 0.3 * delta / delta.norm(), atol=1e-12)
    assert torch.allclose(calibrated_prototypes(few, many, share=0.0), few / few.norm(dim=1, keepdim=True))


def test_calibration_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="no class with many"):
        calibrated_prototypes(drawn(2), drawn(0))
    with pytest.raises(ValueError, match=r"share=1.5"):
        calibrated_prototypes(drawn(2), drawn(3), share=1.5)
