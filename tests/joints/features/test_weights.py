"""Reading a weight that is computed when it is read changes nothing, and draws nothing."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from lightning_feat.callbacks import MixupGeometryMonitor, NeuralCollapseMonitor, RegressionCollapseMonitor
from lightning_feat.joints.features.weights import read_weight
from tests.helpers import Plain, equal, loader, trainer, weights


class DropsEntries(nn.Module):
    def forward(self, weight):
        return torch.nn.functional.dropout(weight, 0.5, self.training)


def dropped(layer):
    parametrize.register_parametrization(layer, "weight", DropsEntries())
    return layer


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


class Regression(Plain):
    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[0][:, :3]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass


MONITORS = [
    *(NeuralCollapseMonitor, lambda: NeuralCollapseMonitor(mode="exact"), lambda: MixupGeometryMonitor(num_pairs=8)),
    lambda: RegressionCollapseMonitor(target_key=lambda batch: batch[0][:, :3]),
]


@pytest.mark.parametrize("change", [spectral_norm, dropped], ids=lambda change: change.__name__)
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
