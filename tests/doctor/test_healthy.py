"""A run in which nothing is wrong has no finding: every kind of callback, in the ways that people train."""

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_feat.callbacks import (
    CurvePlotter,
    DataPlan,
    DotRegressionRegularizer,
    FeatureRegularizer,
    GrassmannHead,
    GrassmannMonitor,
    LinearProbe,
    MetricHistory,
    MixupGeometryMonitor,
    NeuralCollapseMonitor,
    NeuralCollapseRegularizer,
    Panel,
    SimplexETFHead,
    SimplicityBiasUpsampler,
    SummaryTable,
)
from lightning_feat.callbacks.feature_shift.monitor import FeatureShiftMonitor
from lightning_feat.callbacks.feature_shift.regularizer import FeatureShiftRegularizer
from lightning_feat.doctor import doctor
from lightning_feat.joints.loss.terms import WeightSchedule
from tests.helpers import DictBatches, Example, Plain, loader, points, trainer


def mean_square(features):
    return features.square().mean()


PILLARS = {
    "subspaces": lambda: [GrassmannHead(2), GrassmannMonitor(), NeuralCollapseMonitor()],
    "subspaces, exact": lambda: [GrassmannHead(2), GrassmannMonitor(mode="exact", data="val")],
    "collapse": lambda: [NeuralCollapseMonitor(), NeuralCollapseMonitor(mode="exact", data="both", figures=True)],
    "collapse, induced": lambda: [NeuralCollapseRegularizer(), SimplexETFHead(), DotRegressionRegularizer()],
    "collapse, later": lambda: [NeuralCollapseRegularizer(WeightSchedule(0.1, 2.0, start_epoch=5))],
    "transfer": lambda: [LinearProbe(), MixupGeometryMonitor()],
    "upsampling": lambda: [SimplicityBiasUpsampler(1)],
    "upsampling, knee": lambda: [SimplicityBiasUpsampler("knee", restart=False), NeuralCollapseMonitor()],
    "upsampling, weights": lambda: [SimplicityBiasUpsampler(1, show="weights")],
    "plan": lambda: [DataPlan([2] * 8 + [1] * 24)],
    "shift": lambda: [FeatureShiftMonitor(), FeatureShiftRegularizer()],
    "shift, of weights": lambda: [FeatureShiftMonitor(data="val"), FeatureShiftRegularizer(form="l2_sp")],
    "any loss": lambda: [FeatureRegularizer(mean_square, name="size", weight=0.1)],
    "curves": lambda: [
        MetricHistory(),
        CurvePlotter([Panel({"loss": "val/loss"}, label="loss")]),
        SummaryTable({"loss": "val/loss"}),
        LearningRateMonitor(),
    ],
}


@pytest.fixture
def examine(tmp_path):
    def run(callbacks, module=None, train=None, **kwargs):
        given = trainer(tmp_path, callbacks=callbacks, **{"max_epochs": 3, "logger": True, **kwargs})
        return doctor(given, module or Plain(), loader() if train is None else train, loader(), cost=False)

    return run


@pytest.mark.parametrize("pillar", PILLARS)
def test_every_pillar(examine, pillar):
    assert examine(PILLARS[pillar]()) == []


def everything():
    return [
        GrassmannHead(2),
        NeuralCollapseMonitor(),
        NeuralCollapseRegularizer(),
        FeatureRegularizer(mean_square, name="size", layer="net.body", weight=0.1),
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.5},
        {"check_val_every_n_epoch": 5},
        {"limit_val_batches": 0},
        {"limit_train_batches": 2},
        {"max_epochs": -1, "max_steps": 7},
        {"min_epochs": 2},
        {"fast_dev_run": True},
        {"overfit_batches": 2},
    ],
    ids=str,
)
def test_everything_at_once(examine, options):
    train = loader(shuffle="overfit_batches" not in options)
    assert examine(everything(), train=train, **options) == []


class Dicts(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["image"], batch["label"]), batch_idx)


class Examples(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch.x, batch.target), batch_idx)


def as_examples(rows):
    x, y = zip(*rows, strict=True)
    return Example(torch.stack(x), torch.stack(y))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(points())


@pytest.mark.parametrize(
    ("module", "train"),
    [
        (Plain(returns="dict"), loader()),
        (Plain(returns="none"), loader()),
        (Plain(manual=True), loader()),
        (Dicts(), DataLoader(DictBatches(points()), batch_size=8)),
        (Examples(), loader(collate_fn=as_examples)),
        (Plain(), DataLoader(Stream(), batch_size=8)),
        (Plain(), loader(n=16)),  # an epoch is shorter than the trial
    ],
    ids=["dict", "none", "manual", "dict batches", "dataclass", "stream", "two batches"],
)
def test_forms_of_modules_and_data(examine, module, train):
    assert examine(everything(), module, train) == []


class LateLayers(Plain):
    def __init__(self):
        super().__init__()
        self.late, self.net = self.net, None

    def configure_model(self):
        self.net = self.late


class Checkpointed(Plain):
    reentrant = False

    def forward(self, x):
        return self.net.fc(checkpoint(self.net.body, x, use_reentrant=self.reentrant))


class Reentrant(Checkpointed):
    reentrant = True

    def forward(self, x):
        return super().forward(x.requires_grad_())


class CompiledPart(Plain):
    def __init__(self):
        super().__init__()
        self.net.body = torch.compile(self.net.body, backend="eager")


class Sam(Plain):
    """Its optimizer runs the step twice."""

    def configure_optimizers(self):
        class Twice(torch.optim.SGD):
            def step(self, closure=None):
                closure()
                return super().step(closure)

        return Twice(self.parameters(), lr=0.1)


class Adaptive(Plain):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = OneCycleLR(optimizer, 0.1, total_steps=self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class MadeBefore(Plain):
    def __init__(self):
        super().__init__()
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self):
        return self.optimizer


class FrozenTeacher(Plain):
    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.teacher(batch[0])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


@pytest.mark.parametrize(
    "kind", [LateLayers, Checkpointed, Reentrant, CompiledPart, Sam, Adaptive, MadeBefore, FrozenTeacher]
)
def test_ways_to_write_a_module(examine, kind):
    callbacks = everything()
    for callback in callbacks:  # with a name, since some have more than one Linear
        if isinstance(callback, GrassmannHead):
            callback.layer = "net.fc"
    if kind is LateLayers:
        callbacks = [c for c in callbacks if not isinstance(c, GrassmannHead)]
    if kind in (Reentrant, Checkpointed):
        callbacks = callbacks[:3]
    assert examine(callbacks, kind()) == []
