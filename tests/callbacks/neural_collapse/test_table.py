"""The table that the monitor of neural collapse writes."""

import csv
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_feat.callbacks import NeuralCollapseMonitor
from lightning_feat.callbacks.neural_collapse.table import CollapseTable
from lightning_feat.functional.neural_collapse import class_sums, collapse_measures
from tests.helpers import Plain, loader, points, trainer


def fit(tmp_path, *callbacks, ckpt_path=None, lr=0.1, **kwargs):
    torch.manual_seed(0)
    run = trainer(tmp_path, callbacks=[*callbacks], **{"max_epochs": 3, **kwargs})
    module = Plain(lr=lr)
    run.fit(module, loader(64), loader(20), ckpt_path=ckpt_path)
    return run, module


def table(folder):
    with (folder / "neural_collapse.csv").open(newline="") as file:
        return [*csv.DictReader(file)]


def test_table_has_a_row_for_epoch_layer_and_data_with_every_measure_in_full(tmp_path):
    monitor = NeuralCollapseMonitor(
        layer=["net.body.0", "net.body"], mode="exact", data="both", measures=["cdnv"], table=True
    )
    _, module = fit(tmp_path, monitor, max_epochs=2)
    rows = table(tmp_path)
    assert [(row["epoch"], row["layer"], row["data"]) for row in rows] == [
        (str(epoch), layer, data)
        for epoch in (0, 1)
        for data in ("train", "val")
        for layer in ("net.body.0", "net.body")
    ]
    assert [row["step"] for row in rows] == ["8"] * 4 + ["16"] * 4
    assert rows[-1]["nc3"]
    assert rows[-2]["nc3"] == ""  # no classifier reads that layer
    x, y = points(20).tensors
    module.eval()
    with torch.no_grad():
        parts = [module.net.body(part) for part in x.split(8)]  # the batches of the pass
    totals = class_sums(torch.cat(parts), y, 3)
    for name, value in collapse_measures(totals, weight=module.net.fc.weight, bias=module.net.fc.bias).items():
        assert float(rows[-1][name]) == pytest.approx(float(value), rel=1e-12), name  # more than float32 could hold


def test_table_goes_on_when_a_run_is_resumed_and_holds_no_row_twice(tmp_path):
    saved = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(tmp_path, NeuralCollapseMonitor(table=True), saved, max_epochs=4, enable_checkpointing=True)
    before = table(tmp_path)
    fit(tmp_path, NeuralCollapseMonitor(table=True), ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=3)
    after = table(tmp_path)
    assert [row["epoch"] for row in before] == ["0", "1", "2", "3"]
    assert [row["epoch"] for row in after] == ["0", "1", "2"]  # the fourth was of weights that are no more
    assert after == before[:3]  # the loader does not shuffle: the third epoch is the same again


def test_two_monitors_share_the_table(tmp_path):
    online, exact = NeuralCollapseMonitor(table=True), NeuralCollapseMonitor(mode="exact", every_n_epochs=3, table=True)
    fit(tmp_path, online, exact)
    places = [(row["epoch"], row["mode"]) for row in table(tmp_path)]
    assert places == [("0", "online"), ("0", "exact"), ("1", "online"), ("2", "online"), ("2", "exact")]


def test_table_keeps_all_digits_and_what_is_no_number(tmp_path):
    values = {"third": 1 / 3, "none": float("nan"), "far": float("inf")}
    written = CollapseTable(str(tmp_path / "new"))
    written.add(0, 5, "online", "a,b", "train", values)
    written.add(1, 10, "online", "a,b", "train", {"third": 2 / 3, "more": 1.0})
    first, second = written.rows()
    assert float(first["third"]) == 1 / 3
    assert math.isnan(float(first["none"]))
    assert float(first["far"]) == math.inf
    assert (first["layer"], first["more"], second["none"]) == ("a,b", "", "")


def test_table_that_cannot_be_written_is_one_warning_and_no_end(tmp_path):
    (tmp_path / "neural_collapse.csv").mkdir()
    with pytest.warns(UserWarning, match="could not write its table: IsADirectoryError") as caught:
        run, _ = fit(tmp_path, NeuralCollapseMonitor(table=True))
    assert run.current_epoch == 3
    assert len([warning for warning in caught if "its table" in str(warning.message)]) == 1


def test_table_is_written_by_default_where_a_logger_has_a_folder(tmp_path):
    fit(tmp_path, NeuralCollapseMonitor())
    assert not (tmp_path / "neural_collapse.csv").exists()
    run, _ = fit(tmp_path, NeuralCollapseMonitor(), logger=CSVLogger(tmp_path, name="run"))
    assert len(table(Path(run.log_dir))) > 0
    quiet, _ = fit(tmp_path, NeuralCollapseMonitor(table=False), logger=CSVLogger(tmp_path, name="run"))
    assert not (Path(quiet.log_dir) / "neural_collapse.csv").exists()
