"""Every callback that looks for the classifier learns in the first training step whether it is the one."""

import inspect
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F

from lightning_feat import callbacks
from lightning_feat.callbacks import (
    ClassNormRealignment,
    DistributionalSimplicityMonitor,
    DotRegressionRegularizer,
    FeatureRegularizer,
    FeatureRelianceMonitor,
    FeatureReport,
    FeatureShiftMonitor,
    FeatureShiftRegularizer,
    FewShotMonitor,
    ForgettingMonitor,
    GrassmannHead,
    GrassmannMonitor,
    LinearProbe,
    LinearSVMProbe,
    MixupGeometryMonitor,
    NearestMeanProbe,
    NeighbourProbe,
    NeuralCollapseMonitor,
    NeuralCollapseRegularizer,
    PromptLearner,
    RegressionCollapseMonitor,
    SharpnessMonitor,
    SimplexETFHead,
    SimplicityBiasUpsampler,
    SpectrumMonitor,
    UniformityRegularizer,
)
from lightning_feat.layers import GrassmannLinear, SimplexETF
from tests.helpers import Plain, loader, trainer


class Above(Plain):
    """A layer of its own above the network, which is not called as classifiers are."""

    def __init__(self):
        super().__init__()
        self.top = nn.Sequential(nn.BatchNorm1d(3))

    def forward(self, x):
        return self.top(self.net(x))


def fit(tmp_path, module, *callbacks):
    trainer(tmp_path, callbacks=list(callbacks)).fit(module, loader())


READERS = [
    lambda: LinearProbe(),
    lambda: LinearSVMProbe(penalties=[1.0]),
    lambda: NearestMeanProbe(),
    lambda: NeighbourProbe(),
    lambda: GrassmannMonitor(),
    lambda: MixupGeometryMonitor(data="train"),
    lambda: RegressionCollapseMonitor(target_key=lambda batch: torch.stack([batch[1].float()] * 3, 1)),
    lambda: FeatureShiftMonitor(),
    lambda: NeuralCollapseMonitor(mode="exact"),
    lambda: SpectrumMonitor(data="train"),
    lambda: FewShotMonitor(shots=[1], episodes=2),
    lambda: DistributionalSimplicityMonitor(),
    lambda: FeatureRelianceMonitor(blocks={"first": ":2"}),
    lambda: ForgettingMonitor(),
    lambda: SharpnessMonitor(num_examples=8, max_products=2),
    lambda: FeatureReport(),
]
ACTORS = [
    lambda: NeuralCollapseRegularizer(),
    lambda: FeatureRegularizer(lambda h: h.square().mean(), "small"),
    lambda: UniformityRegularizer(),
    lambda: FeatureShiftRegularizer(),
    lambda: SimplicityBiasUpsampler(separating_epoch=1),
    lambda: DotRegressionRegularizer(),
]


def found_wrongly(callback):
    module = Above()
    if isinstance(callback, GrassmannMonitor):
        module.net.fc = GrassmannLinear(8, 3, 2)
    if isinstance(callback, DotRegressionRegularizer):
        module.net.fc = SimplexETF(8, 3)
    return module


@pytest.mark.parametrize("make", READERS)
def test_every_monitor_of_the_classifier_warns_where_another_layer_makes_the_logits(tmp_path, make):
    callback = make()
    module = found_wrongly(callback)
    module.validation_step = lambda batch, batch_idx: None
    with pytest.warns(
        UserWarning, match=rf"{type(callback).__name__}.*: net.fc is not the layer that makes the logits"
    ):
        trainer(tmp_path, callbacks=[callback]).fit(module, loader(), loader())
    assert "_feat_wraps" not in module.__dict__


@pytest.mark.parametrize("make", ACTORS)
def test_every_term_on_the_classifier_is_refused_there(tmp_path, make):
    callback = make()
    module = found_wrongly(callback)
    with pytest.raises(ValueError, match=r"net.fc is not the layer that makes the logits: top.0 ran after it"):
        fit(tmp_path, module, callback)
    assert "_feat_wraps" not in module.__dict__


@pytest.mark.parametrize("make", [*READERS, *ACTORS])
def test_none_of_them_says_anything_where_the_layer_is_right(tmp_path, make):
    callback = make()
    module = Plain()
    module.net.fc = found_wrongly(callback).net.fc
    module.validation_step = lambda batch, batch_idx: None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the logits")
        trainer(tmp_path, callbacks=[callback], max_epochs=2).fit(module, loader(), loader())


def test_what_a_term_computes_is_not_the_loss_of_the_module(tmp_path):
    def contrast(h):
        return F.cross_entropy(h @ h.T, torch.arange(len(h)))

    class ByHand(Plain):
        def training_step(self, batch, batch_idx):
            return -self(batch[0]).log_softmax(-1).gather(1, batch[1][:, None]).mean()

    fit(tmp_path, ByHand(), FeatureRegularizer(contrast, "contrast", 0.1))


def test_every_callback_that_may_look_for_the_classifier_is_in_these_lists():
    here = {type(make()) for make in [*READERS, *ACTORS]} | {SimplexETFHead, GrassmannHead}
    here.add(ClassNormRealignment)  # which is not there in training
    asking = {
        cls
        for cls in (getattr(callbacks, name) for name in callbacks.__all__)
        if isinstance(cls, type)
        and issubclass(cls, Callback)
        and any(
            parameter.default is None
            for name, parameter in inspect.signature(cls).parameters.items()
            if name in ("layer", "layers", "classifier", "head") and cls is not PromptLearner  # layers by their roles
        )
    }
    assert asking == here


NAMED = [
    lambda **named: NeuralCollapseMonitor(**named),
    lambda **named: NeuralCollapseMonitor(mode="exact", **named),
    lambda **named: LinearProbe(**named),
    lambda **named: FewShotMonitor(shots=[1], episodes=2, **named),
    lambda **named: FeatureRegularizer(lambda h: h.square().mean(), "small", **named),
    lambda **named: NeuralCollapseRegularizer(num_classes=3, num_features=3, **named),
]


@pytest.mark.parametrize("layer", ["net.fc", "net"])
@pytest.mark.parametrize("make", NAMED)
def test_a_named_layer_that_makes_the_logits_is_told_where_nothing_is_said_of_read(tmp_path, make, layer):
    with pytest.warns(UserWarning, match=f"the output of {layer} is read, as nothing else is said"):
        trainer(tmp_path, callbacks=[make(layer=layer)]).fit(Plain(), loader(), loader())


@pytest.mark.parametrize("named", [{"layer": "net.fc", "read": "output"}, {"layer": "net.body"}])
@pytest.mark.parametrize("make", [NAMED[0], NAMED[2]])
def test_another_layer_and_logits_that_are_meant_are_not(tmp_path, make, named):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the logits")
        trainer(tmp_path, callbacks=[make(**named)]).fit(Plain(), loader(), loader())
