import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks import SpectrumMonitor
from lightning_feat.functional.spectrum import gaussian_uniformity, koleo, rankme, tolerance, wasserstein_uniformity
from lightning_feat.functional.transfer import direction_sums
from lightning_feat.mixins import SpectrumMixin
from tests.helpers import Plain, equal, loader, points, trainer, weights

EVERY = (
    "effective_rank",
    "rankme",
    "decay",
    "wasserstein_uniformity",
    "channel_energy",
    "gaussian_uniformity",
    "koleo",
    "tolerance",
)


def fit(tmp_path, *callbacks, make=Plain, val=True, **kwargs):
    pl.seed_everything(0)
    module = make()
    run = trainer(tmp_path, callbacks=list(callbacks), **kwargs)
    run.fit(module, loader(64, shuffle=True), loader(30) if val else None)
    return run, module


def features(module, size=30):
    x, y = points(size).tensors
    with torch.no_grad():
        return module.net.body(x), y


def test_what_is_logged_is_what_the_functions_say_and_training_does_not_change(tmp_path):
    _, plain = fit(tmp_path)
    run, module = fit(tmp_path, SpectrumMonitor("net.body", measures=EVERY))
    assert equal(weights(module), weights(plain))
    h, t = features(module)
    found = {name: run.callback_metrics[f"spectrum_val/{name}/net.body"] for name in EVERY}
    assert found["rankme"] == rankme(h).float()
    singular = torch.linalg.svdvals(h.double() - h.double().mean(0))
    share = singular / singular.sum()
    assert float(found["effective_rank"]) == pytest.approx(float(torch.special.entr(share).sum().exp()), rel=1e-6)
    assert float(found["wasserstein_uniformity"]) == pytest.approx(float(wasserstein_uniformity(h)), rel=1e-5)
    assert float(found["gaussian_uniformity"]) == pytest.approx(float(gaussian_uniformity(h)), rel=1e-5)
    assert float(found["koleo"]) == pytest.approx(float(koleo(h)), rel=1e-5)
    assert float(found["tolerance"]) == pytest.approx(float(tolerance(direction_sums(h, t, 3))), rel=1e-5)
    centred = h - h.mean(0)
    unit = (centred / centred.norm(dim=0)).T[centred.norm(dim=0) > 0]
    energy = torch.stack([(a - b).norm() ** -1 for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j])
    assert float(found["channel_energy"]) == pytest.approx(float(energy.mean()), rel=1e-4)


def test_the_same_sample_is_drawn_whatever_the_batches(tmp_path):
    values = []
    for batch_size in (7, 30):
        pl.seed_everything(0)
        module, monitor = Plain(), SpectrumMonitor("net.body", measures=["koleo"], max_samples=9, seed=5)
        run = trainer(tmp_path, callbacks=[monitor])
        run.fit(module, loader(64), DataLoader(points(30), batch_size))
        values.append(float(run.callback_metrics["spectrum_val/koleo/net.body"]))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0] != pytest.approx(float(koleo(features(module)[0])), rel=1e-3)


def test_layers_of_the_training_data_each_have_their_line(tmp_path):
    run, _ = fit(tmp_path, SpectrumMonitor(["net.body.0", "net.body"], data="train", measures=["rankme"]), val=False)
    assert {"spectrum/rankme/net.body.0", "spectrum/rankme/net.body"} <= {*run.callback_metrics}


class Unlabelled(Plain):
    """Inputs alone; a loss that knows no classes."""

    def training_step(self, batch, batch_idx):
        (x,) = batch
        return self.net(x).square().mean()

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])


def without_labels(size):
    return DataLoader(TensorDataset(points(size).tensors[0]), 8)


def test_no_labels_are_needed_but_for_the_tolerance(tmp_path):
    run = trainer(tmp_path, callbacks=[SpectrumMonitor("net.body")])
    run.fit(Unlabelled(), without_labels(24), without_labels(24))
    assert run.callback_metrics["spectrum_val/effective_rank/net.body"] > 1
    run = trainer(tmp_path, callbacks=[SpectrumMonitor("net.body", measures=["tolerance"])])
    with pytest.raises(ValueError, match="target_key"):
        run.fit(Unlabelled(), without_labels(24), without_labels(24))


