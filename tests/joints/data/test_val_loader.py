"""The first validation of a run comes late, and a callback looks at its data before."""

import lightning.pytorch as pl
import pytest
import torch

from lightning_feat import callbacks as ours
from tests.helpers import Plain, equal, loader, trainer, weights

MAKERS = {
    "LinearProbe": lambda: ours.LinearProbe("net.body", every_n_epochs=1),
    "NeighbourProbe": lambda: ours.NeighbourProbe("net.body", every_n_epochs=1),
    "SpectrumMonitor": lambda: ours.SpectrumMonitor("net.body"),
    "FewShotMonitor": lambda: ours.FewShotMonitor("net.body", episodes=2, every_n_epochs=1),
    "MixupGeometryMonitor": lambda: ours.MixupGeometryMonitor(data="val", num_pairs=8),
    "DistributionalSimplicityMonitor": lambda: ours.DistributionalSimplicityMonitor(data="val", num_examples=24),
    "FeatureRelianceMonitor": lambda: ours.FeatureRelianceMonitor({"left": "..., :2"}, data="val"),
    "SharpnessMonitor": lambda: ours.SharpnessMonitor(num_examples=16, max_products=2, data="val"),
    "NeuralCollapseMonitor": lambda: ours.NeuralCollapseMonitor("net.body", mode="exact", data="val"),
    "RegressionCollapseMonitor": lambda: ours.RegressionCollapseMonitor(data="val", target_key=lambda batch: batch[0]),
    "FeatureReport": lambda: ours.FeatureReport(["net.body"], every_n_epochs=1),
}


class Counts(pl.LightningDataModule):
    """How often its validation loader is asked for, and in which state of the run."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def train_dataloader(self):
        return loader(32, shuffle=True)

    def val_dataloader(self):
        self.asked.append(str(self.trainer.state.stage))
        return loader(24)


class Regression(Plain):
    def __init__(self):
        super().__init__()
        self.net.fc = torch.nn.Linear(8, 4)

    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))


def fit(tmp_path, callbacks, epochs, every, kind=Plain):
    pl.seed_everything(0)
    module, data = kind(), Counts()
    run = trainer(
        tmp_path, callbacks=callbacks, max_epochs=epochs, check_val_every_n_epoch=every, num_sanity_val_steps=0
    )
    run.fit(module, datamodule=data)
    return run, weights(module), data.asked


@pytest.mark.parametrize("name", MAKERS)
def test_the_data_are_there_before_the_first_validation(tmp_path, name):
    kind = Regression if name.startswith("Regression") else Plain
    plain, expected, _ = fit(tmp_path / "plain", [], 2, 3, kind)
    assert "val/loss" not in plain.callback_metrics
    run, found, asked = fit(tmp_path / "ours", [MAKERS[name]()], 2, 3, kind)
    assert equal(found, expected)  # the training is the same
    assert asked == ["RunningStage.VALIDATING"]
    if name == "FeatureReport":
        assert list((tmp_path / "ours").rglob("features.html"))
    else:
        assert set(run.callback_metrics) - set(plain.callback_metrics)


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_without_validation_data_is_refused_in_our_words(tmp_path, name):
    for options in ({}, {"check_val_every_n_epoch": 3}):
        run = trainer(tmp_path, callbacks=[MAKERS[name]()], **options)
        with pytest.raises(ValueError, match=r"validation data|no val data|'val'"):
            run.fit(Plain(), loader(32))


def test_the_loader_of_the_validation_that_follows_is_the_same(tmp_path):
    plain, expected, once = fit(tmp_path / "plain", [], 4, 2)
    run, found, asked = fit(tmp_path / "ours", [MAKERS["LinearProbe"]()], 4, 2)
    assert once == asked == ["RunningStage.VALIDATING"]
    assert run.callback_metrics["val/loss"] == plain.callback_metrics["val/loss"]
    assert equal(found, expected)


class WithoutValidation(Plain):
    validation_step = pl.LightningModule.validation_step


@pytest.mark.parametrize("name", [*MAKERS, "GrassmannMonitor"])
@pytest.mark.parametrize(
    ("kind", "data", "options", "why"),
    [
        (Plain, lambda: None, {}, "no validation data: give the Trainer some, or "),
        (Plain, lambda: loader(16), {"limit_val_batches": 0}, "no validation data, by limit_val_batches=0: set it to"),
        (WithoutValidation, lambda: loader(16), {}, "does not load for a module without validation_step: give it one"),
    ],
    ids=["none", "limited to none", "no step"],
)
def test_a_run_without_validation_data_hears_before_training_why_it_has_none(tmp_path, name, kind, data, options, why):
    grassmann = [ours.GrassmannHead(2), ours.GrassmannMonitor(mode="exact", data="val")]
    run = trainer(tmp_path, callbacks=[MAKERS[name]()] if name in MAKERS else grassmann, **options)
    with pytest.raises(ValueError, match=why):
        run.fit(kind(), loader(), data())
    assert run.global_step == 0
