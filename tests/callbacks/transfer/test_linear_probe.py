import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_feat.callbacks import LinearProbe
from lightning_feat.functional.transfer.probe import hold_out, linear_probe
from tests.helpers import Plain, equal, loader, points, trainer, weights

PENALTIES = (1e-3, 1e-1)


def seeded(cls=Plain, seed=0, **kwargs):
    pl.seed_everything(seed)
    return cls(**kwargs)


def fit(tmp_path, module, *callbacks, data=None, val=True, **kwargs):
    run = trainer(tmp_path, callbacks=list(callbacks), **kwargs)
    run.fit(module, loader(64, shuffle=True) if data is None else data, loader(24) if val else None)
    return run


def of(data, module):
    with torch.no_grad():
        return module.net.body(data.tensors[0]), data.tensors[1]


def other(seed, shift=0):
    x, y = points(40, seed).tensors
    return TensorDataset(x, y + shift)


def test_own_loaders_are_probed_at_the_weights_of_the_end(tmp_path):
    parts = [other(seed, shift=7) for seed in (1, 2, 3)]  # classes 7, 8 and 9
    loaders = dict(zip(("train", "val", "test"), (DataLoader(part, 16, shuffle=True) for part in parts), strict=True))
    probe = LinearProbe(layer="net.body", name="other", penalties=PENALTIES, **loaders)
    module = seeded()
    run = fit(tmp_path, module, probe)
    expected = linear_probe(*(entry for part in parts for entry in of(part, module)), penalties=PENALTIES)
    assert probe.result.val_accuracies.equal(expected.val_accuracies)
    assert run.callback_metrics["linear_probe_other/accuracy/net.body"] == expected.accuracy.float()


def test_without_loaders_the_run_is_probed_and_a_fifth_of_its_training_data_held_out(tmp_path):
    probe, module = LinearProbe(penalties=PENALTIES), seeded()
    run = fit(tmp_path, module, probe)
    (h, t), final = of(points(64), module), of(points(24), module)
    held = hold_out(t)
    expected = linear_probe(h[~held], t[~held], h[held], t[held], *final, penalties=PENALTIES)
    assert run.callback_metrics["linear_probe/accuracy/penultimate"] == expected.accuracy.float()


class Other(pl.LightningDataModule):
    def setup(self, stage):
        torch.rand(3)  # must not move the random numbers of the run
        self.parts = [other(seed) for seed in (1, 2, 3)]

    def train_dataloader(self):
        return DataLoader(self.parts[0], 16)

    def val_dataloader(self):
        return DataLoader(self.parts[1], 16)

    def test_dataloader(self):
        return DataLoader(self.parts[2], 16)


def test_a_datamodule_of_its_own(tmp_path):
    data, module = Other(), seeded()
    probe = LinearProbe(layer="net.body", data=data, penalties=PENALTIES)
    fit(tmp_path, module, probe, val=False)
    expected = linear_probe(*(entry for part in data.parts for entry in of(part, module)), penalties=PENALTIES)
    assert probe.result.val_accuracies.equal(expected.val_accuracies)
    assert probe.result.accuracy.equal(expected.accuracy)


@pytest.mark.parametrize("data", [None, Other()])
def test_the_training_is_bit_for_bit_what_it_is_without_the_probe(tmp_path, data):
    class Drops(Plain):
        def __init__(self):
            super().__init__()
            self.net.body.append(torch.nn.Dropout(0.3))
            self.net.body.append(torch.nn.BatchNorm1d(8))

    plain, probed = seeded(Drops), seeded(Drops)
    torch.manual_seed(1)
    fit(tmp_path, plain, max_epochs=3)
    torch.manual_seed(1)
    fit(tmp_path, probed, LinearProbe(every_n_epochs=1, data=data, penalties=PENALTIES), max_epochs=3)
    assert equal(weights(plain), weights(probed))
    assert all(a.equal(b) for a, b in zip(plain.buffers(), probed.buffers(), strict=True))
    assert not probed.net.fc._forward_pre_hooks