def test_a_collapsed_network_has_rank_one_and_dead_features_are_nan(tmp_path):
    class Dead(Plain):
        def __init__(self, value):
            super().__init__(lr=0.0)
            nn.init.zeros_(self.net.body[0].weight)
            nn.init.constant_(self.net.body[0].bias, value)

    run, _ = fit(tmp_path, SpectrumMonitor("net.body"), make=lambda: Dead(1.0))
    metrics = {name.split("/")[1]: float(value) for name, value in run.callback_metrics.items() if "spectrum" in name}
    assert metrics["rankme"] == pytest.approx(1)
    assert metrics["wasserstein_uniformity"] == pytest.approx(2**0.5, rel=1e-6)
    assert metrics["gaussian_uniformity"] == pytest.approx(0, abs=1e-6)
    assert torch.tensor(metrics["effective_rank"]).isnan()  # there is no spread
    run, _ = fit(tmp_path, SpectrumMonitor("net.body"), make=lambda: Dead(-1.0))
    assert run.callback_metrics["spectrum_val/rankme/net.body"].isnan()


def test_samples_that_are_not_finite_are_left_out_and_said(tmp_path):
    x, y = points(30).tensors
    x = x.clone()
    x[3] = torch.nan
    pl.seed_everything(0)
    module = Plain()
    run = trainer(tmp_path, callbacks=[SpectrumMonitor("net.body")])
    with pytest.warns(UserWarning, match=r"3.3% of the features .*left out of the spectrum"):
        run.fit(module, loader(64), DataLoader(TensorDataset(x, y), 8))
    h = features(module)[0]
    kept = torch.cat([h[:3], h[4:]])
    assert run.callback_metrics["spectrum_val/rankme/net.body"] == rankme(kept).float()


def test_the_figure_is_drawn_and_a_resumed_run_has_the_first_spectrum(tmp_path):
    monitor = SpectrumMonitor("net.body", figure=True)
    run, _ = fit(tmp_path, monitor, max_epochs=2)
    assert (tmp_path / "spectrum_val.png").stat().st_size > 5000
    assert [epochs for epochs, _ in monitor.spectra["net.body"]] == [1, 2]
    run.save_checkpoint(tmp_path / "two.ckpt")
    resumed = SpectrumMonitor("net.body", figure=True)
    again = trainer(tmp_path, callbacks=[resumed], max_epochs=3)
    again.fit(Plain(), loader(64, shuffle=True), loader(30), ckpt_path=tmp_path / "two.ckpt")
    assert [epochs for epochs, _ in resumed.spectra["net.body"]] == [1, 3]
    assert [x for x, _ in resumed.ranks["net.body"]] == [1, 2, 3]
    assert resumed.spectra["net.body"][0] == monitor.spectra["net.body"][0]


def test_chosen_epochs(tmp_path):
    monitor = SpectrumMonitor("net.body", every_n_epochs=2, figure=True, measures=["effective_rank"])
    fit(tmp_path, monitor, max_epochs=5)
    assert [x for x, _ in monitor.ranks["net.body"]] == [1, 2, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": []}, "at least one"),
        ({"layers": ["a", "a"]}, "each layer once"),
        ({"measures": []}, "at least one"),
        ({"measures": ["rankme", "rankme"]}, "each measure once"),
        ({"max_samples": 1}, "max_samples=1"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpectrumMonitor(**arguments)


def test_what_is_missing_is_said_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"no validation data.*data='train'"):
        fit(tmp_path, SpectrumMonitor("net.body"), val=False)


def test_by_mixin(tmp_path):
    class Mine(SpectrumMixin, Plain):
        spectrum_monitor = {"layers": "net.body"}
        uniformity_regularizer = {"layer": "net.body", "weight": 0.5}

    run, _ = fit(tmp_path, make=Mine)
    assert {"spectrum_val/rankme/net.body", "uniformity_wasserstein/loss/net.body"} <= {*run.callback_metrics}
