"""A pass runs the network as the module's own step does, or the user is asked before any training."""

import re
from dataclasses import dataclass

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_feat.callbacks import (
    FeatureShiftMonitor,
    FeatureShiftRegularizer,
    FewShotMonitor,
    GrassmannHead,
    GrassmannMonitor,
    LinearProbe,
    MixupGeometryMonitor,
    NeuralCollapseMonitor,
    SimplicityBiasUpsampler,
)
from tests.helpers import Plain, equal, loader, points, trainer, weights

IDS, LENGTHS = torch.randint(1, 30, (32, 6), generator=torch.Generator().manual_seed(0)), torch.arange(32) % 5 + 1
MASK = (torch.arange(6) < LENGTHS[:, None]).long()
LABELS = torch.arange(32) % 3


class Text(pl.LightningModule):
    """Averages what a mask says; without one, all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.classifier = nn.Embedding(30, 8), nn.Linear(8, 3)

    def features(self, ids, mask=None):
        h = self.embed(ids)
        mask = torch.ones_like(ids) if mask is None else mask
        return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, ids, mask=None):
        return self.classifier(self.features(ids, mask))

    def unpack(self, batch):
        return batch[0], batch[1], batch[2]

    def training_step(self, batch, batch_idx):
        ids, mask, labels = self.unpack(batch)
        return cross_entropy(self(ids, mask), labels)

    def validation_step(self, batch, batch_idx):
        self.log("val", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Rows(Dataset):
    def __init__(self, form):
        self.form = form

    def __len__(self):
        return 32

    def __getitem__(self, i):
        return self.form(IDS[i], MASK[i], LABELS[i])


@dataclass
class Row:
    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


def stack(rows):
    return Row(*(torch.stack([getattr(row, name) for row in rows]) for name in ("ids", "mask", "labels")))


class AsDict(Text):
    def unpack(self, batch):
        return batch["ids"], batch["mask"], batch["labels"]


class AsObject(Text):
    def unpack(self, batch):
        return batch.ids, batch.mask, batch.labels


class LabelBetween(Text):
    def unpack(self, batch):
        return batch[0], batch[2], batch[1]


class Nested(Text):
    def unpack(self, batch):
        return batch[0][0], batch[0][1], batch[1]


class Encodes(Text):
    """Takes the whole batch, and the targets with it."""

    def forward(self, ids, mask, labels):
        return super().forward(ids, mask)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(*batch), batch[2])


FORMS = {
    "tuple": (Text, lambda *row: row, None, {"target_key": 2}),
    "label between": (LabelBetween, lambda i, m, y: (i, y, m), None, {}),
    "nested": (Nested, lambda i, m, y: ((i, m), y), None, {"target_key": 1}),
    "dict": (AsDict, lambda i, m, y: {"ids": i, "mask": m, "labels": y}, None, {}),
    "object": (AsObject, Row, stack, {}),
    "whole": (Encodes, lambda *row: row, None, {"target_key": 2}),
}


@pytest.mark.parametrize("form", FORMS)
def test_no_input_of_the_network_is_dropped(tmp_path, form):
    cls, row, collate, options = FORMS[form]
    module, data = cls(), DataLoader(Rows(row), 8, collate_fn=collate)
    values = {}
    for mode in ("online", "exact"):
        run = trainer(tmp_path, callbacks=[NeuralCollapseMonitor(mode=mode, measures=["nc1_quotient"], **options)])
        run.fit(module, data, data)
        values[mode] = float(run.callback_metrics["neural_collapse/nc1_quotient/penultimate"])
    assert values["exact"] == pytest.approx(values["online"], rel=1e-5)  # the weights do not move


def test_what_a_step_does_before_the_network_belongs_to_it(tmp_path):
    class Normalizes(Plain):
        def validation_step(self, batch, batch_idx):
            super().validation_step((3 * batch[0] - 1, batch[1]), batch_idx)

    module = Normalizes(lr=0.0)
    probe = LinearProbe(penalties=[0.1], every_n_epochs=1)
    heard = []
    probe._probe = lambda trainer, features: heard.append(features["test"][0]) or torch.zeros(())
    trainer(tmp_path, callbacks=[probe]).fit(module, loader(), loader(16))
    assert torch.equal(heard[0], module.net.body(3 * points(16).tensors[0] - 1).detach())


class NoForward(Plain):
    forward = pl.LightningModule.forward

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)


class TrainsOnly(NoForward):
    validation_step = test_step = pl.LightningModule.validation_step


class OwnData(pl.LightningDataModule):
    """As of the run, whether that validates or not."""

    def train_dataloader(self):
        return loader()

    def test_dataloader(self):
        return loader(16)


MONITORS = {
    "collapse": lambda: NeuralCollapseMonitor(mode="exact"),
    "probe": lambda: LinearProbe(penalties=[0.1], data=OwnData()),
    "mixup": lambda: MixupGeometryMonitor(num_pairs=4, data="train"),
    "upsampler": lambda: SimplicityBiasUpsampler(separating_epoch=1, restart=False),
    "shift": lambda: FeatureShiftMonitor(["net.body", "net.fc"], trunk=""),
    "shift kept": lambda: FeatureShiftRegularizer(["net.body"], "distillation", 0.1, trunk=""),
    "grassmann": lambda: [GrassmannHead(2), GrassmannMonitor(mode="exact")],
}


@pytest.mark.parametrize("name", MONITORS)
@pytest.mark.parametrize("validates", [True, False])
def test_a_module_without_a_forward_is_run_by_its_step(tmp_path, name, validates):
    cls = NoForward if validates else TrainsOnly
    made = MONITORS[name]()
    callbacks = made if isinstance(made, list) else [made]
    run = trainer(tmp_path, callbacks=callbacks, max_epochs=2)
    module = cls()
    run.fit(module, loader(), loader(16))
    assert run.global_step == (8 if name != "upsampler" else run.global_step)
    family = {"collapse": "neural_collapse", "probe": "linear_probe", "mixup": "mixup_geometry", "upsampler": "simpl"}
    logged = [
        k for k in run.callback_metrics if k.startswith(family.get(name, "grassmann" if name[0] == "g" else "feat"))
    ]
    assert logged


def test_the_start_of_a_module_without_a_forward_is_its_own(tmp_path):
    module = NoForward(lr=0.0)
    run = trainer(tmp_path, callbacks=[FeatureShiftMonitor(["net.body", "net.fc"], trunk="")])
    run.fit(module, loader(), loader(16))
    assert run.callback_metrics["feature_shift/relative/net.body"] == 0


class ByHand(NoForward):
    """Lightning does not optimize, and it does not validate: there is no step that a pass could run."""

    validation_step = test_step = pl.LightningModule.validation_step

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize("name", MONITORS)
def test_where_there_is_no_way_it_is_said_before_any_training(tmp_path, name):
    made = MONITORS[name]()
    run = trainer(tmp_path, callbacks=made if isinstance(made, list) else [made], max_epochs=3)
    with pytest.raises(ValueError, match=r"no way was found .*give forward=.*dotted path, `forward: my_package"):
        run.fit(ByHand(), loader(), loader(16))
    assert run.global_step == 0


def test_calls_that_differ_are_asked_about(tmp_path):
    class OneOrTwo(ByHand):
        def forward(self, x, shift=None):
            return self.net(x if shift is None else x + shift[:, None])

    run = trainer(tmp_path, callbacks=[NeuralCollapseMonitor(mode="exact")])
    with pytest.raises(ValueError, match=re.escape("module(inputs) and module(batch[0], batch[1]) both run")):
        run.fit(OneOrTwo(), loader())
    given = NeuralCollapseMonitor(mode="exact", forward=lambda module, batch: module(batch[0]))
    trainer(tmp_path, callbacks=[given], limit_train_batches=0).fit(OneOrTwo(), loader())


def test_a_step_that_augments_is_not_asked(tmp_path):
    class Augments(Plain):
        validation_step = test_step = pl.LightningModule.validation_step

        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0] + torch.randn(4), batch[1]), batch_idx)

    module, probe = Augments(lr=0.0), LinearProbe(penalties=[0.1], train=loader(), test=loader(16))
    heard = []
    probe._probe = lambda trainer, features: heard.append(features["test"][0]) or torch.zeros(())
    trainer(tmp_path, callbacks=[probe]).fit(module, loader())
    assert torch.equal(heard[0], module.net.body(points(16).tensors[0]).detach())


def test_a_step_that_moves_a_teacher_is_not_asked_and_the_teacher_stays(tmp_path):
    class Teaches(Plain):
        validation_step = test_step = pl.LightningModule.validation_step

        def __init__(self):
            super().__init__()
            self.teacher = nn.Linear(4, 4).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.teacher.weight += 1
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    plain = Teaches()
    torch.manual_seed(0)
    watched = Teaches()
    trainer(tmp_path).fit(plain, loader())
    trainer(tmp_path, callbacks=[NeuralCollapseMonitor(mode="exact", classifier="net.fc")]).fit(watched, loader())
    assert equal(weights(plain), weights(watched))


def test_data_of_another_task_are_run_without_the_steps(tmp_path):
    x, y = points(24).tensors
    other = DataLoader(TensorDataset(x, y + 50), 8)  # classes that the module's own loss does not know
    probe = LinearProbe(penalties=[0.1], train=other, test=other)
    trainer(tmp_path, callbacks=[probe]).fit(Plain(), loader(), loader(16))
    assert probe.result is not None


def test_a_forward_that_is_given_is_tried_at_once(tmp_path):
    def wrong(module, batch):
        raise KeyError("image")

    run = trainer(tmp_path, callbacks=[LinearProbe(forward=wrong)])
    with pytest.raises(KeyError, match="image"):
        run.fit(Plain(), loader(), loader(16))
    assert run.global_step == 0


class EvaluatesTwice(Plain):
    """One run of the network for the metrics, and another for the loss."""

    def validation_step(self, batch, batch_idx):
        self(batch[0]), super().validation_step(batch, batch_idx)


class NothingButAStep(NoForward):
    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx), self.training_step(batch, batch_idx)


def test_a_step_that_runs_the_network_twice_on_the_same_is_replaced_by_the_call_that_runs_it_once(tmp_path):
    chosen = []
    for module in (Plain(), EvaluatesTwice()):
        upsampler = SimplicityBiasUpsampler(separating_epoch=1, restart=False)
        torch.manual_seed(0)
        module.load_state_dict(Plain().state_dict())
        trainer(tmp_path, callbacks=[upsampler], max_epochs=2).fit(module, loader(), loader(16))
        chosen.append(upsampler.selection.slow)
    assert chosen[0].any()
    assert torch.equal(*chosen)


def test_several_rows_of_an_example_are_said_before_any_training(tmp_path):
    run = trainer(tmp_path, callbacks=[SimplicityBiasUpsampler(separating_epoch=1, restart=False)], max_epochs=2)
    with pytest.raises(ValueError, match="16 rows of logits came out of a pass in eval mode over 8 training examples"):
        run.fit(NothingButAStep(), loader(), loader(16))
    assert run.global_step == 0


class Unlike(Plain):
    """Trains on labels in a form of its own."""

    def training_step(self, batch, batch_idx):
        y = batch[1].argmax(1) if batch[1].ndim == 2 else batch[1]
        return cross_entropy(self(batch[0]), y, ignore_index=-1)

    validation_step = training_step


LABELS_OF = {
    "one-hot": (torch.nn.functional.one_hot(LABELS, 3), "look like one-hot labels"),
    "a marker": (LABELS.where(torch.arange(32) % 4 > 0, torch.tensor(-1)), r"-1, .*ignore_index=-1|go from -1 to 2"),
}
READERS = {name: make for name, make in MONITORS.items() if not name.startswith("shift")}
READERS |= {"probe": lambda: LinearProbe(penalties=[0.1]), "few shots": FewShotMonitor}
TAKES_A_MARKER = ("probe", "few shots")  # what is below zero has no class


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("form", LABELS_OF)
def test_labels_that_a_pass_cannot_read_are_said_before_any_training(tmp_path, name, form):
    labels, said = LABELS_OF[form]
    data = DataLoader(TensorDataset(points().tensors[0], labels), batch_size=8)
    made = READERS[name]()
    run = trainer(tmp_path, callbacks=made if isinstance(made, list) else [made], max_epochs=2)
    if form == "a marker" and name in TAKES_A_MARKER:
        run.fit(Unlike(), data, data)
        return
    with pytest.raises(ValueError, match=re.compile(said, re.DOTALL)):
        run.fit(Unlike(), data, data)
    assert run.global_step == 0


def test_what_is_tried_before_training_is_in_no_number(tmp_path):
    monitor, heard = GrassmannMonitor(mode="exact"), []

    class Looks(pl.Callback):
        def on_train_start(self, trainer, pl_module):  # an epoch resumed in its middle resets nothing
            heard.append(monitor._spread.lost(trainer)[1])

    trainer(tmp_path, callbacks=[GrassmannHead(2), monitor, Looks()]).fit(Plain(), loader(), loader(16))
    assert heard == [0.0]
