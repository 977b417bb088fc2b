import os
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_feat.callbacks.reports.history import MetricHistory, select, shorten, unmatched


class Counter(LightningModule):
    """Logs the number of the epoch in every way there is."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.log("train/by_step", float(batch_idx))  # Lightning's default in training: by step alone
        self.log("train/both", float(batch_idx), on_step=True, on_epoch=True, batch_size=1)
        return self.weight**2

    def validation_step(self, batch, batch_idx):
        self.log("val/steps_done", float(self.global_step), batch_size=1)

    def on_train_epoch_end(self):
        self.log("late/by_module", float(self.current_epoch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Late(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("late/by_callback", 10.0 * trainer.current_epoch)


class Early(Callback):
    """As the monitor of learning rates does it."""

    def on_train_epoch_start(self, trainer, pl_module):
        trainer.callback_metrics["early"] = torch.tensor(float(trainer.current_epoch))


class Reporter(MetricHistory):
    def __init__(self):
        super().__init__()
        self.reports = 0

    def report(self, trainer):
        self.reports += 1


def loader():
    return DataLoader(torch.zeros(4), batch_size=1)


def trainer(tmp_path, callbacks, **arguments):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    defaults = {"max_epochs": 4, "enable_checkpointing": False, "default_root_dir": tmp_path}
    return Trainer(**{**quiet, **defaults, "callbacks": callbacks, **arguments})


def fitted(tmp_path, **arguments):
    history = Reporter()
    trainer(tmp_path, [history, Late()], **arguments).fit(Counter(), loader(), loader())
    return history


def test_each_epoch_has_its_values_whoever_logged_them(tmp_path):
    points = fitted(tmp_path).points
    assert points["late/by_module"] == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert points["late/by_callback"] == [(1, 0), (2, 10), (3, 20), (4, 30)]
    assert points["val/steps_done"] == [(1, 4), (2, 8), (3, 12), (4, 16)]
    assert points["train/by_step"] == [(1, 3), (2, 3), (3, 3), (4, 3)]
    assert points["train/both"] == [(1, 1.5), (2, 1.5), (3, 1.5), (4, 1.5)]  # the mean of the epoch, not the last step


def test_what_is_set_at_the_start_of_an_epoch_belongs_to_it(tmp_path):
    history = Reporter()
    trainer(tmp_path, [Early(), history]).fit(Counter(), loader(), loader())
    assert history.points["early"] == [(1, 0), (2, 1), (3, 2), (4, 3)]


def test_metric_of_every_second_epoch_has_no_points_between(tmp_path):
    points = fitted(tmp_path, check_val_every_n_epoch=2).points
    assert points["val/steps_done"] == [(2, 8), (4, 16)]
    assert len(points["late/by_module"]) == 4


def test_validation_inside_an_epoch_has_a_point_there_and_training_has_none(tmp_path):
    points = fitted(tmp_path, max_epochs=2, val_check_interval=0.5).points
    assert points["val/steps_done"] == [(0.5, 2), (1, 4), (1.5, 6), (2, 8)]
    assert points["train/both"] == [(1, 1.5), (2, 1.5)]
    assert points["train/by_step"] == [(1, 3), (2, 3)]


def test_run_that_ends_inside_an_epoch_has_its_last_point_there(tmp_path):
    points = fitted(tmp_path, max_epochs=-1, max_steps=6, limit_val_batches=0).points
    assert points["late/by_callback"] == [(1, 0), (1.5, 10)]


def test_sanity_check_is_no_measurement(tmp_path):
    history = fitted(tmp_path, num_sanity_val_steps=2, check_val_every_n_epoch=3, max_epochs=4)
    assert history.points["val/steps_done"] == [(3, 12)]


def resumed(tmp_path, **moment):
    keep = ModelCheckpoint(tmp_path, save_last=True, **moment)
    trainer(tmp_path, [Reporter(), Late(), keep], max_epochs=2, enable_checkpointing=True).fit(
        Counter(), loader(), loader()
    )
    history = Reporter()
    torch.load(tmp_path / "last.ckpt", weights_only=True)  # nothing but plain values in it
    trainer(tmp_path, [history, Late()]).fit(Counter(), loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    return history


def test_resumed_run_has_the_whole_history(tmp_path):
    assert resumed(tmp_path, save_on_train_epoch_end=True).points == fitted(tmp_path).points


def test_checkpoint_of_a_validation_lacks_the_training_values_of_its_epoch_alone(tmp_path):
    points, expected = resumed(tmp_path, save_on_train_epoch_end=False).points, fitted(tmp_path).points
    assert points["val/steps_done"] == expected["val/steps_done"]
    assert points["late/by_callback"] == expected["late/by_callback"]
    assert points["train/both"] == [point for point in expected["train/both"] if point[0] != 2]


def test_history_of_another_run_is_forgotten(tmp_path):
    history = fitted(tmp_path)
    trainer(tmp_path, history, max_epochs=1).fit(Counter(), loader(), loader())
    assert history.points["val/steps_done"] == [(1, 4)]


def test_same_trainer_going_on_adds_to_the_history(tmp_path):
    history = Reporter()
    run, module = trainer(tmp_path, history, max_epochs=1), Counter()
    run.fit(module, loader(), loader())
    run.fit_loop.max_epochs = 2
    run.fit(module, loader(), loader())
    assert history.points["val/steps_done"] == [(1, 4), (2, 8)]


def test_validation_on_its_own_is_not_part_of_the_run(tmp_path):
    history = fitted(tmp_path, max_epochs=1)
    before = dict(history.points)
    trainer(tmp_path, history).validate(Counter(), loader(), verbose=False)
    assert history.points == before


class Break(Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 2:
            raise self.error


def test_reports_once_at_the_end(tmp_path):
    assert fitted(tmp_path).reports == 1


def test_reports_when_stopped_early(tmp_path):
    history = Reporter()
    stop = EarlyStopping("val/steps_done", patience=1)  # which never falls
    trainer(tmp_path, [history, stop]).fit(Counter(), loader(), loader())
    assert (history.reports, len(history.points["val/steps_done"])) == (1, 2)


@pytest.mark.parametrize(("error", "seen"), [(KeyboardInterrupt(), SystemExit), (ArithmeticError(), ArithmeticError)])
def test_reports_when_broken_off(error, seen, tmp_path):
    history = Reporter()
    with pytest.raises(seen):
        trainer(tmp_path, [history, Break(error)]).fit(Counter(), loader(), loader())
    assert (history.reports, len(history.points["late/by_module"])) == (1, 2)


class Trip(Callback):
    def on_fit_end(self, trainer, pl_module):
        raise ArithmeticError


def test_an_error_after_the_report_brings_no_second_one(tmp_path):
    history = Reporter()
    with pytest.raises(ArithmeticError):
        trainer(tmp_path, [history, Trip()]).fit(Counter(), loader(), loader())
    assert history.reports == 1


def test_error_in_a_report_becomes_a_warning(tmp_path):
    class Clumsy(MetricHistory):
        def report(self, trainer):
            raise OSError("disk full")

    with pytest.warns(UserWarning, match="Clumsy could not report on the run: OSError: disk full"):
        trainer(tmp_path, Clumsy(), max_epochs=1).fit(Counter(), loader(), loader())


class Note(MetricHistory):
    """Leaves a file that names its process and what it saw."""

    def report(self, trainer):
        with open(os.path.join(trainer.default_root_dir, f"report-{trainer.global_rank}"), "w") as file:
            file.write(str(len(self.points["late/by_module"])))


@pytest.mark.slow
def test_one_of_two_processes_reports(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unsynchronised logging, which is not the matter here
        trainer(tmp_path, Note(), max_epochs=2, strategy="ddp_spawn", devices=2).fit(Counter(), loader(), loader())
    assert [(path.name, path.read_text()) for path in tmp_path.glob("report-*")] == [("report-0", "2")]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["train/loss", "val/loss"], ["train", "val"]),
        (["nc/nc1/fc", "nc/nc2/fc"], ["nc1", "nc2"]),
        (["nc/nc1/fc", "nc/nc2/conv"], ["nc1/fc", "nc2/conv"]),
        (["a", "a/b"], ["a", "a/b"]),
        (["val/loss"], ["val/loss"]),
        ([], []),
    ],
)
def test_shared_parts_of_names_are_left_out(names, short):
    assert list(shorten(names).values()) == short


def test_a_metric_is_selected_once_in_the_order_of_the_patterns():
    assert list(select(["b*", "*"], ["a", "b1", "b2"])) == ["b1", "b2", "a"]
    assert select({"B": "b*", "rest": "*"}, ["a", "b1"]) == {"b1": "B", "a": "rest"}


def test_name_with_brackets_can_be_written_as_it_is():
    assert list(select(["acc[top]"], ["acc[top]", "acct"])) == ["acc[top]"]


def test_pattern_without_a_metric_brings_the_nearest_name():
    (sentence,) = unmatched(["val/accuracy", "val/acc"], ["val/accuracy", "train/loss"])
    assert sentence == "nothing logged matches 'val/acc'; nearest: val/accuracy."
