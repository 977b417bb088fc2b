import sys

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader

from lightning_feat.callbacks.reports.summary import SummaryTable, plain_table, rows


class Decay(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        return self.weight**2

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", 0.5**self.global_step)

    def on_train_epoch_end(self):
        self.log("method/share[%]", 12345.678)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Break(Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 2:
            raise self.error


def fit(tmp_path, *callbacks, **arguments):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    defaults = {"max_epochs": 4, "enable_checkpointing": False, "default_root_dir": tmp_path}
    loader = DataLoader(torch.zeros(2), batch_size=1)
    Trainer(**{**quiet, **defaults, "callbacks": list(callbacks), **arguments}).fit(Decay(), loader, loader)


@pytest.fixture(params=["rich", "plain"])
def printed(request, monkeypatch, capsys):
    """The printed rows as lists of words, with rich and without."""
    if request.param == "plain":
        monkeypatch.setitem(sys.modules, "rich.console", None)
    else:
        pytest.importorskip("rich")
    return lambda: [line.translate(str.maketrans("│┃", "  ")).split() for line in capsys.readouterr().out.splitlines()]


def test_table_has_first_and_last_values(tmp_path, printed):
    fit(tmp_path, SummaryTable(title="How it went"))
    words = printed()
    assert ["How", "it", "went"] in words
    assert ["metric", "first", "(epoch", "1)", "last", "(epoch", "4)"] in words
    assert ["val/loss", "0.25", "0.003906"] in words
    assert ["method/share[%]", "1.235e+04", "1.235e+04"] in words


def test_rows_come_in_the_order_and_under_the_names_asked_for(tmp_path, printed):
    fit(tmp_path, SummaryTable({"share": "method/*", "loss": "val/loss"}))
    assert [line[0] for line in printed() if line and line[0] in ("share", "loss", "val/loss")] == ["share", "loss"]


def test_stopping_early_prints_what_there_is(tmp_path, printed):
    fit(tmp_path, SummaryTable(["val/loss"]), EarlyStopping("val/loss", patience=1, mode="max"))
    assert ["val/loss", "0.25", "0.0625"] in printed()


@pytest.mark.parametrize(("error", "seen"), [(KeyboardInterrupt(), SystemExit), (ArithmeticError(), ArithmeticError)])
def test_being_broken_off_prints_what_there_is(error, seen, tmp_path, printed):
    with pytest.raises(seen):
        fit(tmp_path, SummaryTable(["val/loss"]), Break(error))
    assert ["val/loss", "0.25", "0.0625"] in printed()


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_table_comes_after_the_progress_bar(bar, tmp_path, capfd):
    fit(tmp_path, SummaryTable(title="Table"), bar(), enable_progress_bar=True)
    out = capfd.readouterr().out
    assert "Epoch 3" not in out[out.rindex("Table") :]


def test_metrics_measured_at_different_epochs_say_so():
    heads, cells = rows({"a": [(1.0, 0.5), (4.0, 0.25)], "b": [(2.0, 1.0), (4.0, float("nan"))]})
    assert heads == ["metric", "first", "last (epoch 4)"]
    assert cells == [["a", "0.5 (epoch 1)", "0.25"], ["b", "1 (epoch 2)", "nan"]]


def test_pattern_without_a_metric_is_named(tmp_path):
    with pytest.warns(UserWarning, match="SummaryTable: nothing logged matches 'val/lose'; nearest: val/loss"):
        fit(tmp_path, SummaryTable(["val/lose"]), max_epochs=1)


def test_no_pattern_is_refused():
    with pytest.raises(ValueError, match=r"metrics=\[\]"):
        SummaryTable([])


def test_two_tables_keep_apart(tmp_path, printed):
    fit(tmp_path, SummaryTable(["val/loss"], title="A"), SummaryTable(["method/*"], title="B"), max_epochs=1)
    words = printed()
    assert words.index(["A"]) < words.index(["B"])


def test_columns_of_the_plain_table_are_aligned():
    lines = plain_table("T", ["metric", "first"], [["long/name", "1"], ["x", "22.5"]]).splitlines()
    assert len({len(line) for line in lines[2:]}) == 1
