"""What a few batches do not show by themselves: faults of later epochs, of eval mode, and of the order of things."""

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping, LearningRateFinder, ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_feat.callbacks import (
    DataPlan,
    FeatureRegularizer,
    FeatureShiftMonitor,
    FeatureShiftRegularizer,
    LinearProbe,
    NeuralCollapseMonitor,
    NeuralCollapseRegularizer,
)
from lightning_feat.doctor import doctor
from tests.helpers import EMAWeightAveraging, Plain, loader, trainer

NC1 = "neural_collapse/nc1_quotient/penultimate"


@pytest.fixture
def examine(tmp_path):
    def run(*callbacks, module=None, **kwargs):
        given = trainer(tmp_path, callbacks=[*callbacks], **{"max_epochs": 12, **kwargs})
        findings = doctor(given, module or Plain(), loader(), loader(), cost=False)
        return [(finding.severity, finding.check) for finding in findings]

    return run


@pytest.mark.parametrize(
    ("callback", "waits", "expected"),
    [
        (LinearProbe(), EarlyStopping("linear_probe/accuracy/penultimate"), "error"),
        (NeuralCollapseMonitor(mode="exact", every_n_epochs=3), EarlyStopping(NC1), "warning"),
        (NeuralCollapseMonitor(mode="exact", every_n_epochs="log"), ModelCheckpoint(monitor=NC1), "warning"),
        (NeuralCollapseMonitor(mode="exact", every_n_epochs=3), ModelCheckpoint(monitor=NC1, every_n_epochs=6), None),
        (NeuralCollapseMonitor(mode="exact"), EarlyStopping(NC1), None),
        (NeuralCollapseMonitor(every_n_epochs=3), EarlyStopping(NC1), None),  # of figures; it measures in all
        (LinearProbe(every_n_epochs=1), EarlyStopping("linear_probe/accuracy/penultimate"), None),
        (NeuralCollapseMonitor(mode="exact", every_n_epochs=3), EarlyStopping("val/loss"), None),
    ],
)
def test_a_value_that_does_not_come_in_every_epoch(examine, callback, waits, expected):
    found = examine(callback, waits, enable_checkpointing=isinstance(waits, ModelCheckpoint))
    assert found == ([] if expected is None else [(expected, "metric-not-in-every-epoch")])


class Backboned(Plain):
    def __init__(self):
        super().__init__()
        self.backbone, self.classifier = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 3)
        del self.net

    def forward(self, x):
        return self.classifier(self.backbone(x))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_a_term_on_a_backbone_that_is_let_go_later_is_no_error(examine):
    def term():
        return FeatureRegularizer(lambda h: h.square().mean(), name="l2")

    let_go = BackboneFinetuning(unfreeze_backbone_at_epoch=2)
    assert examine(let_go, term(), module=Backboned()) == [("note", "frozen-for-now")]
    frozen = Backboned()
    frozen.backbone.requires_grad_(False)
    assert examine(term(), module=frozen) == [("error", "zero-gradient")]


class LetsGo(Backboned):
    """Frozen at first; what its own hook does in the second epoch is not known beforehand."""

    def __init__(self):
        super().__init__()
        self.backbone.requires_grad_(False)

    def on_train_epoch_start(self):
        self.backbone.requires_grad_(self.current_epoch > 0)


def test_a_module_that_may_let_its_own_layers_go_gets_a_warning(examine):
    term = FeatureRegularizer(lambda h: h.square().mean(), name="l2")
    assert examine(term, module=LetsGo()) == [("warning", "zero-gradient")]


@pytest.mark.parametrize(
    ("callbacks", "checkpoints", "expected"),
    [
        ([LearningRateFinder()], True, [("warning", "search-when-resumed")]),
        ([LearningRateFinder()], False, []),
        ([], True, []),
    ],
)
def test_a_search_that_would_begin_a_resumed_run_anew(examine, callbacks, checkpoints, expected):
    assert examine(LinearProbe(penalties=[0.1]), *callbacks, enable_checkpointing=checkpoints) == expected


class Dropped(Plain):
    def __init__(self, rate):
        super().__init__()
        self.net.body = nn.Sequential(nn.Linear(4, 8), nn.Dropout(rate), nn.ReLU())


@pytest.mark.parametrize("make", [FeatureShiftMonitor, FeatureShiftRegularizer])
def test_a_shift_of_a_network_that_has_not_moved(examine, make):
    assert examine(make("net.body"), module=Dropped(0.5)) == [("warning", "noise-floor")]
    assert examine(make("net.body"), module=Dropped(0.0)) == []


def test_a_shift_in_validation_has_no_noise(examine):
    assert examine(FeatureShiftMonitor("net.body", data="val"), module=Dropped(0.5)) == []


def test_a_layer_that_runs_in_training_mode_only(examine):
    class Auxiliary(Plain):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(4, 3)

        def forward(self, x):
            return self.net(x) + (self.extra(x) if self.training else 0)

    found = examine(NeuralCollapseMonitor(layer="extra", mode="exact"), module=Auxiliary())
    assert [severity for severity, _ in found] == ["error"]
    assert examine(NeuralCollapseMonitor(layer="extra", num_classes=3), module=Auxiliary()) == []


def test_a_pass_that_has_no_way_to_run_the_network(examine):
    class TrainsOnly(Plain):
        def forward(self, *inputs):
            raise NotImplementedError("see training_step")

        def training_step(self, batch, batch_idx):
            if not self.training:
                raise RuntimeError("for training alone")
            return cross_entropy(self.net(batch[0]), batch[1])

        validation_step = None

    found = examine(NeuralCollapseMonitor(mode="exact"), module=TrainsOnly(), limit_val_batches=0)
    assert [severity for severity, _ in found] == ["error"]


def test_a_plan_that_overfit_batches_throws_away(examine):
    assert [severity for severity, _ in examine(DataPlan([1] * 32), overfit_batches=2)] == ["error"]


@pytest.mark.skipif(EMAWeightAveraging is None, reason="Lightning 2.5 has none")
@pytest.mark.parametrize("in_order", [True, False])
def test_averaging_before_what_brings_parameters(examine, in_order):
    callbacks = [NeuralCollapseRegularizer(), EMAWeightAveraging()]
    found = examine(*(callbacks if in_order else reversed(callbacks)))
    assert found == ([] if in_order else [("error", "averaging-before-head")])
