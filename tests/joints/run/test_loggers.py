"""Where a run keeps its files, and what its loggers get, with each logger itself, offline."""

import csv
import json
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_feat.callbacks import CurvePlotter, NeuralCollapseMonitor, SimplicityBiasUpsampler
from lightning_feat.joints.run.folder import run_folder
from tests.helpers import Plain, loader, trainer


def wandb(folder, monkeypatch, **kwargs):
    package = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_DATA_DIR": str(folder / "data"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_ARTIFACT_DIR", str(folder / "artifacts"))
    return WandbLogger(save_dir=str(folder), offline=True, **kwargs), package.finish


def mlflow(folder, monkeypatch, **kwargs):
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return MLFlowLogger(**{"save_dir": str(folder / "mlruns"), **kwargs}), lambda: None


def comet(folder, monkeypatch):
    package = pytest.importorskip("comet_ml")
    from lightning.pytorch.loggers import CometLogger

    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(folder))
    logger = CometLogger(online=False, offline_directory=str(folder))
    # With online=False Lightning switches the experiment off; one that is offline keeps what it is given.
    logger._experiment = package.OfflineExperiment(offline_directory=str(folder), display_summary_level=0)
    return logger, logger.experiment.end


def dvclive(folder, monkeypatch):
    package = pytest.importorskip("dvclive.lightning")
    monkeypatch.chdir(folder)
    return package.DVCLiveLogger(dir=str(folder / "dvclive"), save_dvc_exp=False), lambda: None


class Nameless(DummyLogger):
    """Has a folder, and no name for its runs."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    save_dir = property(lambda self: str(self.folder))


def nameless(folder, monkeypatch):
    return Nameless(folder), lambda: None


def csv_logger(folder, monkeypatch):
    return CSVLogger(folder), lambda: None


def fit(folder, logger, *callbacks, epochs):
    torch.manual_seed(0)
    run = trainer(folder, callbacks=[*callbacks], logger=logger, max_epochs=epochs, log_every_n_steps=1)
    run.fit(Plain(), loader(64), loader(20))
    return run


LOGGERS = {
    "wandb": wandb,
    "mlflow": mlflow,
    "comet": comet,
    "dvclive": dvclive,
    "nameless": nameless,
    "csv": csv_logger,
}
QUICK = {"nameless", "csv"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LOGGERS]
)
def test_two_runs_of_one_logger_keep_their_files_apart(name, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    folders = []
    for epochs in (3, 2):
        logger, finish = LOGGERS[name](tmp_path, monkeypatch)
        upsampler = SimplicityBiasUpsampler(separating_epoch=1, restart=False)
        run = fit(tmp_path, logger, NeuralCollapseMonitor(), CurvePlotter(), upsampler, epochs=epochs)
        folders.append(Path(upsampler._folder))
        assert run.callback_metrics
        finish()
    assert folders[0] != folders[1]
    for folder, epochs in zip(folders, (3, 2), strict=True):
        with (folder / "neural_collapse.csv").open(newline="") as file:
            assert [row["epoch"] for row in csv.DictReader(file)] == [str(epoch) for epoch in range(epochs)]
        assert (folder / "curves.png").is_file()
        assert (folder / "selection.pt").is_file()
    assert len([*tmp_path.rglob("neural_collapse.csv")]) == (4 if name == "mlflow" else 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_of_wandb_that_goes_on_finds_its_folder(tmp_path, monkeypatch):
    found = []
    for _ in range(2):
        logger, finish = wandb(tmp_path, monkeypatch, id="abc123")
        monitor = NeuralCollapseMonitor()
        fit(tmp_path, logger, monitor, epochs=1)
        found.append(monitor.report._folder)
        finish()
    assert found[0] == found[1] == str(tmp_path / "lightning_logs" / "abc123")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_gets_table_and_figure(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    logger, finish = wandb(tmp_path, monkeypatch)
    fit(tmp_path, logger, NeuralCollapseMonitor(), CurvePlotter(), epochs=2)
    finish()
    (kept,) = tmp_path.glob("wandb/offline-run-*/files/media/table/neural_collapse_*.table.json")
    table = json.loads(kept.read_text())
    assert [row[table["columns"].index("epoch")] for row in table["data"]] == [0, 1]
    assert isinstance(table["data"][0][table["columns"].index("cdnv")], float)
    assert [*tmp_path.glob("wandb/offline-run-*/files/media/images/curves_*.png")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("store", ["file", "database"])
def test_mlflow_gets_table_figure_and_selection(tmp_path, monkeypatch, store):
    pytest.importorskip("matplotlib")
    options = {}
    if store == "database":
        pytest.importorskip("sqlalchemy")
        pytest.importorskip("alembic")
        options = {"tracking_uri": f"sqlite:///{tmp_path}/runs.db", "artifact_location": str(tmp_path / "kept")}
    logger, _ = mlflow(tmp_path, monkeypatch, **options)
    callbacks = NeuralCollapseMonitor(), CurvePlotter(), SimplicityBiasUpsampler(separating_epoch=1, restart=False)
    run = fit(tmp_path, logger, *callbacks, epochs=2)
    kept = {path.path for path in logger.experiment.list_artifacts(logger.run_id)}
    assert {"neural_collapse.csv", "selection.pt", "curves"} <= kept
    assert [path.path for path in logger.experiment.list_artifacts(logger.run_id, "curves")] == [
        f"curves/step={run.global_step:08d}.png"
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_comet_gets_table_and_figure(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    logger, finish = comet(tmp_path, monkeypatch)
    fit(tmp_path, logger, NeuralCollapseMonitor(), CurvePlotter(), epochs=2)
    finish()
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as content:
        said = content.read("messages.json").decode()
    assert '"neural_collapse.csv"' in said
    assert '"curves"' in said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_table_reaches_the_logger_also_when_an_error_ends_the_run(tmp_path, monkeypatch):
    class Fails(Plain):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                raise RuntimeError("out of luck")

    logger, _ = mlflow(tmp_path, monkeypatch)
    run = trainer(tmp_path, callbacks=NeuralCollapseMonitor(), logger=logger, max_epochs=3)
    with pytest.raises(RuntimeError, match="out of luck"):
        run.fit(Fails(), loader(64))
    assert [path.path for path in logger.experiment.list_artifacts(logger.run_id)] == ["neural_collapse.csv"]


def test_without_a_logger_the_folder_is_that_of_the_trainer(tmp_path):
    assert run_folder(trainer(tmp_path)) == str(tmp_path)
