"""What callbacks make of heads, labels, padding and frozen parts that are not as usual."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks import (
    FeatureRegularizer,
    FeatureShiftMonitor,
    FeatureShiftRegularizer,
    GrassmannHead,
    GrassmannMonitor,
    LinearProbe,
    NeuralCollapseMonitor,
    SimplicityBiasUpsampler,
)
from lightning_feat.functional.transfer.probe import hold_out
from lightning_feat.layers import GrassmannLinear
from tests.helpers import Plain, loader, points, trainer


@pytest.mark.parametrize("outputs", [1, 100])
def test_a_head_of_other_outputs_than_classes_leaves_out_what_needs_its_logits(tmp_path, outputs):
    class Head(Plain):
        def __init__(self):
            super().__init__()
            self.net.fc = nn.Linear(8, outputs)

        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            if outputs == 1:
                return binary_cross_entropy_with_logits(logits[:, 0], (batch[1] > 0).float())
            return cross_entropy(logits, batch[1])

    run = trainer(tmp_path, callbacks=[NeuralCollapseMonitor(mode="exact", num_classes=3, measures=["*"])])
    run.fit(Head(), loader(64))
    names = {name.split("/")[1] for name in run.callback_metrics if name.startswith("neural_collapse/")}
    assert {"nc1_quotient", "ncc_accuracy"} <= names
    assert math.isnan(float(run.callback_metrics.get("neural_collapse/nc4_mismatch/penultimate", torch.nan)))


def test_samples_without_a_label_are_no_class_of_a_probe(tmp_path):
    x, y = points(64).tensors
    unlabelled = y.clone()
    unlabelled[::4] = -1
    kept = torch.arange(64) % 4 != 0
    results = []
    for inputs, targets in ((x, unlabelled), (x[kept], y[kept])):
        data = DataLoader(TensorDataset(inputs, targets), 16)
        probe = LinearProbe(penalties=[0.1], train=data, test=data)
        pl.seed_everything(0)
        trainer(tmp_path, callbacks=[probe]).fit(Plain(), loader(), loader(16))
        results.append(float(probe.result.accuracy))
    assert results[0] == results[1]


def test_of_two_shots_one_is_held_out():
    targets = torch.arange(5).repeat(2)
    held = hold_out(targets)
    assert held.sum() == 5
    assert targets[held].unique().numel() == targets[~held].unique().numel() == 5


def test_a_probe_of_two_shots_is_a_number(tmp_path):
    x, y = points(60).tensors
    few = torch.cat([(y == c).nonzero()[:2, 0] for c in range(3)])
    train, test = DataLoader(TensorDataset(x[few], y[few]), 4), DataLoader(TensorDataset(x, y), 8)
    probe = LinearProbe(penalties=[0.1], train=train, test=test)
    trainer(tmp_path, callbacks=[probe]).fit(Plain(), loader(), loader(16))
    assert 0 <= probe.result.accuracy <= 1


class Manual(Plain):
    """Optimizes by itself, and never runs one of its layers."""

    def __init__(self):
        super().__init__(manual=True)
        self.unused = nn.Sequential(nn.Linear(8, 8))
        self.net.body.append(nn.Identity())


@pytest.mark.parametrize(
    "make",
    [
        lambda: NeuralCollapseMonitor("unused", num_classes=3, classifier="net.fc"),
        lambda: FeatureShiftMonitor(["unused"]),
    ],
)
def test_a_monitor_that_hears_nothing_says_so_once(tmp_path, make):
    with pytest.warns(UserWarning, match="heard nothing in epoch 0, and logs nothing.* unused did not run") as said:
        trainer(tmp_path, callbacks=[make()], max_epochs=3).fit(Manual(), loader())
    assert len([w for w in said if "heard nothing" in str(w.message)]) == 1


class Bypasses(Plain):
    """Optimizes by itself, and never runs its head."""

    def __init__(self):
        super().__init__(manual=True)

    def forward(self, x):
        return self.net.body(x)[:, :3]


def test_a_head_that_hears_nothing_is_refused_in_the_first_step(tmp_path):
    run = trainer(tmp_path, callbacks=[GrassmannHead(2), GrassmannMonitor()])
    with pytest.raises(ValueError, match=r"net.fc is not the layer that makes the logits: net.body.0 ran"):
        run.fit(Bypasses(), loader())
    assert run.global_step <= 1  # the step of a module that optimizes by itself has run


def test_a_monitor_of_a_head_that_hears_nothing_says_so_once(tmp_path):
    module = Bypasses()
    module.net.fc = GrassmannLinear(8, 3, 2)
    with pytest.warns(UserWarning, match=r"GrassmannMonitor.* heard nothing in epoch 0, and logs nothing") as said:
        trainer(tmp_path, callbacks=[GrassmannMonitor()], max_epochs=3).fit(module, loader())
    assert len([w for w in said if "heard nothing" in str(w.message)]) == 1


class Decoder(nn.Module):
    """In eval step by step."""

    def __init__(self):
        super().__init__()
        self.body, self.out = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        h = self.body(x)
        return self.out(h) if self.training else torch.cat([self.out(h[:, t : t + 1]) for t in range(h.shape[1])], 1)


class Sequences(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Decoder()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda **more: FeatureShiftMonitor("net.out", read="input", **more),
        lambda **more: FeatureShiftRegularizer("net.out", "distillation", read="input", **more),
    ],
)
def test_features_of_another_path_in_eval_are_not_paired(tmp_path, make):
    data = DataLoader(TensorDataset(torch.randn(16, 6, 4), torch.randn(16, 6, 1)), 8)
    run = trainer(tmp_path, callbacks=[make()])
    with pytest.raises(ValueError, match=r"ran 1 times in this step.*but 6 times in its reference.*another path"):
        run.fit(Sequences(), data, data)
    assert run.global_step <= 1  # in the first batch


def test_in_validation_both_take_the_same_path(tmp_path):
    data = DataLoader(TensorDataset(torch.randn(16, 6, 4), torch.randn(16, 6, 1)), 8)
    run = trainer(tmp_path, callbacks=[FeatureShiftMonitor("net.out", read="input", data="val")])
    run.fit(Sequences(), data, data)
    assert run.callback_metrics["feature_shift_val/relative/net.out.input"] == 0


class Tokens(pl.LightningModule):
    """Puts out one feature for each token, and classifies their masked mean."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 3)

    def forward(self, ids, mask):
        h = self.embed(ids) + 1  # padding has features, too
        return self.fc((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch["ids"], batch["mask"]), batch["label"])

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Texts(torch.utils.data.Dataset):
    """Texts of one length in themselves, or padded to the longest."""

    def __init__(self, padding):
        generator = torch.Generator().manual_seed(0)
        self.ids, self.lengths = torch.randint(1, 20, (24, 5), generator=generator), torch.full((24,), 5)
        self.padding = padding

    def __len__(self):
        return 24

    def __getitem__(self, i):
        ids, mask = torch.zeros(5 + self.padding, dtype=torch.long), torch.zeros(5 + self.padding, dtype=torch.long)
        ids[:5], mask[:5] = self.ids[i], 1
        return {"ids": ids, "mask": mask, "label": torch.tensor(i % 3)}


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("mode", ["online", "exact"])
def test_padding_changes_no_measure(tmp_path, pooling, mode):
    values = []
    for padding in (0, 4):
        torch.manual_seed(0)
        more = {"pooling": pooling, "mask_key": "mask", "num_classes": 3, "measures": ["nc1_quotient"], "mode": mode}
        run = trainer(tmp_path, callbacks=[NeuralCollapseMonitor("embed", **more)])
        run.fit(Tokens(), DataLoader(Texts(padding), 8), DataLoader(Texts(padding), 8))
        values.append(float(run.callback_metrics["neural_collapse/nc1_quotient/embed"]))
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "tokens"])
def test_padding_is_in_no_loss_term(tmp_path, pooling):
    values = []
    for padding in (0, 4):
        torch.manual_seed(0)
        term = FeatureRegularizer(
            lambda h: h.square().sum(1).mean(), "size", layer="embed", pooling=pooling, mask_key="mask"
        )
        run = trainer(tmp_path, callbacks=[term])
        run.fit(Tokens(), DataLoader(Texts(padding), 8), DataLoader(Texts(padding), 8))
        values.append(float(run.callback_metrics["size/loss/embed"]))
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_padding_is_in_no_probe(tmp_path):
    heard = []
    for padding in (0, 4):
        torch.manual_seed(0)
        probe = LinearProbe("embed", pooling="mean", mask_key="mask", penalties=[0.1])
        probe._probe = lambda trainer, features: heard.append(features["test"][0]) or torch.zeros(())
        run = trainer(tmp_path, callbacks=[probe])
        run.fit(Tokens(), DataLoader(Texts(padding), 8), DataLoader(Texts(padding), 8))
    torch.testing.assert_close(*heard)


def test_a_term_above_frozen_layers_is_told(tmp_path):
    module = Plain()
    module.net.body.requires_grad_(False)
    with pytest.warns(UserWarning, match="reaches no layer of the network.*Nothing is left to train"):
        trainer(tmp_path, callbacks=[FeatureRegularizer(lambda h: h.mean(), "m", layer="net.body")]).fit(
            module, loader()
        )


class Repeats(Plain):
    """Gives four rows of each sample in eval, as Monte Carlo dropout does."""

    def forward(self, x):
        return super().forward(x if self.training else x.repeat_interleave(4, 0))

    def validation_step(self, batch, batch_idx):
        self(batch[0])


def test_rows_of_a_network_that_repeats_samples_in_eval_are_not_blamed_on_the_loader(tmp_path):
    upsampler = SimplicityBiasUpsampler(separating_epoch=1, restart=False)
    with pytest.raises(ValueError, match=r"in eval mode over 8 training examples.*several rows of an example"):
        trainer(tmp_path, callbacks=[upsampler], max_epochs=3).fit(Repeats(), loader(), loader(16))
