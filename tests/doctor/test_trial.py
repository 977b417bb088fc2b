"""The doctor leaves everything as it was."""

import copy
import random
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_feat.callbacks import (
    GrassmannHead,
    NeuralCollapseMonitor,
    NeuralCollapseRegularizer,
    SimplicityBiasUpsampler,
)
from lightning_feat.doctor import doctor
from tests.helpers import Plain, equal, loader, points, trainer, weights


def suite(figures=False):
    return [
        GrassmannHead(2),
        NeuralCollapseMonitor(mode="exact", figures=figures, table=figures),
        NeuralCollapseRegularizer(),
        SimplicityBiasUpsampler(1),
    ]


def fit(root, ask):
    """Weights and logged values of a run, of which the doctor was asked before or not."""
    pl.seed_everything(0, verbose=False)
    module, data = Plain(), loader(shuffle=True)
    run = trainer(root, callbacks=suite(), max_epochs=3)
    if ask:
        assert doctor(run, module, data, loader(), cost=False) == []
    run.fit(module, data, loader())
    return weights(module), {name: float(value) for name, value in run.callback_metrics.items()}


def test_a_run_is_bit_for_bit_what_it_is_without_the_doctor(tmp_path):
    (asked, values), (bare, others) = (fit(tmp_path / name, name == "asked") for name in ("asked", "bare"))
    assert equal(asked, bare)
    assert values == others


class Writes(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        (Path(trainer.default_root_dir) / "mine.txt").write_text("")


@pytest.mark.parametrize("logs", [True, False])
def test_nothing_is_written(tmp_path, monkeypatch, logs):
    monkeypatch.chdir(tmp_path)
    logger = CSVLogger(tmp_path, name="runs") if logs else False
    callbacks = [*suite(figures=True), Writes(), ModelCheckpoint(save_last=True)]
    run = trainer(tmp_path, callbacks=callbacks, max_epochs=3, logger=logger, enable_checkpointing=True)
    assert doctor(run, Plain(), loader(), loader(), cost=False) == []
    assert not [*tmp_path.iterdir()]


def test_module_trainer_callbacks_and_random_numbers_stay(tmp_path, capsys):
    callbacks = suite()
    run, module, data = trainer(tmp_path, callbacks=callbacks, max_epochs=3), Plain(), loader(shuffle=True)
    before, names = weights(module), set(vars(module))
    flags = [(part, part.training, len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()]
    kept = [copy.copy(vars(callback)) for callback in callbacks]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    assert doctor(run, module, data, loader(), cost=False) == []

    assert equal(before, weights(module))
    assert type(module.net.fc) is nn.Linear
    assert set(vars(module)) == names
    assert module._trainer is None
    assert all(p.grad is None for p in module.parameters())
    assert flags == [(p, p.training, len(p._forward_hooks), len(p._forward_pre_hooks)) for p in module.modules()]
    assert run.callbacks == callbacks
    assert [vars(callback) for callback in callbacks] == kept
    assert run.global_step == run.current_epoch == 0
    assert run.fit_loop._combined_loader is None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]
    assert capsys.readouterr().out == ""


class Drawing(Dataset):
    """Draws from generators of its own."""

    def __init__(self):
        self.rng, self.numpy, self.python = torch.Generator(), np.random.default_rng(0), random.Random(0)

    def __len__(self):
        return 32

    def __getitem__(self, index):
        scale = self.numpy.random() + self.python.random()
        return scale * torch.randn(4, generator=self.rng), index % 3

    def states(self):
        return self.rng.get_state().tolist(), self.numpy.bit_generator.state, self.python.getstate()


def test_random_numbers_of_loaders_and_data_stay(tmp_path):
    order, dataset = torch.Generator(), Drawing()
    data = DataLoader(dataset, batch_size=8, shuffle=True, generator=order)
    before, drawn = order.get_state(), dataset.states()
    assert doctor(trainer(tmp_path), Plain(), data, cost=False) == []
    assert torch.equal(order.get_state(), before)
    assert dataset.states() == drawn


class Counting(Sampler):
    times = 0

    def __iter__(self):
        self.times += 1
        return iter(range(32))

    def __len__(self):
        return 32


def test_a_sampler_is_not_asked(tmp_path):
    sampler = Counting()
    assert doctor(trainer(tmp_path), Plain(), DataLoader(points(), batch_size=8, sampler=sampler), cost=False) == []
    assert sampler.times == 0


class Data(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.calls = []

    def prepare_data(self):
        raise AssertionError("it may download")

    def setup(self, stage):
        self.calls.append(stage)
        self.train = points()

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=8)


@pytest.mark.parametrize("how", ["by position", "by name"])
def test_a_datamodule_is_not_asked_to_prepare_and_stays(tmp_path, how):
    data, run = Data(), trainer(tmp_path, callbacks=[NeuralCollapseMonitor()])
    given = {"datamodule": data} if how == "by name" else {"train_dataloaders": data}
    assert doctor(run, Plain(), **given, cost=False) == []
    assert data.calls == []
    assert not hasattr(data, "train")
    assert data.trainer is None


def test_optimizers_that_were_made_before_stay(tmp_path):
    class MadeBefore(Plain):
        def __init__(self):
            super().__init__()
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

        def configure_optimizers(self):
            return self.optimizer

    module = MadeBefore()
    assert doctor(trainer(tmp_path, callbacks=[GrassmannHead(2)]), module, loader(), cost=False) == []
    assert not module.optimizer.state
    held = module.optimizer.param_groups[0]["params"]
    assert all(a is b for a, b in zip(held, module.parameters(), strict=True))


def test_a_trainer_that_has_fitted_may_be_asked_again(tmp_path):
    run, module = trainer(tmp_path, callbacks=suite(), max_epochs=2), Plain()
    run.fit(module, loader(), loader())
    before, step = weights(module), run.global_step
    assert doctor(run, module, loader(), loader(), cost=False) == []
    assert equal(before, weights(module))
    assert run.global_step == step


def test_a_compiled_module_is_asked_as_what_it_was_made_of(tmp_path):
    module = Plain()
    compiled = torch.compile(module, backend="eager")
    assert doctor(trainer(tmp_path, callbacks=suite()[:3]), compiled, loader(), loader(), cost=False) == []
    assert compiled._orig_mod is module


def test_one_batch_is_too_few(tmp_path):
    with pytest.raises(ValueError, match="batches=1 must be at least 2"):
        doctor(trainer(tmp_path), Plain(), loader(), batches=1)


@pytest.mark.gpu
def test_it_runs_on_the_accelerator_of_the_trainer(tmp_path):
    seen = []

    class Where(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            seen.append(pl_module.device.type)

    module = Plain()
    run = trainer(tmp_path, callbacks=[*suite(), Where()], accelerator="gpu", precision="16-mixed")
    assert doctor(run, module, loader(), loader(), cost=False) == []
    assert set(seen) == {"cuda"}
    assert module.device.type == "cpu"
