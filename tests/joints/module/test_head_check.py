"""What the first training step shows of a head: whether it makes the logits, alone, and of classes."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks import (
    DotRegressionRegularizer,
    GrassmannHead,
    NeuralCollapseMonitor,
    SimplexETFHead,
)
from lightning_feat.functional.neural_collapse import dot_regression
from lightning_feat.joints.features.heads import find_classifier
from lightning_feat.joints.features.last_layers import LastLayers
from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.layers import SimplexETF
from tests.helpers import Plain, loader, trainer, weights


class Two(Plain):
    """Averages two heads, as distilled networks do."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(8, 3)

    def forward(self, x):
        h = self.net.body(x)
        return (self.net.fc(h) + self.other(h)) / 2


class Above(Plain):
    """Uses a network as an embedding, and a layer of its own above it."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Parameter(torch.randn(3, 3))
        self.top = nn.Sequential(nn.BatchNorm1d(3))

    def forward(self, x):
        return self.top(self.net(x) @ self.projection)


class Loss(Plain):
    """Another loss than cross-entropy; ``of`` takes logits and class indices."""

    def __init__(self, of, outputs=3):
        super().__init__()
        self.of = of
        self.net.fc = nn.Linear(8, outputs)

    def training_step(self, batch, batch_idx):
        return self.of(self(batch[0]), batch[1])


def one_hot(y):
    return F.one_hot(y, 3).float()


def fit(tmp_path, module, *callbacks):
    trainer(tmp_path, callbacks=list(callbacks)).fit(module, loader())


@pytest.mark.parametrize("make", [SimplexETFHead, lambda: GrassmannHead(2)])
def test_a_head_that_is_averaged_with_another_is_refused(tmp_path, make):
    callback = make()
    callback.layer = "net.fc"
    with pytest.raises(ValueError, match=r"the logits are made by net.fc together with other"):
        fit(tmp_path, Two(), callback)


@pytest.mark.parametrize("make", [SimplexETFHead, lambda: GrassmannHead(2)])
def test_a_layer_after_the_head_is_named(tmp_path, make):
    with pytest.raises(ValueError, match=r"net.fc is not the layer that makes the logits: top.0 ran after it"):
        fit(tmp_path, Above(), make())


def test_a_monitor_warns_of_it_and_goes_on(tmp_path):
    with pytest.warns(UserWarning, match=r"NeuralCollapseMonitor\[.*: net.fc is not the layer .*argument `classifier`"):
        fit(tmp_path, Above(), NeuralCollapseMonitor())


@pytest.mark.parametrize("make", [SimplexETFHead, lambda: GrassmannHead(2)])
@pytest.mark.parametrize(
    ("of", "outputs", "said"),
    [
        (lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], (y > 0).float()), 1, "has one output"),
        (lambda z, y: F.mse_loss(z, torch.randn(len(y), 3)), 3, "several at once, or none, or no classes"),
        (lambda z, y: F.mse_loss(z.sum(1), y.float()), 3, "numbers, no classes"),
        (lambda z, y: F.binary_cross_entropy_with_logits(z, 1 - one_hot(y)), 3, "several at once"),
    ],
    ids=["one output", "regression", "sum", "multi-label"],
)
def test_what_a_head_of_classes_cannot_be_is_refused(tmp_path, make, of, outputs, said):
    with pytest.raises(ValueError, match=said):
        fit(tmp_path, Loss(of, outputs), make())


def test_subspaces_cannot_say_no_and_prototypes_can(tmp_path):
    def of(z, y):
        return F.binary_cross_entropy_with_logits(z, one_hot(y))

    fit(tmp_path, Loss(of), SimplexETFHead())
    with pytest.raises(ValueError, match="needs logits below zero to say no"):
        fit(tmp_path, Loss(of), GrassmannHead(2))


@pytest.mark.parametrize(
    "of",
    [
        F.cross_entropy,
        lambda z, y: F.nll_loss(z.log_softmax(-1), y),
        lambda z, y: F.mse_loss(z, one_hot(y)),
        lambda z, y: -(z.log_softmax(-1) * one_hot(y)).sum(1).mean(),  # written by hand
        lambda z, y: F.cross_entropy(z * 2, y, label_smoothing=0.1) + 0.1 * F.mse_loss(z, torch.randn_like(z)),
    ],
)
def test_usual_losses_raise_no_alarm_and_leave_no_trace(tmp_path, of):
    modules = []
    for callbacks in ([], [NeuralCollapseMonitor()]):
        torch.manual_seed(0)
        module = Loss(of)
        torch.manual_seed(1)
        fit(tmp_path, module, *callbacks)
        modules.append(module)
    assert all(torch.equal(a, b) for a, b in zip(*map(weights, modules), strict=True))
    assert "_feat_wraps" not in modules[1].__dict__
    assert not any(part._forward_hooks for part in modules[1].modules())
    fit(tmp_path, Loss(of), SimplexETFHead())
    fit(tmp_path, Loss(of), GrassmannHead(2))


def test_the_output_of_forward_decides_where_an_example_is_given():
    class Unnamed(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(self.a(x).relu())

    module = Unnamed()
    with pytest.raises(ValueError, match=r"a \(Linear\), b \(Linear\)"):
        find_classifier(module)
    module.example_input_array = torch.zeros(1, 4)
    assert find_classifier(module)[0] == "b"
    assert module.training


def test_tensors_are_followed_through_everything_without_weights():
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 3), "fixed": SimplexETF(4, 3)})
    x = torch.randn(2, 4)
    with LastLayers(module).following() as follower:
        h = torch.relu(module["a"](x))
        assert follower.of(h.reshape(-1)[:3] * 2) == {"a"}
        assert follower.of(module["b"](h).softmax(-1)) == {"b"}
        assert follower.of(module["b"](h) + module["fixed"](h)) == {"b", "fixed"}
        assert follower.of(x) == set()


# Heads that are no Linear


class Maps(pl.LightningModule):
    """Segments: a class for each position."""

    def __init__(self, kernel=1):
        super().__init__()
        self.body, self.classifier = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 3, kernel, padding=kernel // 2)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.classifier(self.body(batch[0]).relu()), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def maps():
    return DataLoader(TensorDataset(torch.randn(4, 2, 5, 6), torch.randint(0, 3, (4, 5, 6))), 2)


@pytest.mark.parametrize("make", [SimplexETFHead, lambda: GrassmannHead(2)])
def test_a_convolution_of_one_position_is_a_linear_at_each(tmp_path, make):
    module, callback = Maps(), make()
    for _ in range(2):
        trainer(tmp_path, callbacks=[callback]).fit(module, maps())
    name, head = find_classifier(module)
    assert name == "classifier.head"
    x = torch.randn(2, 8, 5, 6)
    by_hand = torch.stack([head(x[:, :, i, j]) for i in range(5) for j in range(6)], -1).reshape(2, 3, 5, 6)
    torch.testing.assert_close(module.classifier(x), by_hand)


def test_at_each_position_the_target_is_that_of_the_position(tmp_path):
    class Keeps(Maps):
        def training_step(self, batch, batch_idx):
            self.heard = self.body(batch[0]).relu().detach(), batch[1]
            return super().training_step(batch, batch_idx)

    module, data = Keeps(), maps()
    run = trainer(tmp_path, callbacks=[SimplexETFHead(), DotRegressionRegularizer()], limit_train_batches=1)
    run.fit(module, data)
    features_NDHW, targets_NHW = module.heard
    features = features_NDHW.movedim(1, -1).flatten(0, -2)
    by_hand = dot_regression(features, targets_NHW.flatten(), module.classifier.head.prototypes)
    torch.testing.assert_close(run.callback_metrics["dot_regression/loss/penultimate"], by_hand)


def test_a_monitor_hears_maps_where_a_head_stands_at_each_position(tmp_path):
    class Pooled(Maps):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.classifier(self.body(batch[0]).relu()).mean((2, 3)), batch[1][:, 0, 0])

    taps = FeatureTap(pooling="mean")
    module = Pooled()
    trainer(tmp_path, callbacks=[SimplexETFHead()]).fit(module, maps())
    taps.attach(module)
    taps.listen()
    h = torch.randn(2, 8, 5, 6)
    module.classifier(h)
    torch.testing.assert_close(taps.take(), h.mean((2, 3)))
    taps.remove()


def test_a_convolution_of_more_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mixes positions \(kernel \(3, 3\)\)"):
        trainer(tmp_path, callbacks=[SimplexETFHead()]).fit(Maps(3), maps())


def test_the_norm_inside_of_a_linear_stays(tmp_path):
    class NormedLinear(nn.Linear):
        def __init__(self):
            super().__init__(8, 3)
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            return F.linear(self.norm(x), self.weight, self.bias)

    module = Plain()
    module.net.fc = NormedLinear()
    norm = module.net.fc.norm
    fit(tmp_path, module, SimplexETFHead())
    assert find_classifier(module)[0] == "net.fc.head"
    x = torch.randn(4, 8)
    assert torch.equal(module.net.fc(x), module.net.fc.head(norm(x)))
