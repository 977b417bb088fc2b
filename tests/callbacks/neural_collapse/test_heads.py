"""Classifiers that the monitor of neural collapse compares with, and batches whose targets are not the features'."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear, normalize, one_hot

from lightning_feat.callbacks import NeuralCollapseMonitor
from lightning_feat.data import IndexedDataset
from lightning_feat.functional.neural_collapse import class_sums, collapse_measures
from lightning_feat.layers import SimplexETF
from tests.helpers import Plain, loader, points, trainer

WEIGHT_MEASURES = {"nc0", "nc3", "nc3_cosine", "nc2_weight_equinorm"}


class CosineLinear(nn.Linear):
    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, features):
        return 10 * linear(normalize(features), normalize(self.weight))


class CosineHead(nn.Module):
    def __init__(self, in_features, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.randn(num_classes, in_features))

    def forward(self, features):
        return 10 * normalize(features) @ normalize(self.weight).T


class TransposedHead(CosineHead):
    def __init__(self, in_features, num_classes):
        super().__init__(in_features, num_classes)
        self.weight = nn.Parameter(torch.randn(in_features, num_classes))

    def forward(self, features):
        return features @ self.weight


class ByConvolution(nn.Conv2d):
    """As timm's ``use_conv``, with the flattening inside."""

    def __init__(self, in_features, num_classes):
        super().__init__(in_features, num_classes, 1)
        self.num_classes = num_classes

    def forward(self, features):
        return super().forward(features[:, :, None, None]).flatten(1)


def fit(tmp_path, head, **kwargs):
    torch.manual_seed(0)
    module = Plain(lr=0.0)
    if head is not None:
        module.net.fc = head(8, 3)
    monitor = NeuralCollapseMonitor(measures=["*"], **kwargs)
    run = trainer(tmp_path, callbacks=[monitor])
    run.fit(module, loader(64))
    prefix, end = "neural_collapse/", "/penultimate"
    return module, {name[len(prefix) : -len(end)]: value.double() for name, value in run.callback_metrics.items()}


@pytest.mark.parametrize("head", [CosineLinear, CosineHead, ByConvolution, SimplexETF])
@pytest.mark.parametrize("mode", ["online", "exact"])
def test_head_is_measured_by_its_rows(tmp_path, head, mode):
    module, values = fit(tmp_path, head, mode=mode)
    fc = module.net.fc
    rows = fc.prototypes if head is SimplexETF else fc.weight.flatten(1)
    x, y = points(64).tensors
    expected = collapse_measures(class_sums(module.net.body(x).detach(), y, 3), weight=rows)
    assert values.keys() >= WEIGHT_MEASURES
    for name in WEIGHT_MEASURES:  # logged in float32, features in batches of 8; nc0 of a simplex is rounding
        torch.testing.assert_close(values[name], expected[name], rtol=1e-5, atol=1e-6)
    assert ("nc4_mismatch" in values) == (mode == "exact")  # by the logits, whatever the head does


@pytest.mark.parametrize("head", [TransposedHead])
def test_head_without_rows_is_left_out_and_said_once(tmp_path, head):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, values = fit(tmp_path, head, mode="exact")
    said = [str(warning.message) for warning in caught if "classifier net.fc" in str(warning.message)]
    assert len(said) == 1
    assert "a TransposedHead, has no weight (3, 8): what needs one (NC0, NC3" in said[0]
    assert not WEIGHT_MEASURES & values.keys()
    assert {"nc1_quotient", "nc2_etf_error", "nc4_mismatch"} <= values.keys()


def test_head_that_shows_no_number_of_classes_asks_for_it(tmp_path):
    class Nameless(TransposedHead):
        def __init__(self, in_features, num_classes):
            super().__init__(in_features, num_classes)
            del self.num_classes

    with pytest.raises(ValueError, match="no classifier that shows the number of classes: set num_classes"):
        fit(tmp_path, Nameless)
    _, values = fit(tmp_path, Nameless, num_classes=3)
    assert values["nc1_quotient"] > 0


