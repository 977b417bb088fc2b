"""Features that are NaN or inf: a monitor says so once and goes on; a regularizer makes no finite loss NaN."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks import (
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
)
from lightning_feat.callbacks.feature_shift.monitor import FeatureShiftMonitor
from lightning_feat.callbacks.feature_shift.regularizer import FeatureShiftRegularizer
from tests.helpers import NUM_CLASSES, WIDTH, Net, loader, points, trainer

slow = pytest.mark.slow


class Inert(pl.LightningModule):
    """From the second epoch on some features are not finite; nothing is trained, so that nothing else becomes so."""

    def __init__(self, value, share):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.value, self.share = Net(), value, share
        self.free = nn.Parameter(torch.ones(()))

    def forward(self, x):
        if self.current_epoch > 0:
            bad = x[:, :1] <= points().tensors[0][:, 0].quantile(self.share)
            x = torch.where(bad, self.value, x)
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self(batch[0])
        return self.free.square()

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


MONITORS = {
    "collapse, online": lambda: [NeuralCollapseMonitor(measures=["*"])],
    "collapse, exact": lambda: [NeuralCollapseMonitor(mode="exact", measures=["*"])],
    "collapse, both layers": lambda: [NeuralCollapseMonitor(["net.body", "net.fc"], num_classes=NUM_CLASSES)],
    "collapse of subspaces": lambda: [GrassmannHead(2), NeuralCollapseMonitor(measures=["*"])],
    "subspaces, online": lambda: [GrassmannHead(2), GrassmannMonitor()],
    "subspaces, exact": lambda: [GrassmannHead(2), GrassmannMonitor(mode="exact")],
    "mixup": lambda: [MixupGeometryMonitor(num_pairs=8)],
    "probe": lambda: [LinearProbe(every_n_epochs=1)],
    "regression": lambda: [RegressionCollapseMonitor()],
    "shift": lambda: [FeatureShiftMonitor(["net.fc"])],
}


@pytest.mark.parametrize(
    ("value", "share"), [(torch.nan, 0.125), (torch.inf, 1.0), pytest.param(torch.inf, 0.125, marks=slow)]
)
@pytest.mark.parametrize("name", MONITORS)
def test_a_monitor_says_so_once_with_epoch_layer_and_share_and_goes_on(tmp_path, name, value, share):
    x, y = points().tensors
    y = torch.randn(32, NUM_CLASSES, generator=torch.Generator().manual_seed(0)) if name == "regression" else y
    data = DataLoader(TensorDataset(x, y), batch_size=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(tmp_path, callbacks=MONITORS[name](), max_epochs=4)
        run.fit(Inert(value, share), data, data)
    sentences = [str(entry.message) for entry in caught if "were NaN or inf" in str(entry.message)]
    assert run.current_epoch == 4
    assert len(sentences) == (2 if name == "collapse, both layers" else 1), sentences
    for sentence in sentences:
        assert f"{share:.1%} of the features of layer " in sentence
        assert "in epoch 1 " in sentence
    assert run.callback_metrics


LINEAR, SUBSPACES, SIMPLEX = [], [GrassmannHead], [SimplexETFHead]
MEASURED = [
    (monitor, head) for monitor in (NeuralCollapseMonitor, LinearProbe) for head in (LINEAR, SUBSPACES, SIMPLEX)
]
MEASURED += [(GrassmannMonitor, SUBSPACES)]  # of subspaces alone
MEASURED += [pytest.param(MixupGeometryMonitor, head, marks=slow) for head in (LINEAR, SIMPLEX)]  # of rows alone


@pytest.mark.parametrize(("monitor", "head"), MEASURED)
def test_weights_that_are_nan_end_no_run(tmp_path, head, monitor):
    class Diverges(Inert):
        @torch.no_grad()
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                for parameter in self.net.parameters():
                    parameter.fill_(torch.nan)

    options = {"measures": ["*"]} if monitor is NeuralCollapseMonitor else {}
    callbacks = [*(kind() for kind in head), monitor(**options)]
    run = trainer(tmp_path, callbacks=callbacks, max_epochs=3)
    run.fit(Diverges(0.0, 0.0), loader(), loader())
    assert run.current_epoch == 3


class Ignores(pl.LightningModule):
    """Its own loss is finite: what is marked is left out, before anything is made of it."""

    def __init__(self, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.scale, self.losses = Net(), scale, []

    def forward(self, x):
        return self.net(self.scale * x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.noted = cross_entropy(logits[y >= 0], y[y >= 0]) if (y >= 0).any() else 0.0 * logits[y >= 0].sum()
        return self.noted

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append((float(self.noted), float(outputs["loss"])))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def spread(features, targets):
    return (features - features.mean(0)).square().sum(1).mean()


def usable(batch):
    return batch[1] >= 0


REGULARIZERS = {
    "features and targets": lambda: [FeatureRegularizer(spread, "spread")],
    "collapse": lambda: [NeuralCollapseRegularizer(num_features=WIDTH)],
    "collapse, global": lambda: [NeuralCollapseRegularizer(variant="global")],
    "collapse, frobenius": lambda: [NeuralCollapseRegularizer(variant="frobenius")],
    "held back": lambda: [NeuralCollapseRegularizer(hold_back=True)],
    "dot-regression": lambda: [SimplexETFHead(), DotRegressionRegularizer(replace_loss=False)],
    "shift": lambda: [FeatureShiftRegularizer(["net.body"], mask_key=usable)],
    "shift, cosine": lambda: [FeatureShiftRegularizer(["net.body"], mask_key=usable, form="cosine")],
    "shift, distillation": lambda: [FeatureShiftRegularizer(["net.body"], mask_key=usable, form="distillation")],
    "dot-regression, alone": lambda: [SimplexETFHead(), DotRegressionRegularizer()],
    "dot-regression, balanced": lambda: [SimplexETFHead(), DotRegressionRegularizer(class_counts="batch")],
    "dot-regression, counted": lambda: [SimplexETFHead(), DotRegressionRegularizer(class_counts=[9, 0, 1])],
}


def samples(case):
    x, y = points().tensors
    x, y = x.clone(), y.clone()
    if case == "NaN in samples that are ignored":
        x[::2], y[::2] = torch.nan, -100
    elif case == "inf in samples that are ignored":
        x[::2], y[::2] = torch.inf, -100
    elif case == "NaN in batches that are ignored":
        x[8:16], y[8:16] = torch.nan, -100
    elif case == "a class without samples":
        y[y == 2] = 1
    elif case == "one class":
        y[:] = 0
    return TensorDataset(x, y)


@pytest.mark.parametrize(
    "case",
    [
        "NaN in samples that are ignored",
        pytest.param("inf in samples that are ignored", marks=slow),
        "NaN in batches that are ignored",
        "a class without samples",
        "one class",
        "zero features",
        pytest.param("a batch of one", marks=slow),
    ],
)
@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_regularizer_makes_no_finite_loss_nan(tmp_path, name, case):
    module = Ignores()
    if case == "zero features":
        module.net.body[0].bias.data.fill_(-1e6)  # behind a ReLU
    if "NaN" in case or "inf" in case:  # the backward of a network makes NaN weights of NaN inputs, ignored or not
        module.configure_optimizers = lambda: torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    run = trainer(tmp_path, callbacks=REGULARIZERS[name](), max_epochs=2)
    run.fit(module, DataLoader(samples(case), batch_size=1 if case == "a batch of one" else 8))
    assert len(module.losses) == run.global_step > 0
    assert all(torch.tensor(pair).isfinite().all() for pair in module.losses)
    if "ignored" not in case:
        assert all(parameter.isfinite().all() for parameter in module.parameters())
