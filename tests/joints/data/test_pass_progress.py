"""A pass over the data shows how far it is, by the progress bar of the Trainer."""

import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress import tqdm_progress

from lightning_feat.callbacks import NeuralCollapseMonitor
from tests.helpers import Plain, loader, trainer


@pytest.fixture
def drawn(monkeypatch):
    """Every line that Tqdm draws."""
    found = []

    class Recording(tqdm_progress.Tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.desc = getattr(self, "desc", "")  # a line that is disabled has none
            found.append(self)

    monkeypatch.setattr(tqdm_progress, "Tqdm", Recording)
    return found


@pytest.fixture
def lines(drawn):
    """Title, total and steps of those of the monitor."""
    return lambda: [(line.desc.strip(": "), line.total, line.n) for line in drawn if "collapse" in line.desc]


def fit(tmp_path, monitor, bar=None, module=Plain, **kwargs):
    torch.manual_seed(0)
    shown = kwargs.get("enable_progress_bar", True)
    callbacks = [monitor, bar or TQDMProgressBar()] if shown else [monitor]
    run = trainer(tmp_path, callbacks=callbacks, **{"enable_progress_bar": True, **kwargs})
    run.fit(module(), loader(64), loader(20))


TRAIN, VAL = ("Neural collapse, training data", 8, 8), ("Neural collapse, validation data", 3, 3)
AGAIN = ("Neural collapse, training data again", 8, 8)


def test_a_line_for_each_pass(tmp_path, lines):
    fit(tmp_path, NeuralCollapseMonitor(mode="exact", data="both"))
    assert lines() == [TRAIN, VAL]


def test_the_second_run_of_the_network_has_its_own(tmp_path, lines):
    fit(tmp_path, NeuralCollapseMonitor(mode="exact", memory_budget_mb=0.0))
    assert lines() == [TRAIN, AGAIN]


@pytest.mark.parametrize(
    "off", [{"enable_progress_bar": False}, {"bar": TQDMProgressBar(refresh_rate=0)}], ids=["off", "rate zero"]
)
def test_no_line_without_a_progress_bar(tmp_path, lines, off):
    fit(tmp_path, NeuralCollapseMonitor(mode="exact"), **off)
    assert not lines()


def test_online_mode_has_none(tmp_path, lines):
    fit(tmp_path, NeuralCollapseMonitor())
    assert not lines()


def test_line_is_seen_and_taken_away(tmp_path, capsys):
    fit(tmp_path, NeuralCollapseMonitor(mode="exact"))
    out = capsys.readouterr().out
    assert "Neural collapse, training data:   0%" in out
    assert "Neural collapse" not in out.splitlines()[-1]


class FailsInPass(Plain):
    """Works in training, in validation and on the first batch, and not when the monitor runs it after an epoch."""

    def validation_step(self, batch, batch_idx):
        pass

    def forward(self, x):
        if not self.training and self.trainer.global_step:
            raise ArithmeticError("in the pass")
        return super().forward(x)


def test_line_ends_with_an_exception(tmp_path, drawn):
    with pytest.raises(ArithmeticError, match="in the pass"):
        fit(tmp_path, NeuralCollapseMonitor(mode="exact"), module=FailsInPass)
    (line,) = (line for line in drawn if "collapse" in line.desc)
    assert line.disable  # closed; `drawn` keeps it from being collected, at which Tqdm closes too


def test_rich_shows_and_hides_it(tmp_path):
    pytest.importorskip("rich")
    bar = RichProgressBar()
    seen = []

    class Looking(NeuralCollapseMonitor):
        def _report(self, trainer, *args):
            seen.extend((task.description, task.total, task.completed, task.visible) for task in bar.progress.tasks)
            super()._report(trainer, *args)

    fit(tmp_path, Looking(mode="exact"), bar)
    assert ("Neural collapse, training data", 8, 8, False) in seen
