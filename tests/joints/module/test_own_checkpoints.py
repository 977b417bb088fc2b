"""What a callback brings along is averaged, saved, validated and resumed as the module's own weights are."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_feat.callbacks import FeatureRegularizer, NeuralCollapseRegularizer
from tests.helpers import EMAWeightAveraging, Plain, equal, loader, trainer, weights

needs_ema = pytest.mark.skipif(EMAWeightAveraging is None, reason="this Lightning has no averaging of its own")


class Center(nn.Module):
    """A loss with a parameter; the last one that was made is known to ``Watching``."""

    last = None

    def __init__(self):
        super().__init__()
        self.center = nn.Parameter(torch.ones(8))
        Center.last = self

    def forward(self, features):
        return (features - self.center).square().mean()


class Watching(Plain):
    """Validation depends on the parameter that a callback brings; and the optimizer has momentum."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", (self.net.body(batch[0]) - Center.last.center).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


def averaging(kind):
    return EMAWeightAveraging(decay=0.8) if kind == "EMA" else StochasticWeightAveraging(0.1, swa_epoch_start=1)


def center():
    return FeatureRegularizer(Center(), "center")


def fit(tmp_path, *callbacks, epochs, checkpoint=None, keep=None):
    pl.seed_everything(0, verbose=False)
    module = Watching()
    saving = [ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, enable_version_counter=False)] if keep else []
    run = trainer(tmp_path, callbacks=[*callbacks, *saving], max_epochs=epochs, enable_checkpointing=bool(keep))
    run.fit(module, loader(), loader(), ckpt_path=checkpoint)
    return run, module


@needs_ema
def test_the_checkpoint_of_an_ema_holds_its_average_of_own_parameters(tmp_path):
    values = []

    class Average(pl.Callback):
        def on_train_batch_end(self, *_):
            now = Center.last.center.detach().clone()
            values.append(now if not values else 0.8 * values[-1] + 0.2 * now)

    fit(tmp_path, center(), averaging("EMA"), Average(), epochs=1)
    torch.testing.assert_close(Center.last.center.detach(), values[-1])  # at the end the average is what stays
    values.clear()
    fit(tmp_path, center(), averaging("EMA"), Average(), epochs=2, keep=True)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["lightning_feat_own_parameters"]
    torch.testing.assert_close(saved["modules"]["center@penultimate"]["center"], values[3])


@needs_ema
def test_each_checkpoint_validates_at_the_value_that_chose_it(tmp_path):
    seen = []

    class Keep(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(float(trainer.callback_metrics["val/loss"]))

    fit(tmp_path, center(), averaging("EMA"), Keep(), epochs=3, keep=True)
    assert len(set(seen)) == 3
    for epoch, value in enumerate(list(seen)):
        again = trainer(tmp_path, callbacks=[center()])
        found = again.validate(Watching(), loader(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", verbose=False)
        assert found[0]["val/loss"] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("kind", [pytest.param("EMA", marks=needs_ema), "SWA"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path, kind):
    def ends(**options):
        term = center()
        _, module = fit(tmp_path, term, averaging(kind), epochs=4, **options)
        return [*weights(module), term.term.parameters.center.detach().clone()]

    whole = ends(keep=True)
    for epoch in (1, 2):
        assert equal(ends(checkpoint=tmp_path / f"epoch={epoch}.ckpt"), whole)


@needs_ema
def test_the_average_of_a_checkpoint_is_where_a_run_without_averaging_goes_on(tmp_path):
    fit(tmp_path, center(), averaging("EMA"), epochs=1, keep=True)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["lightning_feat_own_parameters"]

    class Stop(pl.Callback):
        def on_train_start(self, *_):
            self.center = Center.last.center.detach().clone()

    without, plain = Stop(), Stop()
    fit(tmp_path, center(), without, epochs=2, checkpoint=tmp_path / "epoch=0.ckpt")
    assert torch.equal(without.center, saved["modules"]["center@penultimate"]["center"])
    fit(tmp_path, center(), plain, averaging("EMA"), epochs=2, checkpoint=tmp_path / "epoch=0.ckpt")
    assert torch.equal(plain.center, saved["current"]["center@penultimate"]["center"])


@pytest.mark.parametrize("kind", [pytest.param("EMA", marks=needs_ema), "SWA"])
@pytest.mark.parametrize("brings", [center, NeuralCollapseRegularizer])
def test_an_averaging_callback_before_own_parameters_is_refused(tmp_path, kind, brings):
    module = Watching()
    with pytest.raises(ValueError, match=r"stands before .* put .*Regularizer before"):
        trainer(tmp_path, callbacks=[averaging(kind), brings()]).fit(module, loader())
    assert not [name for name in (*vars(module), *module._modules) if "_feat" in name]


class LateLayers(Plain):
    """Says in ``setup`` that layers may come, so that means whose number must be asked for come late."""

    def setup(self, stage):
        pass


def test_a_copy_that_was_made_before_own_parameters_came_is_refused(tmp_path):
    run = trainer(tmp_path, callbacks=[NeuralCollapseRegularizer(), averaging("SWA")], max_epochs=2)
    with pytest.raises(ValueError, match="StochasticWeightAveraging has copied the module before"):
        run.fit(LateLayers(), loader())
    known = NeuralCollapseRegularizer(num_classes=3, num_features=8)
    trainer(tmp_path, callbacks=[known, averaging("SWA")], max_epochs=2).fit(LateLayers(), loader())


class Tuned(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.classifier = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.classifier(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def tune(tmp_path, *callbacks, epochs, checkpoint=None, save=None):
    pl.seed_everything(0, verbose=False)
    run, module = trainer(tmp_path, callbacks=[*callbacks], max_epochs=epochs), Tuned()
    run.fit(module, loader(), ckpt_path=checkpoint, weights_only=False if checkpoint else None)
    if save:
        run.save_checkpoint(save)
    return run, module


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("saved_in", [1, 3])  # before and after the backbone joins the optimizer, in epoch 2
@pytest.mark.parametrize(("before", "after"), [(True, True), (False, True), (True, False)])
def test_beside_fine_tuning_own_parameters_are_trained_at_the_rate_of_the_head(
    tmp_path, saved_in, before, after, ours_first
):
    def callbacks(with_ours):
        both = [center()] if with_ours else []
        both.insert(len(both) if ours_first else 0, BackboneFinetuning(2, backbone_initial_ratio_lr=0.01))
        return both

    path = tmp_path / "half.ckpt"
    tune(tmp_path, *callbacks(before), epochs=saved_in, save=path)
    run, module = tune(tmp_path, *callbacks(after), epochs=5, checkpoint=path)
    if after:
        brought = Center.last.center
        assert any(brought is p for p in run.optimizers[0].param_groups[0]["params"])
        assert (brought - 1).abs().max() > 0.05
    if before and after and saved_in == 1:  # later Lightning itself forgets what it had thawed
        one, whole = tune(tmp_path, *callbacks(True), epochs=5)
        assert equal(weights(whole), weights(module))
        assert torch.equal(brought, Center.last.center)
        assert len(one.optimizers[0].param_groups) == len(run.optimizers[0].param_groups)


def test_groups_that_somebody_makes_anew_get_own_parameters_back(tmp_path):
    class NewGroups(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            (optimizer,) = trainer.optimizers
            optimizer.param_groups = [{**optimizer.param_groups[0], "params": [*pl_module.classifier.parameters()]}]

    run, _ = tune(tmp_path, center(), NewGroups(), epochs=1)
    assert sum(p is Center.last.center for p in run.optimizers[0].param_groups[0]["params"]) == 1
