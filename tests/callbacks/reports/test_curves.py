import sys

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_feat.callbacks.reports.curves import CurvePlotter, Panel, default_panels, draw

pytest.importorskip("matplotlib")


class Decay(LightningModule):
    """Logs a loss that halves from step to step."""

    def __init__(self, factor: float = 0.5):
        super().__init__()
        self.factor, self.weight = factor, torch.nn.Parameter(torch.ones(()))

    def train_dataloader(self):
        return DataLoader(torch.zeros(2), batch_size=1)

    def val_dataloader(self):
        return DataLoader(torch.zeros(1), batch_size=1)

    def training_step(self, batch, batch_idx):
        return self.weight**2

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.factor**self.global_step)
        self.log("val/accuracy", 1 - self.factor**self.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path, callbacks, **arguments):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    defaults = {"max_epochs": 3, "enable_checkpointing": False, "default_root_dir": tmp_path, "logger": False}
    return Trainer(**{**quiet, **defaults, "callbacks": callbacks, **arguments})


POINTS = {
    "val/accuracy": [(1.0, 0.5), (2.0, 0.75), (3.0, 0.875)],
    "nc/nc1/fc": [(1.0, 10.0), (2.0, 0.1), (3.0, 0.001)],
    "nc/nc2/fc": [(1.0, 0.5), (2.0, float("nan")), (3.0, 0.3)],
    "nc/nc3/fc": [(1.0, 0.5), (2.0, 0.4), (3.0, 0.0)],
}
PANELS = [
    Panel(["val/accuracy"], "validation accuracy (%)", scale=100),
    Panel({"NC1": "nc/nc1/*"}, "NC1", log_scale=True),
    Panel(["nc/nc2/*", "nc/nc3/*"], "NC2, NC3", log_scale=True),
]


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_axes_have_names_scales_and_units():
    axes = draw(PANELS, POINTS).axes
    assert [ax.get_ylabel() for ax in axes] == ["validation accuracy (%)", "NC1", "NC2, NC3"]
    assert [ax.get_yscale() for ax in axes] == ["linear", "log", "log"]
    assert [ax.get_xlabel() for ax in axes] == ["", "", "epoch"]
    assert axes[0].lines[0].get_xydata().tolist() == [[1, 50], [2, 75], [3, 87.5]]


def test_legend_is_outside_and_left_out_where_the_axis_says_it_all():
    figure = draw(PANELS, POINTS)
    figure.draw_without_rendering()
    assert figure.axes[0].get_legend() is None
    for axes, texts in ((figure.axes[1], ["NC1"]), (figure.axes[2], ["nc2", "nc3"])):
        legend = axes.get_legend()
        assert [text.get_text() for text in legend.get_texts()] == texts
        assert legend.get_window_extent().x0 > axes.get_window_extent().x1
        assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_marker_sits_at_the_last_value_that_can_be_seen():
    lines = draw(PANELS, POINTS).axes[2].lines
    assert [line.get_markevery() for line in lines] == [[2], [1]]  # nc3 ends in zero, which a log axis cannot show


def test_value_that_could_not_be_measured_leaves_a_gap():
    assert draw(PANELS, POINTS).axes[2].lines[0].get_ydata()[1] != 0.4
    assert torch.tensor(draw(PANELS, POINTS).axes[2].lines[0].get_ydata()).isnan().tolist() == [False, True, False]


def test_log_axis_without_a_positive_value_stays_linear():
    (axes,) = draw([Panel(["zero"], "zero", log_scale=True)], {"zero": [(1.0, 0.0), (2.0, 0.0)]}).axes
    assert axes.get_yscale() == "linear"


def test_many_curves_are_told_apart():
    points = {f"curve{i}": [(1.0, float(i)), (2.0, float(i))] for i in range(28)}
    lines = draw([Panel(["curve*"], "value")], points).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 28


def test_default_panels_are_losses_accuracies_and_one_for_each_method():
    points = {
        name: [(1.0, 1.0), (2.0, 0.5)]
        for name in ("train_loss", "train_loss_step", "train_loss_epoch", "val/loss", "val_acc", "nc/loss", "nc/nc1")
    }
    points["nc/nc1"] = [(1.0, 200.0), (2.0, 0.5)]
    assert default_panels(points) == [
        Panel(["train_loss", "val/loss"], "loss"),
        Panel(["val_acc"], "val_acc"),
        Panel(["nc/loss", "nc/nc1"], "nc", log_scale=True),
    ]


@pytest.mark.parametrize("panels", [None, PANELS[:1]])
def test_figure_lies_beside_the_metrics_file(panels, tmp_path):
    trainer(tmp_path, CurvePlotter(panels), logger=CSVLogger(tmp_path, name="run")).fit(Decay())
    folder = tmp_path / "run" / "version_0"
    assert (folder / "metrics.csv").exists()
    width, _ = png_size(folder / "curves.png")
    assert width == 1300  # 6.5 inches at 200 dots per inch


