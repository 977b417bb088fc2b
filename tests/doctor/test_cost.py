import time

import lightning.pytorch as pl
import pytest

from lightning_feat.callbacks import GrassmannHead, GrassmannMonitor, NeuralCollapseMonitor
from lightning_feat.doctor import doctor
from lightning_feat.doctor.cost import Stopwatch, _percent, _timed
from lightning_feat.doctor.trial import Run
from tests.helpers import Plain, loader, trainer


class Slow(NeuralCollapseMonitor):
    """Takes twenty times as long as a batch of ``SlowModule``, which no load on the machine hides, and as long again
    for each batch of a pass.
    """

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        time.sleep(0.02)

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        time.sleep(0.02 * trainer.fast_dev_run)


class SlowModule(Plain):
    def training_step(self, batch, batch_idx):
        time.sleep(0.001)
        return super().training_step(batch, batch_idx)


def costs(findings):
    assert {f.severity for f in findings} <= {"note"}
    return {f.where: f.what for f in findings if f.check == "cost"}


def test_a_callback_that_costs_and_one_that_does_not(tmp_path):
    run = trainer(tmp_path, callbacks=[Slow(), GrassmannHead(2), GrassmannMonitor(mode="exact"), pl.Callback()])
    said = costs(doctor(run, SlowModule(), loader(), loader(), seconds=5.0))
    assert list(said) == [
        "NeuralCollapseMonitor[online, penultimate]",
        "GrassmannHead[classifier]",
        "GrassmannMonitor[classifier]",
    ]
    slow = said["NeuralCollapseMonitor[online, penultimate]"]
    assert " % of a training batch (" in slow
    assert "rounds of" in slow
    assert " % of an epoch, at the end of those in which it measures" in slow


def test_there_is_no_measurement_where_something_is_wrong(tmp_path):
    run = trainer(tmp_path, callbacks=[NeuralCollapseMonitor(), NeuralCollapseMonitor(layer="nowhere")])
    assert not [f for f in doctor(run, Plain(), loader()) if f.check == "cost"]


def test_a_side_without_the_callback_is_the_run_without_it(tmp_path):
    """What is timed: as many batches as asked for over as many epochs as it takes, and the end of an epoch."""
    run = Run(trainer(tmp_path, callbacks=[Slow()]), SlowModule(), loader(), loader())
    with_it, without = _timed(run, [0], 10, 2, 0), _timed(run, [], 10, 2, None)
    assert isinstance(with_it, Stopwatch)
    assert len(with_it.seconds) == len(without.seconds) == 10
    assert min(with_it.seconds) >= 0.021  # both slept
    assert min(without.seconds) >= 0.001
    assert min(with_it.at_end) >= 0.04  # two batches of a pass
    assert without.at_end == []
    assert with_it.num_batches == 4


@pytest.mark.parametrize(("share", "said"), [(0.5, "50 %"), (0.031, "3.1 %"), (15.04, "1504 %")])
def test_percent(share, said):
    assert _percent(share) == said