@pytest.mark.parametrize(
    ("every", "kwargs", "expected"),
    [
        (None, {"max_epochs": 4}, [3]),
        (3, {"max_epochs": 4}, [2, 3]),
        (None, {"max_epochs": 9, "max_steps": 20}, [2]),  # 8 batches an epoch
    ],
)
def test_the_epochs_of_probes(tmp_path, every, kwargs, expected):
    epochs = []

    class Watched(LinearProbe):
        def _probe(self, trainer, features):
            epochs.append(trainer.current_epoch)
            return super()._probe(trainer, features)

    fit(tmp_path, seeded(), Watched(every_n_epochs=every, penalties=PENALTIES), **kwargs)
    assert epochs == expected


def test_a_stopped_run_is_probed_in_its_last_epoch(tmp_path):
    class Stops(Plain):
        def validation_step(self, batch, batch_idx):
            self.trainer.should_stop = self.current_epoch == 1

    run = fit(tmp_path, seeded(Stops), LinearProbe(penalties=PENALTIES), max_epochs=5)
    assert "linear_probe/accuracy/penultimate" in run.callback_metrics


def test_ignored_targets_are_left_out(tmp_path):
    parts = [other(seed) for seed in (1, 2, 3)]
    for part in parts:
        part.tensors[1][::4] = -1
    loaders = dict(zip(("train", "val", "test"), (DataLoader(part, 16) for part in parts), strict=True))
    probe, module = LinearProbe(penalties=PENALTIES, ignore_index=-1, **loaders), seeded()
    fit(tmp_path, module, probe)
    kept = [entry[part.tensors[1] >= 0] for part in parts for entry in of(part, module)]
    assert probe.result.val_accuracies.equal(linear_probe(*kept, penalties=PENALTIES).val_accuracies)


def test_a_diverged_run_goes_on_with_nan(tmp_path):
    class Diverges(Plain):
        def on_train_epoch_end(self):
            self.net.body[0].weight.data.fill_(torch.nan)

    probe = LinearProbe(every_n_epochs=1)
    said = r"100.0% of the features of layer .* in epoch 1 were NaN or inf; the accuracy is nan"
    with pytest.warns(UserWarning, match=said):
        run = fit(tmp_path, seeded(Diverges), probe, max_epochs=3)
    assert run.current_epoch == 3
    assert run.callback_metrics["linear_probe/accuracy/penultimate"].isnan()


class Stream(IterableDataset):
    def __iter__(self):
        yield from points(32)


@pytest.mark.parametrize(
    ("kwargs", "data", "val", "text"),
    [
        ({"layer": "net.bodi"}, None, True, "has no layer 'net.bodi'. Nearest: net.body"),
        ({}, None, False, "nothing to look at: the run has no validation data"),
        ({}, DataLoader(Stream(), 8), True, "a pass over the train data needs one DataLoader over a map-style"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_batch(tmp_path, kwargs, data, val, text):
    class Never(Plain):
        def training_step(self, batch, batch_idx):
            raise AssertionError("too late")

    with pytest.raises(ValueError, match=text):
        fit(tmp_path, seeded(Never), LinearProbe(**kwargs), data=data, val=val)


def test_impossible_arguments_are_refused_at_once():
    with pytest.raises(ValueError, match="every_n_epochs=0 must be at least 1"):
        LinearProbe(every_n_epochs=0)
    with pytest.raises(ValueError, match="give both, or none at all"):
        LinearProbe(train=loader())
    with pytest.raises(ValueError, match="data and loaders are given"):
        LinearProbe(data=Other(), train=loader(), test=loader())


def test_the_same_probe_twice_is_refused_and_of_two_data_sets_welcome(tmp_path):
    with pytest.raises(ValueError, match=r"the Trainer has LinearProbe\[penultimate\] twice"):
        fit(tmp_path, seeded(), LinearProbe(), LinearProbe())
    two = LinearProbe(penalties=PENALTIES), LinearProbe(name="b", penalties=PENALTIES)
    run = fit(tmp_path, seeded(), *two)
    assert run.callback_metrics.keys() >= {
        "linear_probe/accuracy/penultimate",
        "linear_probe_b/accuracy/penultimate",
    }
