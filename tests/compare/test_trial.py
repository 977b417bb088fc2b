"""A metric that nobody logs is told before the first run; one that comes late in a run is not refused."""

import warnings

import pytest
from lightning.pytorch import Callback

from lightning_feat.callbacks import NeuralCollapseMonitor
from lightning_feat.compare import StudyError, compare
from tests.compare import cases


class LogsAt(Callback):
    """Logs at the end of some epochs."""

    def __init__(self, name, *epochs):
        self.name, self.epochs = name, epochs

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch in self.epochs:
            pl_module.log(self.name, 1.0)


def base(*callbacks, epochs=6):
    trainer, module, (train, val) = cases.trainer(*callbacks, epochs=epochs), cases.Tiny(), cases.loaders()
    return trainer, module, {"train": train, "val": val, "test": val}


def study(folder, metric, arm=base, **options):
    arms = {"base": arm, "other": arm}
    return compare(arms, 1, metric, folder=folder, executor="inline", quiet=True, **options)


def runs_in(folder):
    return sorted(folder.glob("runs/*/seed_*"))


@pytest.mark.parametrize("metric", ["val/acuracy", "val_accuracy", "acc", "val/top1:max", "test/accuracy"])
def test_where_nothing_can_come_later_every_unknown_name_is_refused(metric, tmp_path):
    with pytest.raises(StudyError, match=r"one batch of training and validation logged no .*; nearest: .*val/accuracy"):
        study(tmp_path, metric)
    assert not runs_in(tmp_path)


def test_what_needs_a_test_says_so(tmp_path):
    with pytest.raises(StudyError, match=r"needs test=True \(--test\)"):
        study(tmp_path, "test/accuracy")


@pytest.mark.parametrize("metric", ["val/acuracy", "accuracy", "val_loss"])
def test_beside_callbacks_what_looks_like_a_logged_name_is_refused(metric, tmp_path):
    with pytest.raises(StudyError, match="logged no"):
        study(tmp_path, metric, lambda: base(LogsAt("own/score", 5)))
    assert not runs_in(tmp_path)


@pytest.mark.parametrize("metric", ["own/score", "test/accuracy", "after", "val/loss:min"])
def test_what_comes_in_the_last_epoch_or_after_it_is_heard(metric, tmp_path):
    def late():
        return *base(LogsAt("own/score", 5)), lambda: {"after": 2.0}

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="one batch")
        made = study(tmp_path, metric, late, test=True)
    assert all(record.finished for record in made.records)


def test_what_may_come_in_the_middle_is_warned_of_and_not_refused(tmp_path):
    with pytest.warns(UserWarning, match="logged no 'own/score'.* The first run will tell"):
        made = study(tmp_path, "own/score", lambda: base(LogsAt("own/score", 2)))
    assert [record.value("own/score") for record in made.records] == [1, 1]


def test_what_comes_in_the_middle_and_looks_like_another_passes_without_a_trial(tmp_path):
    def arm():
        return base(LogsAt("val/accuracy2", 2))

    with pytest.raises(StudyError, match=r"give trial=False \(--no-trial\)"):
        study(tmp_path, "val/accuracy2", arm)
    assert study(tmp_path, "val/accuracy2", arm, trial=False).records[0].finished


class TinyWithSchedule(cases.Tiny):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if self.current_epoch == 2:
            self.log("score", 3.0)


def test_a_module_that_speaks_of_epochs_may_log_later(tmp_path):
    def arm():
        return cases.trainer(epochs=4), TinyWithSchedule(), cases.loaders()

    with pytest.warns(UserWarning, match="logged no 'score'"):
        assert study(tmp_path, "score", arm).records[0].value("score") == 3


def test_a_trial_is_one_batch_of_two_epochs_and_looks_at_few(tmp_path):
    seen = []

    class Counts(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(trainer.current_epoch)

        def on_validation_batch_start(self, *args, **kwargs):
            seen.append("val")

    monitor = NeuralCollapseMonitor(layer="network", mode="exact")

    with pytest.raises(StudyError):
        study(tmp_path, "val/acuracy", lambda: base(Counts(), monitor, epochs=300))
    assert seen == [0, "val", 299, "val"]


def test_a_trial_that_fails_says_nothing(tmp_path):
    class FailsAtTheEnd(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.num_training_batches == 1:
                raise FloatingPointError

    assert study(tmp_path, "val/loss", lambda: base(FailsAtTheEnd())).records[0].finished


def test_runs_that_are_there_are_asked_instead(tmp_path, monkeypatch):
    study(tmp_path, "val/loss")
    (tmp_path / "runs/base/trial.json").unlink()
    study(tmp_path, "val/loss")
    assert not (tmp_path / "runs/base/trial.json").exists()
