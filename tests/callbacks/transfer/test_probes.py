"""Probes that share their data and their pass, each against scikit-learn on the same features."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.svm import LinearSVC
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks import LinearProbe, LinearSVMProbe, NearestMeanProbe, NeighbourProbe
from lightning_feat.callbacks.transfer.probe import Probe
from lightning_feat.functional.transfer import hold_out
from tests.callbacks.transfer.test_linear_probe import Other, fit, of, other, seeded
from tests.helpers import equal, points, weights

EVERY = [LinearProbe, LinearSVMProbe, NearestMeanProbe, NeighbourProbe]


def accuracies(run):
    found = {name.split("/")[0]: float(v) for name, v in run.callback_metrics.items() if "/accuracy/" in name}
    assert len(found) == 4
    return found


def test_they_are_scikit_learns_and_share_one_pass(tmp_path):
    module, plain = seeded(), seeded()
    fit(tmp_path / "plain", plain)
    probes = [LinearProbe(), LinearSVMProbe(), NearestMeanProbe(nearness="euclidean"), NeighbourProbe(num_neighbours=5)]
    module = seeded()
    calls = []
    module.net.register_forward_hook(lambda *_: calls.append(module.training))
    run = fit(tmp_path / "ours", module, *probes)
    assert equal(weights(module), weights(plain))
    found = accuracies(run)
    (h, t), (test, u) = of(points(64), module), of(points(24), module)
    means = NearestCentroid().fit(h, t)
    assert found["nearest_mean_probe"] == pytest.approx(means.score(test, u))
    neighbours = KNeighborsClassifier(5, metric="cosine", weights=lambda d: np.exp(-d / 0.07))
    assert found["neighbour_probe"] == pytest.approx(neighbours.fit(h, t).score(test, u))
    held = hold_out(t)
    unit, last = torch.nn.functional.normalize(h.double()), torch.nn.functional.normalize(test.double())
    svms = [LinearSVC(C=c, max_iter=10_000, random_state=0).fit(unit[~held], t[~held]) for c in (0.01, 0.1, 1, 10, 100)]
    best = max(svms, key=lambda svm: svm.score(unit[held], t[held]))
    assert found["linear_svm_probe"] == pytest.approx(best.score(last, u))
    assert probes[1].chosen == best.C
    # The validation; each tries how the first batch of two parts is run; then one run over both for all four.
    assert calls.count(False) <= 3 + 4 * 2 * 3 + (8 + 3)


@pytest.mark.parametrize("cls", EVERY)
def test_data_of_their_own(tmp_path, cls):
    module = seeded()
    run = fit(tmp_path, module, cls("net.body", data=Other(), name="other"))
    (name,) = [name for name in run.callback_metrics if "/accuracy/" in name]
    assert name == f"{cls.method}_other/accuracy/net.body"
    if cls is NearestMeanProbe:
        (h, t), (test, u) = of(other(1), module), of(other(3), module)
        means = torch.stack([h[t == c].mean(0) for c in range(3)])
        cosines = torch.nn.functional.cosine_similarity(test[:, None], means[None], dim=2)
        assert float(run.callback_metrics[name]) == pytest.approx(float((cosines.argmax(1) == u).double().mean()))


@pytest.mark.parametrize("cls", EVERY)
def test_classes_that_the_labelled_samples_lack_are_wrong(tmp_path, cls):
    """Nothing is read right where the test holds other classes."""
    loaders = {"train": DataLoader(other(1), 16), "test": DataLoader(other(2, shift=3), 16)}
    run = fit(tmp_path, seeded(), cls("net.body", **loaders))
    (value,) = [float(v) for name, v in run.callback_metrics.items() if "/accuracy/" in name]
    assert value == 0


@pytest.mark.parametrize("cls", EVERY)
def test_class_indices_may_be_far_apart(tmp_path, cls):
    values = []
    for factor in (1, 10**12):
        parts = [TensorDataset(x, factor * y) for x, y in (points(40, seed).tensors for seed in (1, 2))]
        loaders = dict(zip(("train", "test"), (DataLoader(part, 16) for part in parts), strict=True))
        run = fit(tmp_path, seeded(), cls("net.body", **loaders))
        values += [float(v) for name, v in run.callback_metrics.items() if "/accuracy/" in name]
    assert values[0] == values[1] > 0


@pytest.mark.parametrize("cls", EVERY)
def test_what_cannot_be_is_refused_by_all(tmp_path, cls):
    with pytest.raises(ValueError, match="every_n_epochs=0"):
        cls(every_n_epochs=0)
    with pytest.raises(ValueError, match="data and loaders"):
        cls(data=Other(), train=DataLoader(other(1)))
    with pytest.raises(ValueError, match=rf"{cls.__name__}.* has nothing to look at"):
        fit(tmp_path, seeded(), cls(), val=False)
    assert issubclass(cls, Probe)


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_neighbours=0"):
        NeighbourProbe(num_neighbours=0)
    with pytest.raises(ValueError, match="temperature=0"):
        NeighbourProbe(temperature=0)
    with pytest.raises(ValueError, match="penalties="):
        LinearSVMProbe(penalties=[0.0])
    with pytest.raises(ValueError, match="manhattan"):
        NearestMeanProbe(nearness="manhattan")
