"""Figures of the monitor of neural collapse, and what it leaves alone."""

import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_feat.callbacks import CollapseThreshold, NeuralCollapseMonitor
from lightning_feat.callbacks.neural_collapse.figures import draw_collapse
from lightning_feat.functional.neural_collapse import (
    class_centers,
    class_sums,
    collapse_picture,
    within_class_scatter,
)
from tests.helpers import Plain, equal, loader, points, trainer, weights

pytest.importorskip("matplotlib")


def fit(tmp_path, *callbacks, ckpt_path=None, lr=0.1, **kwargs):
    torch.manual_seed(0)
    run = trainer(tmp_path, callbacks=[*callbacks], **{"max_epochs": 3, **kwargs})
    module = Plain(lr=lr)
    run.fit(module, loader(64), loader(20), ckpt_path=ckpt_path)
    return run, module


def picture(num_classes=10, width=32, within=True):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(4 * num_classes) % num_classes
    means = torch.randn(num_classes, width, generator=generator)
    features = means[targets] + 0.3 * torch.randn(len(targets), width, generator=generator)
    totals = class_sums(features, targets, num_classes)
    scatter = within_class_scatter(features, targets, class_centers(totals)) / len(targets)
    return collapse_picture(totals, scatter if within else None)


POINTS = {
    "nc1_quotient": [(1.0, 10.0), (2.0, 0.1)],
    "nc3": [(1.0, 0.5), (2.0, float("nan"))],
    "nc4_mismatch": [(1.0, 0.0), (2.0, 0.0)],
    "nc0": [(1.0, 3.0), (2.0, 1.0)],
}


def panels(figure):
    figure.draw_without_rendering()
    cosines, spectra = (axes for axes in figure.axes if axes.get_ylabel() in ("class", "eigenvalue of the scatter"))
    (bar,) = (axes for axes in figure.axes if "cosine" in axes.get_ylabel())
    (curves,) = (axes for axes in figure.axes if axes.get_xlabel() == "epochs completed")
    return cosines, bar, spectra, curves


def test_axes_have_names_and_scales():
    cosines, bar, spectra, curves = panels(draw_collapse(picture(), POINTS, "penultimate"))
    assert (cosines.get_xlabel(), cosines.get_ylabel()) == ("class", "class")
    assert bar.get_ylabel() == "cosine of centred class means"
    assert bar.get_ylim() == (-1, 1)
    assert (spectra.get_xlabel(), spectra.get_ylabel()) == ("direction, by size", "eigenvalue of the scatter")
    assert spectra.get_yscale() == curves.get_yscale() == "log"
    assert curves.get_ylabel() == "measure (0: collapsed)"


@pytest.mark.parametrize(("num_classes", "text"), [(2, "simplex\n-1"), (10, "simplex\n-0.111")])
def test_the_simplex_is_marked_in_the_colour_bar_and_white(num_classes, text):
    cosines, bar, _, _ = panels(draw_collapse(picture(num_classes), POINTS))
    assert [mark.get_text() for mark in bar.texts] == [text]
    (image,) = cosines.images
    assert image.norm(-1 / (num_classes - 1)) == pytest.approx(0.5)


def test_where_no_simplex_fits_none_is_marked():
    cosines, bar, _, _ = panels(draw_collapse(picture(10, width=8), POINTS))
    assert not bar.texts
    assert cosines.images[0].norm(0.0) == 0.5


def test_spectrum_has_a_direction_less_than_classes_between_and_all_within():
    _, _, spectra, _ = panels(draw_collapse(picture(), POINTS))
    between, within = spectra.lines
    assert len(between.get_ydata()) == 9
    assert len(within.get_ydata()) == 32
    titles = [text.get_text() for text in spectra.get_legend().get_texts()]
    assert titles == ["between classes: 9 = K - 1", "within classes"]


def test_spectrum_that_is_missing_is_said_to_be():
    _, _, spectra, _ = panels(draw_collapse(picture(within=False), POINTS))
    titles = [text.get_text() for text in spectra.get_legend().get_texts()]
    assert titles[1] == "within classes: not measured (D = 32)"


def test_curves_are_those_that_have_something_to_show():
    _, _, _, curves = panels(draw_collapse(picture(), POINTS))
    titles = [text.get_text() for text in curves.get_legend().get_texts()]
    assert titles == ["NC1 quotient of traces", "NC3 head to means"]  # NC4 is zero throughout
    assert curves.lines[0].get_xydata().tolist() == [[1, 10], [2, 0.1]]


def test_legends_are_outside_and_inside_the_figure():
    figure = draw_collapse(picture(), POINTS)
    _, _, spectra, curves = panels(figure)
    assert spectra.get_legend().get_window_extent().y0 >= spectra.get_window_extent().y1
    assert curves.get_legend().get_window_extent().x0 > curves.get_window_extent().x1
    for axes in (spectra, curves):
        assert axes.get_legend().get_window_extent().x1 <= figure.bbox.x1


def test_of_many_classes_a_hundred_are_shown_without_ticks():
    cosines, _, _, _ = panels(draw_collapse(picture(130), POINTS))
    assert cosines.get_xlabel() == "100 of 130 classes"
    assert cosines.images[0].get_array().shape == (100, 100)
    assert not len(cosines.get_xticks())


def test_nothing_measurable_still_draws():
    nothing = collapse_picture(class_sums(torch.zeros(3, 4), torch.arange(3), 3))
    draw_collapse(nothing, {"nc1_quotient": [(1.0, float("nan"))]}).draw_without_rendering()


