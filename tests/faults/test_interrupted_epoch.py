"""The epoch that was interrupted: a monitor's sums are in no checkpoint, so it shows the batches since the resume.

Each process has sums of its own, and one process writes the checkpoint: it could hold those of that process alone.
"""

import lightning.pytorch as pl
import pytest
import torch

from lightning_feat.callbacks import (
    DataPlan,
    GrassmannHead,
    GrassmannMonitor,
    MetricHistory,
    NeuralCollapseMonitor,
    NeuralCollapseRegularizer,
    SimplicityBiasUpsampler,
)
from lightning_feat.functional.neural_collapse import class_distance_normalized_variance, class_sums
from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.metrics.transfer import ClassSeparation
from tests.faults.runs import At
from tests.helpers import NUM_CLASSES, WIDTH, Plain, loader, trainer

BATCHES, CUT = 4, 2  # the checkpoint of the second epoch is written after its second batch of four


class Hears(pl.Callback):
    """Keeps the features and targets of every batch, by epoch, and the losses."""

    def __init__(self):
        self.tap, self.heard = FeatureTap(), {}

    def on_fit_start(self, trainer, pl_module):
        self.tap.attach(pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.tap.listen()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.heard.setdefault(trainer.current_epoch, []).append((self.tap.take(), batch[1]))


def fit(folder, module, *callbacks, ckpt_path=None):
    history = MetricHistory()
    run = trainer(folder, max_epochs=3, callbacks=[*callbacks, history])
    run.fit(module, loader(), ckpt_path=ckpt_path)
    return {name: dict(points) for name, points in history.points.items()}


def cut(folder, callbacks):
    """A run with a checkpoint in the middle of its second epoch: its history, what it heard, and the history of the run
    that goes on from there."""
    path, hears = str(folder / "cut.ckpt"), Hears()
    pl.seed_everything(0, verbose=False)
    module = Plain()
    save = At("on_train_batch_end", 1, CUT - 1, 1, lambda: module.trainer.save_checkpoint(path))
    whole = fit(folder, module, *callbacks(), hears, save)
    pl.seed_everything(1, verbose=False)
    return whole, hears.heard, fit(folder, Plain(), *callbacks(), ckpt_path=path)


def joined(heard):
    features, targets = zip(*heard, strict=True)
    return torch.cat(features), torch.cat(targets)


def test_a_collapse_monitor_shows_the_batches_since_the_resume(tmp_path):
    whole, heard, resumed = cut(tmp_path, lambda: [NeuralCollapseMonitor(), DataPlan(lambda epoch: None)])
    name = "neural_collapse/cdnv/penultimate"
    since = class_distance_normalized_variance(class_sums(*joined(heard[1][CUT:]), NUM_CLASSES))
    assert resumed[name][2.0] == pytest.approx(float(since), rel=1e-6)  # logged in float32
    assert whole[name][2.0] != pytest.approx(float(since), rel=1e-3)
    assert resumed[name][1.0] == whole[name][1.0]  # from the history of the checkpoint
    assert resumed[name][3.0] == whole[name][3.0]


def test_a_monitor_of_subspaces_shows_the_batches_since_the_resume(tmp_path):
    callbacks = lambda: [GrassmannHead(2), GrassmannMonitor(), DataPlan(lambda epoch: None)]  # noqa: E731
    whole, heard, resumed = cut(tmp_path, callbacks)
    r2 = ClassSeparation(NUM_CLASSES, WIDTH)
    r2.update(*joined(heard[1][CUT:]))
    assert resumed["grassmann/r2/net.fc"][2.0] == pytest.approx(float(r2.compute()), rel=1e-6)
    assert 2.0 in resumed["grassmann/variability/net.fc"]
    for name, values in whole.items():
        if name.startswith("grassmann/") and "r2" not in name and "variability" not in name:
            assert resumed[name] == values  # of the weights alone
        assert resumed[name][3.0] == values[3.0]


def test_the_mean_of_a_term_is_over_the_batches_since_the_resume(tmp_path):
    callbacks = lambda: [NeuralCollapseRegularizer(), DataPlan(lambda epoch: None)]  # noqa: E731
    whole, _, resumed = cut(tmp_path, callbacks)
    name = "collapse_pull/loss/penultimate"
    assert resumed[name][2.0] != whole[name][2.0]
    assert resumed[name][3.0] == whole[name][3.0]


def test_the_knee_is_sought_in_the_losses_since_the_resume(tmp_path):
    found = []

    def callbacks():
        found.append(SimplicityBiasUpsampler(separating_epoch="knee", restart=False))
        return [found[-1]]

    cut(tmp_path, callbacks)
    whole, resumed = (upsampler.knee.losses for upsampler in found)
    assert resumed[0] == whole[0]
    assert len(resumed) == len(whole) == 3
    assert 0 < resumed[1] != whole[1]
    assert resumed[2] == whole[2]
