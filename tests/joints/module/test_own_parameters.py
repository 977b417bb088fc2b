"""Checkpoints with and without a callback that brings parameters along can be exchanged."""

import itertools

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_feat.callbacks import FeatureRegularizer
from tests.helpers import Plain, equal, loader, trainer, weights


class Center(nn.Module):
    def __init__(self):
        super().__init__()
        self.center = nn.Parameter(torch.zeros(8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, features):
        self.steps += 1
        return (features - self.center).square().mean()


class TwoGroups(Plain):
    """Builds decay and no-decay groups from names, as many do; ``every`` decides whether it collects what we bring."""

    def __init__(self, every=True):
        super().__init__()
        self.every = every

    def configure_optimizers(self):
        named = [p for n, p in self.named_parameters() if self.every or n.startswith("net.")]
        groups = [
            {"params": [p for p in named if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in named if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.05)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.9**s)}


def run(tmp_path, suite, epochs, checkpoint=None, every=True):
    pl.seed_everything(0)
    module, center = TwoGroups(every), Center()
    callbacks = [FeatureRegularizer(center, "center", weight=0.5)] if suite else []
    fit = trainer(tmp_path, callbacks=callbacks, max_epochs=epochs)
    fit.fit(module, loader(), ckpt_path=checkpoint)
    return fit, module, center


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize(("saved_with", "resumed_with"), list(itertools.product([True, False], repeat=2)))
def test_any_checkpoint_resumes_any_run(tmp_path, saved_with, resumed_with, every):
    path = tmp_path / "half.ckpt"
    fit, module, _ = run(tmp_path, saved_with, 2, every=every)
    fit.save_checkpoint(path)
    assert not any("_feat" in key for key in torch.load(path, weights_only=True)["state_dict"])
    _, resumed, resumed_center = run(tmp_path, resumed_with, 4, path, every)
    if saved_with == resumed_with:  # then it is bit for bit the run that was never stopped
        _, whole, whole_center = run(tmp_path, saved_with, 4, every=every)
        assert equal(weights(resumed), weights(whole))
        assert torch.equal(resumed_center.center, whole_center.center)
        assert torch.equal(resumed_center.steps, whole_center.steps)
    if resumed_with:
        assert resumed_center.center.abs().sum() > 0
    plain = TwoGroups.load_from_checkpoint(path)
    assert equal(weights(plain), weights(module))


def test_the_users_groups_keep_their_number_and_name(tmp_path):
    def columns(callbacks):
        pl.seed_everything(0)
        logger = CSVLogger(tmp_path)
        fit = trainer(tmp_path, callbacks=[*callbacks, LearningRateMonitor()], logger=logger, log_every_n_steps=1)
        fit.fit(TwoGroups(every=False), loader())
        return {key for row in logger.experiment.metrics for key in row if key.startswith("lr")}, fit.optimizers[0]

    plain, _ = columns([])
    center = Center()
    suite, optimizer = columns([FeatureRegularizer(center, "center")])
    assert suite == plain
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 3]
    assert any(p is center.center for p in optimizer.param_groups[-1]["params"])


def test_after_the_fit_the_module_has_no_trace_of_it(tmp_path):
    _, module, _ = run(tmp_path, True, 1)
    assert [name for name, _ in module.named_children()] == ["net"]
    assert not module._state_dict_hooks
    assert not module._load_state_dict_pre_hooks


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_flatten_or_offload_are_refused_with_the_way_out(tmp_path, name):
    callback = FeatureRegularizer(Center(), "center", weight=0.5)
    fit = trainer(tmp_path, callbacks=[callback], strategy=type(name, (SingleDeviceStrategy,), {})("cpu"))
    module = TwoGroups()
    with pytest.raises(ValueError, match=f"{name} flattens or offloads .* use strategy='ddp', or FSDP2"):
        fit.fit(module, loader())
    assert not [key for key in vars(module) if "_feat" in key]
    assert not [key for key in module._modules if "_feat" in key]
