"""What losses, targets and numbers of classes in the first training step say against a head."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks import FeatureRegularizer, GrassmannHead, NeuralCollapseMonitor, SimplexETFHead
from tests.helpers import Plain, loader, trainer

HEADS = [SimplexETFHead, lambda: GrassmannHead(2)]
SHARES = torch.tensor([0.1, 0.5, 0.9])


class Loss(Plain):
    def __init__(self, of, outputs=3, **parts):
        super().__init__()
        self.of = of
        self.net.fc = nn.Linear(8, outputs)
        for name, part in parts.items():
            setattr(self, name, part)

    def training_step(self, batch, batch_idx):
        return self.of(self, self(batch[0]), batch[1])


def with_targets(targets):
    return DataLoader(TensorDataset(torch.randn(len(targets), 4), targets), 4)


def fit(tmp_path, module, data, *callbacks):
    trainer(tmp_path, callbacks=list(callbacks)).fit(module, data)


def several(n=8):
    return (torch.arange(3 * n).reshape(n, 3) % 2).float() + (torch.arange(n) % 2)[:, None] * torch.eye(3)[:1]


def sigmoids(m, z, y):
    return -(y * F.logsigmoid(z) + (1 - y.float()) * F.logsigmoid(-z)).mean()


def quantiles(m, z, y):
    off = y[:, None] - z
    return torch.maximum(SHARES * off, (SHARES - 1) * off).mean()


NOT_CLASSES = {
    "several, by hand": (sigmoids, (several() > 0).float(), "in the batch are several at once"),
    "several, whole": (sigmoids, (several() > 0).long(), "in the batch are several at once"),
    "several, bool": (sigmoids, several() > 0, "in the batch are several at once"),
    "numbers, by hand": (quantiles, torch.linspace(-1, 1, 8), "in the batch are numbers"),
    "gaussian": (
        lambda m, z, y: F.gaussian_nll_loss(z[:, 0], y, z[:, 1].exp()),
        torch.randn(8),
        "gaussian_nll_loss are numbers",
    ),
    "poisson": (lambda m, z, y: F.poisson_nll_loss(z[:, 0], y), torch.arange(8.0), "poisson_nll_loss are numbers"),
    "margins": (lambda m, z, y: F.soft_margin_loss(z, y), 2 * (several() > 0).float() - 1, "are several at once"),
    "margins of labels": (
        lambda m, z, y: F.multilabel_margin_loss(z, y),
        torch.tensor([[0, 2, -1]] * 8),
        "multilabel_margin_loss are several at once",
    ),
}


@pytest.mark.parametrize("make", HEADS)
@pytest.mark.parametrize("name", NOT_CLASSES)
def test_targets_that_are_no_classes_are_refused_whatever_the_loss(tmp_path, name, make):
    of, targets, said = NOT_CLASSES[name]
    with pytest.raises(ValueError, match=said):
        fit(tmp_path, Loss(of), with_targets(targets), make())


def by_hand(m, z, y):
    return -z.log_softmax(-1).gather(1, y.long()[:, None]).mean()


@pytest.mark.parametrize("targets", [torch.arange(8) % 3, (torch.arange(8) % 3).float()])
def test_classes_with_a_loss_written_by_hand_raise_no_alarm(tmp_path, targets):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(classes|logits)")
        for make in HEADS:
            fit(tmp_path, Loss(by_hand), with_targets(targets), make())


@pytest.mark.parametrize("make", HEADS)
def test_logits_for_nll_loss_are_refused_where_the_old_layer_made_logarithms(tmp_path, make):
    class Shares(nn.Linear):
        def forward(self, x):
            return super().forward(x).log_softmax(-1)

    module = Loss(lambda m, z, y: F.nll_loss(z, y))
    module.net.fc = Shares(8, 3)
    with pytest.raises(ValueError, match=r"nll_loss gets what net.fc puts out, which are no logarithms"):
        fit(tmp_path, module, loader(), make())
    fit(tmp_path, Loss(lambda m, z, y: F.nll_loss(z.log_softmax(-1), y)), loader(), make())


PARTS = {
    "some": (lambda m, z, y: F.cross_entropy(z[:, :3], y), 5),
    "the largest of several": (lambda m, z, y: F.cross_entropy(z.unflatten(1, (3, 2)).amax(2), y), 6),
}


@pytest.mark.parametrize("make", [*HEADS, NeuralCollapseMonitor])
@pytest.mark.parametrize("name", PARTS)
def test_another_number_of_classes_in_the_loss_is_said(tmp_path, name, make):
    of, outputs = PARTS[name]
    with pytest.warns(UserWarning, match=f"net.fc has {outputs} outputs, and cross_entropy gets logits of 3 classes"):
        fit(tmp_path, Loss(of, outputs), loader(), make())


# Weights that no layer is called for


def distances(m, z, y):
    return F.cross_entropy(-(z[:, None] - m.prototypes).square().sum(-1), y)


BARE = {
    "prototypes": lambda m, z, y: F.cross_entropy(-torch.cdist(z, m.prototypes), y),
    "distances by hand": distances,
    "projection": lambda m, z, y: F.cross_entropy(z @ m.prototypes.T, y),
    "cosines": lambda m, z, y: F.cross_entropy(F.linear(F.normalize(z), F.normalize(m.prototypes)), y),
    "layer": lambda m, z, y: F.cross_entropy(F.linear(z, m.other.weight), y),
    "loss by hand": lambda m, z, y: by_hand(m, z @ m.prototypes.T, y),
}


@pytest.mark.parametrize("name", BARE)
def test_weights_that_are_multiplied_with_the_output_come_last(tmp_path, name):
    def module():
        return Loss(BARE[name], 4, prototypes=nn.Parameter(torch.randn(3, 4)), other=nn.Embedding(3, 4))

    last = "other" if name == "layer" else "prototypes"
    said = f"net.fc is not the layer that makes the logits: {last} ran after it"
    for make in HEADS:
        with pytest.raises(ValueError, match=said):
            fit(tmp_path, module(), loader(), make())
    with pytest.raises(ValueError, match=said):
        fit(tmp_path, module(), loader(), FeatureRegularizer(lambda h: h.square().mean(), "small"))
    with pytest.warns(UserWarning, match=said):
        fit(tmp_path, module(), loader(), NeuralCollapseMonitor())


PASSED = {
    "a number for each class": (lambda m, z, y: F.cross_entropy(z * m.w + m.w[:1], y), torch.ones(3)),
    "position": (lambda m, z, y: F.cross_entropy((z[:, None] + m.w).mean(1), y), torch.zeros(1, 3)),
    "decay": (lambda m, z, y: F.cross_entropy(z, y) + m.w.square().sum(), torch.ones(3, 3)),
    "all that is not used": (
        lambda m, z, y: F.cross_entropy(z + 0 * sum(p.sum() for p in m.parameters()), y),
        torch.ones(3, 3),
    ),
    "of the features": (
        lambda m, z, y: F.cross_entropy(m.net.fc(m.net.body[1](torch.randn(len(y), 8) @ m.w)), y),
        torch.ones(8, 8),
    ),
}


@pytest.mark.parametrize("name", PASSED)
def test_weights_that_do_not_come_last_raise_no_alarm(tmp_path, name):
    of, weight = PASSED[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the logits")
        fit(tmp_path, Loss(of, w=nn.Parameter(weight)), loader(), SimplexETFHead())
        fit(tmp_path, Loss(of, w=nn.Parameter(weight)), loader(), NeuralCollapseMonitor())