class MixesInside(Plain):
    """Mixup where no callback can see it."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        partner = torch.arange(len(x) - 1, -1, -1)
        logits = self(0.5 * x + 0.5 * x[partner])
        return 0.5 * cross_entropy(logits, y) + 0.5 * cross_entropy(logits, y[partner])


class MixesInTheBatch(Plain):
    """The same, with the soft labels in the batch."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        if not self.trainer.training:
            return x, y
        y = one_hot(y, 3).float()
        return 0.5 * x + 0.5 * x.flip(0), 0.5 * y + 0.5 * y.flip(0)


def cdnv(tmp_path, module, mode):
    torch.manual_seed(0)
    module = module(lr=0.0)
    run = trainer(tmp_path, callbacks=[NeuralCollapseMonitor(mode=mode, measures=["cdnv"])])
    run.fit(module, loader(64))
    x, y = points(64).tensors
    return run.callback_metrics["neural_collapse/cdnv/penultimate"].double(), module, x, y


def definition(module, x, targets):
    return collapse_measures(class_sums(module.net.body(x).detach(), targets, 3))["cdnv"]


@pytest.mark.parametrize("mixes", [MixesInside, MixesInTheBatch])
def test_exact_mode_sees_no_mixup_in_the_module(tmp_path, mixes):
    value, module, x, y = cdnv(tmp_path, mixes, "exact")
    torch.testing.assert_close(value, definition(module, x, y), rtol=1e-5, atol=0)


def test_online_mode_takes_mixed_features_with_the_soft_labels_of_the_batch(tmp_path):
    value, module, x, y = cdnv(tmp_path, MixesInTheBatch, "online")
    mixed, soft = x.clone(), one_hot(y, 3).float()
    for part in range(0, 64, 8):
        rows = slice(part, part + 8)
        mixed[rows] = 0.5 * x[rows] + 0.5 * x[rows].flip(0)
        soft[rows] = 0.5 * soft[rows] + 0.5 * soft[rows].flip(0)
    torch.testing.assert_close(value, definition(module, mixed, soft), rtol=1e-5, atol=0)


def test_online_mode_does_not_notice_mixup_inside_training_step(tmp_path):
    """What the docstring warns of: a value comes out, and it is that of neither labelling."""
    value, module, x, y = cdnv(tmp_path, MixesInside, "online")
    assert value.isfinite()
    assert abs(value / definition(module, x, y) - 1) > 0.1


def test_batches_with_indices_are_read_by_functions(tmp_path):
    class Indexed(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0], batch_idx)

    values = {}
    for mode in ("online", "exact"):
        torch.manual_seed(0)
        monitor = NeuralCollapseMonitor(
            mode=mode, target_key=lambda batch: batch[0][1], forward=lambda module, batch: module(batch[0][0])
        )
        run = trainer(tmp_path, callbacks=[monitor])
        run.fit(Indexed(lr=0.0), torch.utils.data.DataLoader(IndexedDataset(points(40)), batch_size=8))
        values[mode] = float(run.callback_metrics["neural_collapse/cdnv/penultimate"])
    assert values["online"] == pytest.approx(values["exact"], rel=1e-6)


class Tokens(pl.LightningModule):
    """Classifies each token of a sequence."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("mode", ["online", "exact"])
def test_a_classifier_of_tokens_is_compared_with_their_means(tmp_path, mode):
    data = torch.utils.data.TensorDataset(torch.randn(12, 5, 4), torch.arange(60).view(12, 5) % 3)
    run = trainer(tmp_path, callbacks=[NeuralCollapseMonitor(mode=mode, pooling="tokens")])
    run.fit(Tokens(), torch.utils.data.DataLoader(data, batch_size=4))
    assert run.callback_metrics["neural_collapse/nc3/penultimate"] > 0
