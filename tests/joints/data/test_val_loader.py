"""The first validation of a run comes late, and a callback looks at its data before."""

import lightning.pytorch as pl
import pytest

from lightning_feat import callbacks as ours
from tests.helpers import Plain, equal, loader, trainer, weights

MAKERS = {
    "LinearProbe": lambda: ours.LinearProbe("net.body", every_n_epochs=1),
    "FewShotMonitor": lambda: ours.FewShotMonitor("net.body", episodes=2, every_n_epochs=1),
    "MixupGeometryMonitor": lambda: ours.MixupGeometryMonitor(data="val", num_pairs=8),
    "DistributionalSimplicityMonitor": lambda: ours.DistributionalSimplicityMonitor(data="val", num_examples=24),
    "FeatureRelianceMonitor": lambda: ours.FeatureRelianceMonitor({"left": "..., :2"}, data="val"),
    "SharpnessMonitor": lambda: ours.SharpnessMonitor(num_examples=16, max_products=2, data="val"),
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


def fit(tmp_path, callbacks, epochs, every):
    pl.seed_everything(0)
    module, data = Plain(), Counts()
    run = trainer(
        tmp_path, callbacks=callbacks, max_epochs=epochs, check_val_every_n_epoch=every, num_sanity_val_steps=0
    )
    run.fit(module, datamodule=data)
    return run, weights(module), data.asked


@pytest.mark.parametrize("name", MAKERS)
def test_the_data_are_there_before_the_first_validation(tmp_path, name):
    plain, expected, _ = fit(tmp_path / "plain", [], 2, 3)
    assert "val/loss" not in plain.callback_metrics
    run, found, asked = fit(tmp_path / "ours", [MAKERS[name]()], 2, 3)
    assert equal(found, expected)  # the training is the same
    assert asked == ["RunningStage.VALIDATING"]
    if name == "FeatureReport":
        assert list((tmp_path / "ours").rglob("features.html"))
    else:
        assert set(run.callback_metrics) - set(plain.callback_metrics)


def test_the_loader_of_the_validation_that_follows_is_the_same(tmp_path):
    plain, expected, once = fit(tmp_path / "plain", [], 4, 2)
    run, found, asked = fit(tmp_path / "ours", [MAKERS["LinearProbe"]()], 4, 2)
    assert once == asked == ["RunningStage.VALIDATING"]
    assert run.callback_metrics["val/loss"] == plain.callback_metrics["val/loss"]
    assert equal(found, expected)
