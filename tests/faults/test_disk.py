"""A disk that is full or a folder that cannot be written to: a warning, and the training goes on as it would have."""

import builtins
import errno
import io
import os
import re
import warnings

import pytest
import torch
from lightning.pytorch.loggers.logger import Logger

from lightning_feat.callbacks import (
    CurvePlotter,
    GrassmannHead,
    GrassmannMonitor,
    NeuralCollapseMonitor,
    SimplicityBiasUpsampler,
    SummaryTable,
)
from lightning_feat.callbacks.feature_shift.monitor import FeatureShiftMonitor
from lightning_feat.callbacks.neural_collapse.table import CollapseTable
from lightning_feat.data import Selection
from tests.helpers import Plain, equal, loader, trainer, weights

WRITERS = {
    "collapse table": (lambda: [NeuralCollapseMonitor(table=True)], "could not write its table"),
    "collapse figure": (lambda: [NeuralCollapseMonitor(figures=True, table=False)], "could not draw its figure"),
    "curves": (lambda: [CurvePlotter()], "CurvePlotter could not report on the run"),
    "angles": (lambda: [GrassmannHead(2), GrassmannMonitor(figure=True)], "could not draw the angles"),
    "shift": (lambda: [FeatureShiftMonitor(["net.fc"], figure=True)], "could not draw its figure"),
    "selection": (lambda: [SimplicityBiasUpsampler(separating_epoch=1, restart=False)], "could not write .*selection"),
}
OURS = ("neural_collapse", "curves", "grassmann_angles", "feature_shift", "selection")


class Nowhere(Logger):
    """A logger that has a folder and writes nothing itself, so that what fails is ours."""

    name, version = "nowhere", 0

    def __init__(self, folder):
        super().__init__()
        self.folder = str(folder)

    @property
    def save_dir(self):
        return self.folder

    def log_metrics(self, *args, **kwargs):
        pass

    log_hyperparams = log_metrics


class Full(io.FileIO):
    """A file that takes nothing: a buffered write fails when it is flushed, at the end of the block."""

    def write(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full_disk(monkeypatch):
    """Files with one of our names can be opened, and take nothing."""
    true_open = builtins.open

    def opened(path, mode="r", *args, **kwargs):
        if isinstance(path, str | os.PathLike) and "w" in mode and os.path.basename(path).startswith(OURS):
            file = io.BufferedWriter(Full(path, "w"))
            return file if "b" in mode else io.TextIOWrapper(file)
        return true_open(path, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", opened)


def fit(folder, name, epochs=2):
    torch.manual_seed(0)
    module = Plain()
    run = trainer(folder, callbacks=WRITERS[name][0](), max_epochs=epochs, logger=Nowhere(folder), log_every_n_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, loader(), loader())
    assert run.current_epoch == epochs
    return weights(module), [str(entry.message) for entry in caught]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return {name: fit(tmp_path_factory.mktemp("undisturbed"), name)[0] for name in WRITERS}


def assert_warned_once(said, name):
    assert len([sentence for sentence in said if re.search(WRITERS[name][1], sentence)]) == 1, said


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_a_warning(tmp_path, undisturbed, full_disk, name):
    trained, said = fit(tmp_path, name)
    assert_warned_once(said, name)
    assert "No space left on device" in " ".join(said)
    assert equal(trained, undisturbed[name])


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_cannot_be_is_a_warning(tmp_path, undisturbed, name):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    trained, said = fit(blocked / "below", name)
    assert_warned_once(said, name)
    assert equal(trained, undisturbed[name])


def test_a_table_without_a_file_of_its_own_prints(tmp_path, full_disk, capsys):
    run = trainer(tmp_path, callbacks=SummaryTable())
    run.fit(Plain(), loader(), loader())
    assert "val/loss" in capsys.readouterr().out


def test_a_full_disk_costs_no_row_that_was_written(tmp_path, request):
    table = CollapseTable(str(tmp_path))
    table.add(0, 4, "online", "fc", "train", {"cdnv": 0.5})
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="No space left"):
        table.add(1, 8, "online", "fc", "train", {"cdnv": 0.25})
    assert [row["cdnv"] for row in table.rows()] == ["0.5"]


def test_a_selection_is_whole_or_not_there(tmp_path, request):
    slow, targets = torch.tensor([True, False]), torch.tensor([0, 0])
    found = Selection(slow, targets, slow.long(), torch.zeros(1, 2), epoch=1, factor=2, seed=0, choose="clusters")
    path = str(tmp_path / "selection.pt")
    found.save(path)
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="No space left"):
        Selection(~slow, targets, slow.long(), torch.zeros(1, 2), 1, 2, 0, "clusters").save(path)
    assert Selection.load(path).slow.equal(slow)


def test_a_torn_selection_is_refused_by_name(tmp_path):
    path = tmp_path / "selection.pt"
    path.write_bytes(b"PK\x03\x04 half of a file")
    with pytest.raises(ValueError, match=r"selection\.pt is torn or no file of torch"):
        Selection.load(str(path))
