"""Callbacks that want clean features of the same data in the same epoch share one run of the network."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_feat.callbacks import (
    GrassmannHead,
    GrassmannMonitor,
    LinearProbe,
    MixupGeometryMonitor,
    NeuralCollapseMonitor,
)
from tests.helpers import Plain, loader, points, trainer

MAKES = {
    "neural_collapse/": lambda **more: NeuralCollapseMonitor("net.fc", "input", mode="exact", data="both", **more),
    "neural_collapse_val/": lambda **more: NeuralCollapseMonitor("net.fc", "input", mode="exact", data="both", **more),
    "linear_probe/": lambda: LinearProbe(every_n_epochs=1, penalties=[0.01, 0.1]),
    "grassmann/": lambda: GrassmannMonitor(mode="exact"),
}


class Noisy(Dataset):
    """Augments anew each time, by both generators."""

    def __init__(self, n):
        self.data = points(n)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + 0.3 * torch.randn(4) + float(np.random.rand()), y  # noqa: NPY002


class Counts(Plain):
    """Counts outside of itself, where no pass can put it back, how often its network runs: by whether it trains."""

    def __init__(self, runs):
        super().__init__()
        self.net.body.register_forward_hook(lambda *_: runs.append((self.trainer.global_step, self.training)))


def fitted(tmp_path, *names, epochs=2, head=True, makes=MAKES, between=()):
    pl.seed_everything(0)
    runs = []
    module = Counts(runs)
    callbacks = [makes[name]() for name in names]
    run = trainer(tmp_path, callbacks=[*([GrassmannHead(2)] * head), *callbacks, *between], max_epochs=epochs)
    run.fit(module, DataLoader(Noisy(64), 8), DataLoader(Noisy(24), 8))
    return runs, {k: float(v) for k, v in run.callback_metrics.items()}


def test_together_each_has_the_numbers_it_has_alone_bit_for_bit(tmp_path):
    names = ["neural_collapse/", "linear_probe/", "grassmann/"]
    _, together = fitted(tmp_path, *names)
    for name in names:
        _, alone = fitted(tmp_path, name)
        mine = {k: v for k, v in alone.items() if k.startswith(name)}
        assert mine
        assert {k: together[k] for k in mine} == pytest.approx(mine, rel=0, abs=0, nan_ok=True)


def test_mixup_joins_with_a_head_of_one_vector_a_class(tmp_path):
    makes = {**MAKES, "mixup_geometry/": lambda: MixupGeometryMonitor(num_pairs=16)}
    names = ["linear_probe/", "mixup_geometry/", "neural_collapse_val/"]
    _, together = fitted(tmp_path, *names, head=False, makes=makes)
    for name in names:
        _, alone = fitted(tmp_path, name, head=False, makes=makes)
        mine = {k: v for k, v in alone.items() if k.startswith(name)}
        assert mine
        assert {k: together[k] for k in mine} == pytest.approx(mine, rel=0, abs=0, nan_ok=True)


def test_the_network_runs_once_for_all(tmp_path):
    after_training = 8, False
    bare, _ = fitted(tmp_path, epochs=1)
    runs, _ = fitted(tmp_path, "neural_collapse/", "linear_probe/", "grassmann/", epochs=1)
    assert runs.count(after_training) - bare.count(after_training) == 8 + 3  # batches of training and validation data


def test_a_second_run_is_only_of_those_that_ask_for_it(tmp_path):
    makes = {**MAKES, "neural_collapse/": lambda: MAKES["neural_collapse/"](memory_budget_mb=0.0)}
    names = ["linear_probe/", "neural_collapse/"]
    _, together = fitted(tmp_path, *names, makes=makes)
    _, alone = fitted(tmp_path, "neural_collapse/", makes=makes)
    mine = {k: v for k, v in alone.items() if k.startswith("neural_collapse")}
    assert {k: together[k] for k in mine} == pytest.approx(mine, rel=0, abs=0, nan_ok=True)


class Moves(pl.Callback):
    """Changes a weight at the end of an epoch, as averaging callbacks do."""

    def on_train_epoch_end(self, trainer, module):
        module.net.body[0].weight.data.mul_(0.5)


def test_after_a_weight_has_changed_the_network_runs_again(tmp_path):
    first, last = (lambda: LinearProbe(every_n_epochs=1, penalties=[0.1])), MAKES["neural_collapse/"]
    values = []
    for callbacks in ([first(), Moves(), last()], [Moves(), last()]):
        pl.seed_everything(0)
        run = trainer(tmp_path, callbacks=callbacks)
        run.fit(Plain(), loader(64), loader(24))
        values.append({k: float(v) for k, v in run.callback_metrics.items() if k.startswith("neural_collapse/")})
    assert values[0] == pytest.approx(values[1], rel=0, abs=0, nan_ok=True)


def test_another_forward_is_another_run(tmp_path):
    def doubled(module, batch):
        return module(2 * batch[0])

    makes = {
        **MAKES,
        "linear_probe/": lambda: LinearProbe(every_n_epochs=1, penalties=[0.1], forward=doubled),
    }
    _, together = fitted(tmp_path, "neural_collapse/", "linear_probe/", makes=makes)
    _, alone = fitted(tmp_path, "linear_probe/", makes=makes)
    assert together["linear_probe/accuracy/penultimate"] == alone["linear_probe/accuracy/penultimate"]
