import re

import lightning.pytorch as pl
import pytest

from lightning_feat.callbacks import NeuralCollapseMonitor, SharpnessAwareMinimization
from lightning_feat.doctor import doctor
from lightning_feat.doctor.checks.two_passes import find_two_passes
from lightning_feat.doctor.trial import Run
from tests.helpers import Plain, loader, trainer


class Counts(pl.Callback):
    def on_after_backward(self, trainer, pl_module):
        pass


class Own(Plain):
    def on_before_optimizer_step(self, optimizer):
        pass


@pytest.mark.parametrize(
    ("callbacks", "module", "expected"),
    [
        ([SharpnessAwareMinimization()], Plain(), []),
        ([NeuralCollapseMonitor(), Counts()], Own(), []),
        ([SharpnessAwareMinimization(), NeuralCollapseMonitor()], Plain(), []),  # ours know of the second pass
        ([SharpnessAwareMinimization(), Counts()], Plain(), ["Counts.on_after_backward"]),
        (
            [SharpnessAwareMinimization(), Counts()],
            Own(),
            ["Own.on_before_optimizer_step", "Counts.on_after_backward"],
        ),
    ],
)
def test_hooks_that_will_run_twice_are_named(tmp_path, callbacks, module, expected):
    findings = doctor(trainer(tmp_path, callbacks=callbacks), module, loader(), loader(), cost=False)
    assert [(finding.severity, finding.check) for finding in findings] == [("warning", "hooks-twice")] * bool(expected)
    for finding in findings:
        assert (
            finding.what
            == f"{', '.join(expected)} will run twice in each step, once at the weights and once at "
            + ("the worst point.")
        )


@pytest.mark.parametrize(("interval", "said"), [(1, "each step .* 2 times"), (5, "every 5th step .* 1.2 times")])
def test_what_two_passes_cost_is_a_note(tmp_path, interval, said):
    run = Run(
        trainer(tmp_path, callbacks=[SharpnessAwareMinimization(interval=interval)]), Plain(), loader(), None, None
    )
    (note,) = find_two_passes(run, notes=True)
    assert (note.severity, note.check) == ("note", "two-passes")
    assert re.search(said, note.what)
    assert find_two_passes(run, notes=False) == []