@pytest.mark.parametrize(("name", "start"), [("a.pdf", b"%PDF"), ("deep/b.svg", b"<?xml")])
def test_ending_of_the_file_name_says_the_format(name, start, tmp_path):
    trainer(tmp_path, CurvePlotter(filename=name)).fit(Decay())
    assert (tmp_path / name).read_bytes().startswith(start)


def test_stopping_early_draws_what_there_is(tmp_path):
    plotter = CurvePlotter()
    trainer(tmp_path, [plotter, EarlyStopping("val/accuracy", patience=1)]).fit(Decay())
    assert len(plotter.points["val/loss"]) == 2
    png_size(tmp_path / "curves.png")


class Break(Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 2:
            raise self.error


@pytest.mark.parametrize(("error", "seen"), [(KeyboardInterrupt(), SystemExit), (ArithmeticError(), ArithmeticError)])
def test_being_broken_off_draws_what_there_is(error, seen, tmp_path):
    with pytest.raises(seen):
        trainer(tmp_path, [CurvePlotter(), Break(error)]).fit(Decay())
    png_size(tmp_path / "curves.png")


def test_resumed_run_draws_the_whole_curve(tmp_path):
    two = [CurvePlotter(), CurvePlotter(filename="other.png")]
    keep = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, [*two, keep], max_epochs=2, enable_checkpointing=True).fit(Decay())
    resumed = CurvePlotter(PANELS[:1])
    trainer(tmp_path, resumed).fit(Decay(), ckpt_path=tmp_path / "last.ckpt")
    assert [epoch for epoch, _ in resumed.points["val/loss"]] == [1, 2, 3]


def test_tensorboard_gets_the_figure_too(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="run")
    trainer(tmp_path, CurvePlotter(filename="collapse.png"), logger=logger).fit(Decay())
    events = accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    (image,) = events.Images("collapse")
    assert image.width == 1300
    assert image.step == 6  # optimizer steps in three epochs of two batches
    assert (tmp_path / "run" / "version_0" / "collapse.png").exists()


def test_folder_that_cannot_be_written_to_is_a_warning(tmp_path):
    (tmp_path / "taken").write_text("a file, where a folder is needed")
    with pytest.warns(UserWarning, match="CurvePlotter could not report on the run: .*taken"):
        trainer(tmp_path, CurvePlotter(filename="taken/curves.png")).fit(Decay())


def test_fast_dev_run_leaves_no_file(tmp_path):
    trainer(tmp_path, CurvePlotter(), fast_dev_run=True).fit(Decay())
    assert list(tmp_path.iterdir()) == []


def test_pattern_without_a_metric_is_named_and_its_panel_left_out(tmp_path):
    panels = [Panel(["val/acuracy"], "accuracy"), Panel(["val/loss"], "loss")]
    with pytest.warns(UserWarning, match=r"panel 'accuracy': nothing logged matches 'val/acuracy'; nearest: val/acc"):
        trainer(tmp_path, CurvePlotter(panels)).fit(Decay())
    png_size(tmp_path / "curves.png")


def test_missing_matplotlib_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-feat\[recipes\]"'):
        trainer(tmp_path, CurvePlotter()).fit(Decay())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"panels": []}, "panels=\\[\\]"),
        ({"panels": [Panel([], "empty")]}, "'empty' has no metrics"),
        ({"panels": [Panel(["a"], "a", scale=0.0)]}, "scale=0.0"),
        ({"filename": "curves"}, "filename='curves'"),
    ],
)
def test_bad_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        CurvePlotter(**arguments)


CONFIG = """
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: FOLDER, name: "", version: ""}}
  callbacks:
    - class_path: lightning_feat.callbacks.reports.curves.CurvePlotter
      init_args:
        filename: collapse.png
        panels:
          - {metrics: [val/accuracy], label: validation accuracy (%), scale: 100}
          - {metrics: {falling: val/loss}, label: loss, log_scale: true}
"""


def test_command_line_reads_panels_and_writes_them_back(tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr(sys, "argv", ["lightning-feat"])
    (tmp_path / "config_in.yaml").write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    expected = [PANELS[0], Panel({"falling": "val/loss"}, "loss", log_scale=True)]
    for file in ("config_in.yaml", "config.yaml"):  # the second was saved by the first run
        overwrite = {"overwrite": True}
        run = LightningCLI(Decay, args=["fit", "-c", str(tmp_path / file)], save_config_kwargs=overwrite).trainer
        (plotter,) = (callback for callback in run.callbacks if isinstance(callback, CurvePlotter))
        assert plotter.panels == expected
        png_size(tmp_path / "collapse.png")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["callbacks"]
