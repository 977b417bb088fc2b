"""What a message tells to do can be done with the callback that says it."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.baselines import SmallClip
from lightning_feat.callbacks import (
    DotRegressionRegularizer,
    FeatureRegularizer,
    FeatureShiftMonitor,
    FeatureShiftRegularizer,
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
from tests.helpers import Plain, loader, trainer


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.two(self.one(x).relu())


class Unnamed(Plain):
    """Two layers that could be the classifier, and no name that says which."""

    def __init__(self):
        super().__init__()
        self.net = Two()


class Maps(Plain):
    """Its classifier is a convolution: what it gets and gives has positions."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 8, 1), nn.ReLU())
        self.classifier = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.classifier(self.net(x)).mean((2, 3))


def message(callback, module, data=None, **kwargs):
    run = trainer(kwargs.pop("folder"), callbacks=[callback], max_epochs=1, **kwargs)
    with pytest.raises((ValueError, RuntimeError)) as raised:
        run.fit(module, data or loader(16), loader(16))
    return str(raised.value)


ASKS = {  # the argument that the question must name, and the callback with the answer
    "collapse": (NeuralCollapseMonitor, "argument `classifier`)", {"classifier": "net.two"}),
    "probe": (LinearProbe, "argument `layer` with `read='input'`)", {"layer": "net.two", "read": "input"}),
    "regularizer": (
        lambda **given: FeatureRegularizer(lambda h: h.square().mean(), name="l2", **given),
        "argument `layer` with `read='input'`)",
        {"layer": "net.two", "read": "input"},
    ),
    "shift": (FeatureShiftMonitor, "argument `layers` with `read='input'`)", {"layers": "net.two", "read": "input"}),
    "shift held": (
        FeatureShiftRegularizer,
        "argument `layers` with `read='input'`)",
        {"layers": "net.two", "read": "input"},
    ),
    "regression": (RegressionCollapseMonitor, "argument `head`)", None),
    "mixup": (MixupGeometryMonitor, "argument `layer`)", {"layer": "net.two"}),
    "simplex": (SimplexETFHead, "argument `layer`)", {"layer": "net.two"}),
    "upsampler": (SimplicityBiasUpsampler, "argument `layer`)", None),
    "angles": (GrassmannMonitor, "argument `layer`)", None),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ASKS)
def test_the_question_for_the_classifier_names_the_argument_that_answers_it(tmp_path, name):
    make, asked, answer = ASKS[name]
    assert asked in message(make(), Unnamed(), folder=tmp_path)
    if answer is not None:
        run = trainer(tmp_path, callbacks=[make(**answer)], max_epochs=1)
        run.fit(Unnamed(), loader(16), loader(16))


def test_the_regularizer_of_collapse_needs_no_numbers_where_the_input_of_a_layer_is_named(tmp_path):
    said = message(NeuralCollapseRegularizer(), Unnamed(), folder=tmp_path)
    assert said.endswith("argument `layer` with `read='input'`).")
    answer = NeuralCollapseRegularizer(layer="net.two", read="input")
    trainer(tmp_path, callbacks=[answer], max_epochs=1).fit(Unnamed(), loader(16), loader(16))


@pytest.mark.parametrize("make", [RegressionCollapseMonitor, MixupGeometryMonitor, DotRegressionRegularizer])
def test_no_callback_without_a_pooling_tells_to_set_it(tmp_path, make):
    with_etf = [SimplexETFHead()] if make is DotRegressionRegularizer else []
    run = trainer(tmp_path, callbacks=[*with_etf, make()], max_epochs=1)
    with pytest.raises((ValueError, RuntimeError)) as raised:
        run.fit(Maps(), loader(16), loader(16))
    assert "pooling" not in str(raised.value)


@pytest.mark.parametrize("head", [SimplexETFHead, lambda: GrassmannHead(2)])
def test_a_head_in_the_place_of_a_convolution_asks_for_a_pooling_too(tmp_path, head):
    """Else the classes of samples would be given to positions of others."""
    run = trainer(tmp_path, callbacks=[head(), NeuralCollapseMonitor()], max_epochs=1)
    with pytest.raises(ValueError, match="set pooling to 'mean', 'max'"):
        run.fit(Maps(), loader(16), loader(16))


def test_one_that_has_a_pooling_tells_which(tmp_path):
    callback = FeatureRegularizer(lambda h: h.square().mean(), name="l2")
    assert "set pooling to 'mean', 'max'" in message(callback, Maps(), folder=tmp_path)


@pytest.mark.parametrize(
    ("targets", "said", "unsaid"),
    [
        (torch.eye(3)[torch.arange(16) % 3].long(), "one-hot labels", "pooling"),
        (torch.ones(16, 3).long(), "several classes at once (multi-label)", "pooling"),
        (torch.ones(16, 3), "several labels at once", "pooling"),
    ],
)
def test_labels_of_another_kind_are_called_what_they_are(tmp_path, targets, said, unsaid):
    class Soft(Plain):
        def training_step(self, batch, batch_idx):
            return cross_entropy(self(batch[0]), batch[1].float())

    data = DataLoader(TensorDataset(torch.randn(16, 4), targets), batch_size=8)
    told = message(NeuralCollapseMonitor(), Soft(), data, folder=tmp_path, limit_val_batches=0)
    assert said in told
    assert unsaid not in told


def test_a_clip_is_asked_for_blocks_of_both_towers(tmp_path):
    class Clip(Plain):
        def __init__(self):
            super().__init__()
            self.net = SmallClip(20, 8, 8, 4, 8, 8, 2, 2, 8, 2, 2)

    said = message(FeatureShiftMonitor(), Clip(), folder=tmp_path)
    assert "text_layers=[" in said
    assert "image_layers=[" in said
