"""Thresholds of the monitor of neural collapse, and Lightning's own stopping on its measures."""

import logging
import sys
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks import CollapseThreshold, NeuralCollapseMonitor
from lightning_feat.callbacks.neural_collapse.table import CollapseTable
from tests.helpers import Plain, loader, points, trainer


def learnable(n):
    x, _ = points(n).tensors
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8)


def fit(tmp_path, *callbacks, **kwargs):
    torch.manual_seed(0)
    run = trainer(tmp_path, callbacks=[*callbacks], **{"max_epochs": 4, **kwargs})
    run.fit(Plain(), learnable(64), learnable(20))
    return run


def said(tmp_path, *thresholds, **kwargs):
    """The warnings of the monitor in a run with these thresholds, and the run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(tmp_path, NeuralCollapseMonitor(mode="exact", thresholds=[*thresholds], **kwargs))
    return [str(w.message) for w in caught if "neural collapse:" in str(w.message)], run


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """The value of NC1 after each of the four epochs, without a threshold."""
    folder = tmp_path_factory.mktemp("course")
    fit(folder, NeuralCollapseMonitor(mode="exact", table=True))
    values = [float(row["nc1_quotient"]) for row in CollapseTable(str(folder)).rows()]
    assert values == sorted(values, reverse=True)  # it falls, which the tests below live by
    return values


def test_warning_comes_once_and_names_measure_layer_and_value(tmp_path, course):
    between = (course[0] + course[1]) / 2
    messages, run = said(tmp_path, CollapseThreshold("nc1_quotient", between))
    assert messages == [
        f"neural collapse: nc1_quotient of layer penultimate (train data) is {course[1]:.4g} after 2 epochs, below "
        f"{between:g}."
    ]
    assert run.current_epoch == 4


def test_stopping_ends_the_run_after_the_epoch_and_says_why(tmp_path, course, caplog):
    stop = CollapseThreshold("nc1_quotient", (course[1] + course[2]) / 2, action="stop")
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        messages, run = said(tmp_path, stop)
    assert not messages
    assert run.current_epoch == 3
    assert f"nc1_quotient of layer penultimate (train data) is {course[2]:.4g} after 3 epochs, below" in caplog.text
    assert "the run stops" in caplog.text


def test_stopping_waits_for_min_epochs_as_lightning_does(tmp_path):
    stop = CollapseThreshold("nc1_quotient", 1e9, action="stop")
    assert fit(tmp_path, NeuralCollapseMonitor(thresholds=[stop]), min_epochs=3).current_epoch == 3


def test_direction_above(tmp_path, course):
    messages, _ = said(tmp_path, CollapseThreshold("nc1_quotient", (course[0] + course[1]) / 2, "above"))
    assert len(messages) == 1
    assert f"is {course[0]:.4g} after 1 epoch, above" in messages[0]


def test_epochs_before_the_first_to_look_at_do_not_count(tmp_path, course):
    messages, _ = said(tmp_path, CollapseThreshold("nc1_quotient", 1e9, from_epoch=3))
    assert len(messages) == 1
    assert "after 3 epochs" in messages[0]


def test_measure_that_is_not_logged_counts(tmp_path):
    messages, _ = said(tmp_path, CollapseThreshold("nc2_cosine_std", 1e9), measures=["cdnv"])
    assert len(messages) == 1


def test_nan_passes_no_threshold(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(16, 4), torch.zeros(16, dtype=torch.long))  # one class alone
        thresholds = [CollapseThreshold("nc1_quotient", 1e9), CollapseThreshold("nc1_quotient", -1.0, "above")]
        run = trainer(tmp_path, callbacks=[NeuralCollapseMonitor(thresholds=thresholds)])
        run.fit(Plain(), DataLoader(data, batch_size=8))
    assert run.callback_metrics["neural_collapse/nc1_quotient/penultimate"].isnan()
    assert not [w for w in caught if "nc1_quotient" in str(w.message)]


def test_each_layer_and_each_data_by_itself(tmp_path):
    both = {"layer": ["net.body.0", "net.body"], "data": "both"}
    messages, _ = said(tmp_path, CollapseThreshold("cdnv", 1e9), **both)
    places = [(layer, data) for data in ("train", "val") for layer in ("net.body.0", "net.body")]
    assert [message.split(" is ")[0] for message in messages] == [
        f"neural collapse: cdnv of layer {layer} ({data} data)" for layer, data in places
    ]
    messages, _ = said(tmp_path, CollapseThreshold("cdnv", 1e9, layer="net.body", data="val"), **both)
    assert len(messages) == 1
    assert "layer net.body (val data)" in messages[0]


def test_threshold_on_what_is_not_measured_is_said_once(tmp_path):
    with pytest.warns(UserWarning, match="the threshold on nc4_mismatch has no effect") as caught:
        fit(tmp_path, NeuralCollapseMonitor(thresholds=[CollapseThreshold("nc4_mismatch", 0.1)]))
    assert len([w for w in caught if "has no effect" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"measure": "nc1_quotent"}, "there is no measure 'nc1_quotent': did you mean nc1_quotient"),
        ({"measure": "cdnv", "direction": "under"}, "direction='under'"),
        ({"measure": "cdnv", "action": "halt"}, "action='halt'"),
    ],
)
def test_impossible_thresholds_are_refused_at_once(arguments, text):
    with pytest.raises(ValueError, match=text):
        CollapseThreshold(value=0.1, **arguments)


@pytest.mark.parametrize("mode", ["online", "exact"])
@pytest.mark.parametrize("first", [True, False])
def test_lightnings_early_stopping_works_on_a_measure_in_either_order(tmp_path, course, mode, first):
    threshold = (course[1] + course[2]) / 2 if mode == "exact" else 1e9
    stop = EarlyStopping("neural_collapse/nc1_quotient/penultimate", stopping_threshold=threshold)
    monitor = NeuralCollapseMonitor(mode=mode)
    run = fit(tmp_path, *((stop, monitor) if first else (monitor, stop)))
    assert run.current_epoch == (3 if mode == "exact" else 1)


CONFIG = """
trainer:
  max_epochs: 3
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning_feat.callbacks.NeuralCollapseMonitor
      init_args:
        mode: exact
        table: true
        thresholds:
          - {measure: nc1_quotient, value: 1.0e+9, action: stop, from_epoch: 2}
          - {measure: nc3, value: 0.5, direction: above, layer: penultimate, data: train}
"""


class WithData(Plain):
    def __init__(self):
        super().__init__()

    def train_dataloader(self):
        return loader(16)


def test_command_line_reads_thresholds(tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr(sys, "argv", ["lightning-feat"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.yaml").write_text(CONFIG)
    run = LightningCLI(WithData, args=["fit", "-c", str(tmp_path / "in.yaml")], save_config_callback=None).trainer
    (monitor,) = (callback for callback in run.callbacks if isinstance(callback, NeuralCollapseMonitor))
    assert monitor.watch.thresholds == [
        CollapseThreshold("nc1_quotient", 1e9, action="stop", from_epoch=2),
        CollapseThreshold("nc3", 0.5, "above", layer="penultimate", data="train"),
    ]
    assert run.current_epoch == 2
    assert (tmp_path / "neural_collapse.csv").exists()
