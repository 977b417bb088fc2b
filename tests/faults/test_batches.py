"""Odd labels and batches: for each callback the right value, or nan, or a clear error."""

import math
import re

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks import (
    DataPlan,
    DotRegressionRegularizer,
    FeatureRegularizer,
    GrassmannHead,
    GrassmannMonitor,
    LinearProbe,
    MixupGeometryMonitor,
    NeuralCollapseMonitor,
    NeuralCollapseRegularizer,
    RegressionCollapseMonitor,
    SimplexETFHead,
    SimplicityBiasUpsampler,
)
from lightning_feat.callbacks.feature_shift.monitor import FeatureShiftMonitor
from lightning_feat.callbacks.feature_shift.regularizer import FeatureShiftRegularizer
from tests.helpers import NUM_CLASSES, WIDTH, Net, points, trainer

SIZE, BATCH = 32, 8
WHOLE, FINITE, RUNS = "values of whole batches", "finite values", "no error"  # nan where nothing is defined


class Learner(pl.LightningModule):
    """Trains on what it can use of a batch, whatever that is. With lr=0 nothing moves."""

    def __init__(self, width=WIDTH, regression=False, lr=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.regression, self.lr = Net(), regression, lr
        self.net.body[0], self.net.fc = nn.Linear(4, width), nn.Linear(width, NUM_CLASSES)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        logits, y = self(batch[0]), batch[1]
        if self.regression:
            return (logits - y).square().sum() / max(len(y), 1)
        usable = (y >= 0) & (y < NUM_CLASSES)
        return cross_entropy(logits[usable], y[usable]) if usable.any() else 0.0 * logits.sum()

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def without_marked(rows):
    """Collates what is usable, as a collate function does that drops files it cannot read."""
    kept = [row for row in rows if row[0][0] < 100]
    columns = zip(*kept, strict=True) if kept else [[entry[:0]] for entry in (rows[0][0][None], rows[0][1][None])]
    return [torch.stack(list(column)) if kept else column[0] for column in columns]


def data(case, regression=False):
    x, y = points(SIZE).tensors
    x, y = x.clone(), y.clone()
    if case == "empty batch":
        x, y = torch.cat([x, torch.full((1, 4), 200.0)]), torch.cat([y, y[:1]])
    elif case == "one class":
        y[:] = 1
    elif case == "a class never appears":
        y[y == 2] = 1
    elif case == "label too large":
        y[3] = 7
    elif case == "label below zero":
        y[3] = -1
    if regression:
        y = torch.randn(SIZE + 1, NUM_CLASSES, generator=torch.Generator().manual_seed(1))[: len(x)]
        y = y[:1].expand_as(y) if case == "one class" else y
    return DataLoader(TensorDataset(x, y), 1 if case == "batches of one" else BATCH, collate_fn=without_marked)


def spread(features, targets):
    return (features - features.mean(0)).square().sum(1).mean()


CALLBACKS = {
    "collapse, online": lambda: [NeuralCollapseMonitor(measures=["*"])],
    "collapse, exact": lambda: [NeuralCollapseMonitor(mode="exact", measures=["*"])],
    "subspaces, online": lambda: [GrassmannHead(2), GrassmannMonitor()],
    "subspaces, exact": lambda: [GrassmannHead(2), GrassmannMonitor(mode="exact")],
    "mixup": lambda: [MixupGeometryMonitor(num_pairs=8)],
    "probe": lambda: [LinearProbe(every_n_epochs=1, penalties=[0.1])],
    "regression": lambda: [RegressionCollapseMonitor()],
    "dot-regression": lambda: [SimplexETFHead(), DotRegressionRegularizer()],
    "dot-regression, balanced": lambda: [SimplexETFHead(), DotRegressionRegularizer(class_counts="batch")],
    "user's term": lambda: [FeatureRegularizer(spread, "spread")],
    "collapse terms": lambda: [NeuralCollapseRegularizer()],
    "shift": lambda: [FeatureShiftMonitor(["net.body"], every_n_batches=1)],
    "shift term": lambda: [FeatureShiftRegularizer(["net.body"])],
    "plan": lambda: [DataPlan(lambda epoch: None)],
    "slow examples": lambda: [SimplicityBiasUpsampler(separating_epoch=1)],
    "slow losses": lambda: [SimplicityBiasUpsampler(separating_epoch=1, show="weights", restart=False)],
    "knee": lambda: [SimplicityBiasUpsampler(separating_epoch="knee")],
}
LARGE, NEGATIVE = "a target is 7 but num_classes=3", "a target is -1, targets are class indices from 0 to"
NO_ROOM, NO_FEATURES = "0 features have no room for a simplex of 3", "num_features=0: must be at least 1"
TO_SEVEN, FROM_MINUS = "targets go from .* to 7", "targets go from -1 to"
LEFT_OUT = "32 rows of logits came out of a pass in eval mode over 33 training examples, .* leave none out"
MORE_OUTPUTS = "turns 0 features into 3 outputs"
SUBSPACE = "subspace_dim=2 must lie between 1 and the width of the features, 0"
# By case in the order of CALLBACKS. A label can be out of range for what reads labels; a probe takes any.
EXPECTED = {
    "empty batch": [*[WHOLE] * 7, *[FINITE] * 6, RUNS, LEFT_OUT, LEFT_OUT, RUNS],
    "batches of one": [WHOLE, WHOLE, RUNS, *[WHOLE] * 4, *[FINITE] * 6, RUNS, FINITE, FINITE, RUNS],
    "one class": [*[RUNS] * 7, *[FINITE] * 6, RUNS, FINITE, FINITE, RUNS],
    "a class never appears": [*[FINITE] * 7, *[FINITE] * 6, RUNS, FINITE, FINITE, RUNS],
    "label too large": [*[LARGE] * 5, FINITE, FINITE, LARGE, LARGE, FINITE, LARGE, FINITE, FINITE, RUNS, TO_SEVEN,
                        TO_SEVEN, TO_SEVEN],
    "label below zero": [*[NEGATIVE] * 5, FINITE, FINITE, NEGATIVE, NEGATIVE, FINITE, NEGATIVE, FINITE, FINITE, RUNS,
                         FROM_MINUS, FROM_MINUS, FROM_MINUS],
    "zero width": [NO_FEATURES, NO_FEATURES, SUBSPACE, SUBSPACE, RUNS, RUNS, MORE_OUTPUTS, NO_ROOM, NO_ROOM, FINITE,
                   FINITE, RUNS, FINITE, RUNS, FINITE, FINITE, RUNS],
}  # fmt: skip
LONG = ("batches of one", "label below zero", "one class")  # in the whole suite alone
CELLS = [
    pytest.param(case, name, expected, id=f"{case}-{name}", marks=[pytest.mark.slow] * (case in LONG))
    for case, column in EXPECTED.items()
    for name, expected in zip(CALLBACKS, column, strict=True)
]


def logged(folder, case, name, epochs=2):
    regression = name == "regression"
    moves = not isinstance(CALLBACKS[name]()[-1], (NeuralCollapseMonitor, GrassmannMonitor, LinearProbe))
    module = Learner(0 if case == "zero width" else WIDTH, regression, lr=0.01 if moves else 0.0)
    if name in ("mixup", "regression"):
        module.lr = 0.0
    run = trainer(folder, callbacks=CALLBACKS[name](), max_epochs=epochs)
    run.fit(module, data(case, regression), data(case, regression))
    assert run.current_epoch == epochs
    return {key: float(value) for key, value in run.callback_metrics.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    found = {}

    def of(name):
        if name not in found:
            found[name] = logged(tmp_path_factory.mktemp("whole"), "whole batches", name)
        return found[name]

    return of


@pytest.mark.parametrize(("case", "name", "expected"), CELLS)
def test_each_callback_gives_the_value_or_nan_or_says_what_is_wrong(tmp_path, whole, case, name, expected):
    if expected not in (WHOLE, FINITE, RUNS):
        with pytest.raises(ValueError, match=re.compile(expected, re.DOTALL)):
            logged(tmp_path, case, name)
        return
    values = logged(tmp_path, case, name)
    if expected == FINITE:
        assert values
        assert all(map(math.isfinite, values.values())), values
    elif expected == WHOLE:  # batches are cut otherwise: rounding in float32 before the sums, which are float64
        assert values == pytest.approx(whole(name), rel=1e-4, abs=1e-5, nan_ok=True)
        assert any(map(math.isfinite, values.values()))


@pytest.mark.parametrize("name", ["collapse, online", "collapse, exact"])
def test_one_class_alone_has_nothing_between_classes(tmp_path, name):
    values = logged(tmp_path, "one class", name)
    for measure in ("nc1_quotient", "cdnv", "nc2_equinorm"):
        assert math.isnan(values[f"neural_collapse/{measure}/penultimate"]), measure


def test_a_class_that_never_appears_changes_no_measure_of_the_others(tmp_path):
    """The same with two classes and a classifier of two, by what does not look at the classifier."""
    three = logged(tmp_path / "3", "a class never appears", "collapse, online")
    monitor = NeuralCollapseMonitor(measures=["*"], num_classes=2)
    module = Learner()
    run = trainer(tmp_path / "2", callbacks=monitor, max_epochs=2)
    module.net.fc = nn.Linear(WIDTH, 2)
    run.fit(module, data("a class never appears"))
    for measure in ("nc1_quotient", "cdnv", "nc2_equinorm", "vci"):
        key = f"neural_collapse/{measure}/penultimate"
        assert three[key] == pytest.approx(float(run.callback_metrics[key]), rel=1e-5)
