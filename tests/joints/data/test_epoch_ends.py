"""What belongs to the last epoch is measured in it, whoever ends the run, and when."""

import csv
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.loggers import CSVLogger

from lightning_feat.callbacks import (
    CollapseThreshold,
    GrassmannHead,
    GrassmannMonitor,
    LinearProbe,
    MetricHistory,
    MixupGeometryMonitor,
    NeuralCollapseMonitor,
    RegressionCollapseMonitor,
)
from lightning_feat.joints.data.epoch_ends import EpochEnds
from tests.helpers import Plain, loader, trainer


def stops():
    """After the second epoch, when all others have had their turn."""
    return EarlyStopping("val/loss", patience=1, mode="max")


class Worse(Plain):
    """So that early stopping sees no improvement after the first epoch."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor(-float(self.current_epoch)))


class Predicts(Worse):
    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[0][:, :3]).square().mean()


class RunsOut(Timer):
    """Its time is over in the second epoch."""

    def __init__(self, interval):
        super().__init__(timedelta(hours=1), interval=interval)
        self.steps = 0

    def on_train_batch_end(self, trainer, *args, **kwargs):
        self.steps = trainer.global_step
        super().on_train_batch_end(trainer, *args, **kwargs)

    def time_elapsed(self, *args):
        return 2 * 3600 if self.steps > 5 else 0


MONITORS = {
    "linear_probe/accuracy/penultimate": lambda: [LinearProbe(penalties=[0.1])],
    "neural_collapse/cdnv/penultimate": lambda: [NeuralCollapseMonitor(mode="exact", every_n_epochs=10)],
    "mixup_geometry/slope/penultimate": lambda: [MixupGeometryMonitor(num_pairs=8, every_n_epochs=10)],
    "grassmann/r2/net.fc": lambda: [GrassmannHead(2), GrassmannMonitor(mode="exact", every_n_epochs=10)],
    "grassmann/angle_mean/net.fc": lambda: [GrassmannHead(2), GrassmannMonitor(every_n_epochs=10)],
}


def values(tmp_path, callbacks, **kwargs):
    pl.seed_everything(0)
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer(tmp_path, callbacks=callbacks, logger=logger, **{"max_epochs": 20, **kwargs})
    run.fit(Worse(), loader(32), loader(16))
    return run


@pytest.mark.parametrize("name", MONITORS)
def test_early_stopping_after_all_others_is_caught_up_with(tmp_path, name):
    known = values(tmp_path / "known", MONITORS[name](), max_epochs=2)
    found = values(tmp_path / "found", [*MONITORS[name](), stops()])
    assert found.current_epoch == 2
    assert float(found.callback_metrics[name]) == float(known.callback_metrics[name])
    rows = []
    for folder in ("known", "found"):
        with (tmp_path / folder / "metrics.csv").open() as file:
            rows.append([(r["epoch"], r["step"], r[name]) for r in csv.DictReader(file) if r.get(name)][-1])
    assert rows[0] == rows[1]  # in the same place, too


def test_a_regression_is_caught_up_with(tmp_path):
    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, i):
            return torch.randn(4, generator=torch.Generator().manual_seed(i)), torch.ones(3) * i

    data = torch.utils.data.DataLoader(Pairs(), 8)
    run = trainer(tmp_path, callbacks=[RegressionCollapseMonitor(every_n_epochs=10), stops()], max_epochs=20)
    calls = []
    monitor = run.callbacks[0]
    measure, monitor._measure = monitor._measure, lambda *a: calls.append(a[0].current_epoch) or measure(*a)
    run.fit(Predicts(), data, data)
    assert calls == [0, 1]


@pytest.mark.parametrize(
    "last",
    [
        lambda: RunsOut("epoch"),
        lambda: RunsOut("step"),
        lambda: NeuralCollapseMonitor(thresholds=[CollapseThreshold("cdnv", 1e9, action="stop")]),
    ],
    ids=["timer by epoch", "timer by batch", "threshold"],
)
@pytest.mark.parametrize("first", [True, False])
def test_others_that_end_a_run(tmp_path, last, first):
    probe = LinearProbe(penalties=[0.1])
    calls = []
    measure, probe._measure = probe._measure, lambda *a: calls.append(a[0].current_epoch) or measure(*a)
    run = values(tmp_path, [probe, last()] if first else [last(), probe])
    assert calls == [run.current_epoch - 1]
    assert probe.result is not None


def test_a_run_that_ends_where_it_was_to_end_is_measured_once(tmp_path):
    probe = LinearProbe(penalties=[0.1])
    calls = []
    measure, probe._measure = probe._measure, lambda *a: calls.append(a[0].current_epoch) or measure(*a)
    values(tmp_path, [probe, stops()], max_epochs=2)
    assert calls == [1]


@pytest.mark.parametrize("before", [True, False])
def test_reports_hold_what_was_caught_up_with(tmp_path, before):
    history, probe = MetricHistory(), LinearProbe(penalties=[0.1])
    values(tmp_path, [*([history, probe] if before else [probe, history]), stops()])
    assert [epochs for epochs, _ in history.points["linear_probe/accuracy/penultimate"]] == [2.0]


def test_logarithmic_epochs():
    class Run:
        max_epochs, max_steps, global_step, min_epochs, min_steps, should_stop = 100, -1, 5, None, None, False

    ends, due = EpochEnds("log"), []
    for Run.current_epoch in range(30):
        due += [Run.current_epoch + 1] * ends.is_due(Run())
    assert due == [1, 2, 3, 4, 6, 8, 12, 16, 24]