@pytest.mark.parametrize("mode", ["online", "exact"])
def test_figures_lie_beside_the_metrics_file_at_the_chosen_epochs(tmp_path, mode):
    monitor = NeuralCollapseMonitor(mode=mode, every_n_epochs=2, figures=True)
    fit(tmp_path, monitor, max_epochs=5, logger=CSVLogger(tmp_path, name="run"))
    folder = tmp_path / "run" / "version_0"
    found = sorted(path.name for path in folder.glob("*.png"))
    assert found == [f"neural_collapse-penultimate-epoch={epoch}.png" for epoch in (1, 2, 4, 5)]
    assert (folder / found[0]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        ({"mode": "exact"}, True),
        ({"mode": "online"}, True),
        ({"mode": "online", "second_moment": False}, False),
    ],
)
def test_spectrum_within_classes_is_that_of_the_features(tmp_path, monkeypatch, arguments, known):
    drawn = []
    monkeypatch.setattr(
        "lightning_feat.callbacks.neural_collapse.report.draw_collapse",
        lambda *given: drawn.append(given) or draw_collapse(*given),
    )
    _, module = fit(tmp_path, NeuralCollapseMonitor(figures=True, **arguments), lr=0.0, max_epochs=1)
    ((given, _, _),) = drawn
    if not known:
        assert given.within is None
        return
    x, y = points(64).tensors
    features = module.net.body(x).detach().double()
    means = torch.stack([features[y == c].mean(0) for c in range(3)])
    expected = torch.linalg.svdvals(features - means[y]).square() / 64
    # features in batches of 8 and all at once differ by float32 rounding; dead units have an eigenvalue of zero
    torch.testing.assert_close(given.within, expected, rtol=1e-4, atol=1e-6)
    assert len(given.between) == 2


def test_wide_features_have_no_spectrum_within(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_feat.callbacks.neural_collapse.monitor._WIDEST_SPECTRUM", 7)
    drawn = []
    monkeypatch.setattr(
        "lightning_feat.callbacks.neural_collapse.report.draw_collapse",
        lambda *given: drawn.append(given) or draw_collapse(*given),
    )
    fit(tmp_path, NeuralCollapseMonitor(mode="exact", figures=True), max_epochs=1)
    assert drawn[0][0].within is None
    assert len(drawn[0][0].between) == 2


def test_training_is_bit_for_bit_what_it_is_without_figures_and_table(tmp_path):
    ends = []
    for callbacks in ([], [NeuralCollapseMonitor(mode="exact", figures=True, table=True)]):
        _, module = fit(tmp_path, *callbacks)
        ends.append((weights(module), torch.rand(3)))
    assert equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_epoch_at_which_a_threshold_stops_the_run_has_its_figure(tmp_path):
    stop = CollapseThreshold("nc1_quotient", 1e9, action="stop", from_epoch=2)
    fit(tmp_path, NeuralCollapseMonitor(every_n_epochs=9, figures=True, thresholds=[stop]), max_epochs=5)
    assert sorted(path.name[-11:] for path in tmp_path.glob("*.png")) == ["epoch=1.png", "epoch=2.png"]


class TakesImages(DummyLogger):
    """Has the ``log_image`` of the ``WandbLogger``."""

    def __init__(self, save_dir, error=None):
        super().__init__()
        self.folder, self.error, self.images = str(save_dir), error, []

    save_dir = property(lambda self: self.folder)

    def log_image(self, key, images, step=None, **kwargs):
        if self.error:
            raise self.error
        self.images.append((key, [image.size for image in images], step))


def test_loggers_that_take_images_get_the_figure(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board, stub = TensorBoardLogger(tmp_path, name="board"), TakesImages(tmp_path)
    monitor = NeuralCollapseMonitor(mode="exact", data="val", every_n_epochs=3, figures=True)
    fit(tmp_path, monitor, logger=[board, stub])
    tag = "neural_collapse_val/figure/penultimate"
    assert stub.images == [(tag, [(1300, 1040)], 8), (tag, [(1300, 1040)], 24)]  # 8 batches in each of three epochs
    events = accumulator.EventAccumulator(board.log_dir)
    events.Reload()
    assert [(image.width, image.step) for image in events.Images(tag)] == [(1300, 8), (1300, 24)]


def test_figure_that_cannot_be_shown_is_one_warning_and_no_end(tmp_path):
    stub = TakesImages(tmp_path, error=ConnectionError("offline"))
    with pytest.warns(UserWarning, match="could not draw its figure: ConnectionError: offline") as caught:
        run, _ = fit(tmp_path, NeuralCollapseMonitor(figures=True), logger=stub)
    assert run.current_epoch == 3
    assert len([warning for warning in caught if "offline" in str(warning.message)]) == 1
    assert len([*tmp_path.glob("version_0/*.png")]) == 3  # the files were written before


def test_resumed_run_draws_the_whole_way(tmp_path):
    saved = ModelCheckpoint(tmp_path, save_last=True)
    first = NeuralCollapseMonitor(mode="exact", figures=True)
    fit(tmp_path, first, saved, max_epochs=2, enable_checkpointing=True)
    resumed = NeuralCollapseMonitor(mode="exact", figures=True)
    fit(tmp_path, resumed, ckpt_path=tmp_path / "last.ckpt")
    line = resumed.report.points["train/penultimate"]["nc1_quotient"]
    assert [epoch for epoch, _ in line] == [1, 2, 3]
    assert line[:2] == first.report.points["train/penultimate"]["nc1_quotient"]


def test_missing_matplotlib_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-feat\[recipes\]"'):
        fit(tmp_path, NeuralCollapseMonitor(figures=True))


def test_no_file_unless_asked_for_and_none_of_a_fast_dev_run(tmp_path):
    fit(tmp_path, NeuralCollapseMonitor(mode="exact"))
    fit(tmp_path, NeuralCollapseMonitor(mode="exact", figures=True, table=True), fast_dev_run=True)
    assert not [*tmp_path.iterdir()]
