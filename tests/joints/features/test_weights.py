"""Reading a weight that is computed when it is read changes nothing, and draws nothing."""

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.utils.data import DataLoader

from lightning_feat.callbacks import (
    ClassNormRealignment,
    MixupGeometryMonitor,
    NeuralCollapseMonitor,
    RegressionCollapseMonitor,
)
from lightning_feat.joints.features.weights import read_weight
from tests.helpers import Plain, equal, loader, points, trainer, weights


class DropsEntries(nn.Module):
    def forward(self, weight):
        return torch.nn.functional.dropout(weight, 0.5, self.training)


def dropped(layer):
    parametrize.register_parametrization(layer, "weight", DropsEntries())
    return layer


class Counts(nn.Module):
    """Has another weight at each reading, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("readings", torch.zeros(()))
        self.calls = 0

    def forward(self, weight):
        self.readings += 1
        self.calls += 1
        return weight * (1 + self.readings / 100)


def counted(layer):
    parametrize.register_parametrization(layer, "weight", Counts())
    return layer


def pruned(layer):
    return prune.random_unstructured(prune.l1_unstructured(layer, "weight", 0.3), "weight", 0.2)


CHANGES = [spectral_norm, weight_norm, orthogonal, dropped]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_reading_leaves_the_layer_and_the_random_numbers(change):
    layer = change(nn.Linear(5, 5))
    state, numbers = {k: v.clone() for k, v in layer.state_dict().items()}, torch.get_rng_state()
    found = read_weight(layer)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(part.training for part in layer.modules())
    assert not found.requires_grad
    torch.testing.assert_close(found, layer.eval().weight)
    assert read_weight(nn.Linear(5, 5, bias=False), "bias") is None
    assert read_weight(nn.ReLU()) is None


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("change", [utils.weight_norm, utils.spectral_norm, pruned], ids=lambda change: change.__name__)
def test_a_weight_that_a_hook_computes_is_the_present_one_not_that_of_the_last_run(change):
    layer = change(nn.Linear(5, 5))
    layer(torch.randn(2, 5))
    with torch.no_grad():  # as the step of an optimizer does, or a checkpoint
        for p in layer.parameters():
            p.mul_(1.5).add_(0.1)
    state, left = {k: v.clone() for k, v in layer.state_dict().items()}, layer.weight
    found = read_weight(layer)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
    assert layer.weight is left
    assert not found.requires_grad
    layer.eval()(torch.randn(1, 5))
    assert torch.equal(found, layer.weight)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_realigned_classifier_has_the_lengths_of_its_present_rows(tmp_path):
    module = Plain()
    module.net.fc = utils.weight_norm(module.net.fc)
    with torch.no_grad():
        module.net.fc.weight_g.mul_(torch.tensor([[1.0], [2.0], [5.0]]))  # as from a checkpoint
    run = trainer(tmp_path, callbacks=[ClassNormRealignment()])
    (logits,) = run.predict(module, DataLoader(points(8).tensors[0], 8))
    plain = module.eval()(points(8).tensors[0]) - module.net.fc.bias
    lengths = module.net.fc.weight.norm(dim=1)
    torch.testing.assert_close(((logits - module.net.fc.bias) / plain).mean(0), lengths.mean() / lengths)


class Regression(Plain):
    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[0][:, :3]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass


MONITORS = [
    *(NeuralCollapseMonitor, lambda: NeuralCollapseMonitor(mode="exact"), lambda: MixupGeometryMonitor(num_pairs=8)),
    lambda: ClassNormRealignment(power=0.0, stages=["validate"]),
    lambda: RegressionCollapseMonitor(target_key=lambda batch: batch[0][:, :3]),
]


@pytest.mark.parametrize("change", [spectral_norm, dropped, counted], ids=lambda change: change.__name__)
@pytest.mark.parametrize("monitor", MONITORS)
def test_a_monitor_changes_no_bit_of_the_training(tmp_path, monitor, change):
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        module = Regression() if monitor is MONITORS[-1] else Plain()
        module.net.fc = change(module.net.fc)
        callbacks = [monitor()] if watched else []
        trainer(tmp_path, callbacks=callbacks, max_epochs=2).fit(module, loader(), loader())
        ends.append([*weights(module), *(b.clone() for b in module.buffers()), torch.get_rng_state()])
    assert equal(*ends)
