"""A term in the loss equals the same term written by hand, whatever stands between the loss and the step."""

import copy
import itertools

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from lightning_feat.callbacks import FeatureRegularizer, NeuralCollapseRegularizer
from lightning_feat.joints.loss.engine import waiting_loss_terms
from lightning_feat.joints.loss.terms import WeightSchedule
from lightning_feat.mixins import LossTermsMixin
from tests.helpers import DictBatches, EMAWeightAveraging, Plain, equal, loader, points, trainer, weights


def spread(features, targets):
    return (features - features.mean(0)).square().sum(1)[targets > 0].mean()


def norm(features):
    return features.square().sum(1).mean()


class ByHand(Plain):
    """The term written into the module, as its author would."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.net.body(x)
        loss = cross_entropy(self.net.fc(features), y)
        with torch.autocast("cpu", enabled=False):
            loss = loss + 0.3 * spread(features.float(), y)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None


class Pull(nn.Module):
    """A loss with a parameter, whose gradient is 3 in every optimizer step if nothing rescales it."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(1))

    def forward(self, features):
        return 3 * self.p.sum() + 0 * features.sum()


class Watch(pl.Callback):
    def __init__(self, parameter):
        self.parameter, self.seen = parameter, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(None if self.parameter.grad is None else float(self.parameter.grad))


def fitted(tmp_path, module, *callbacks, data=None, **kwargs):
    pl.seed_everything(0)
    module.load_state_dict(Plain().state_dict())
    run = trainer(tmp_path, callbacks=list(callbacks), **kwargs)
    run.fit(module, loader(shuffle=True) if data is None else data)
    return weights(module), run


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(("accumulate", "manual"), [(1, False), (3, False), (1, True)])
def test_it_equals_the_loss_written_by_hand(tmp_path, precision, accumulate, manual):
    plugin = {} if precision == "32-true" else {"plugins": [MixedPrecision(precision, "cpu")]}
    kwargs = {"accumulate_grad_batches": accumulate, "max_epochs": 2, **plugin}
    term = FeatureRegularizer(spread, "spread", weight=0.3)
    ours, _ = fitted(tmp_path, Plain(manual=manual), term, **kwargs)
    by_hand, _ = fitted(tmp_path, ByHand(manual=manual), **kwargs)
    without, _ = fitted(tmp_path, Plain(manual=manual), **kwargs)
    assert equal(ours, by_hand)
    assert not equal(ours, without)


@pytest.mark.parametrize(("returns", "expected"), [("dict", [3.0] * 4), ("none", [3.0, None, 3.0, None])])
def test_forms_of_what_training_step_returns(tmp_path, returns, expected):
    pull = Pull()
    watch = Watch(pull.p)
    fitted(tmp_path, Plain(returns, lr=0.0), FeatureRegularizer(pull, "pull"), watch)
    assert watch.seen == expected


def test_two_terms_share_one_wrap_and_add_up(tmp_path):
    first, second = Pull(), Pull()
    watch = Watch(first.p)
    fitted(tmp_path, Plain(lr=0.0), FeatureRegularizer(first, "a"), FeatureRegularizer(second, "b", weight=2.0), watch)
    assert watch.seen == [3.0] * 4
    assert float(second.p.grad) == 6.0


def test_batches_of_another_form(tmp_path):
    class FromDict(Plain):
        def training_step(self, batch):
            return cross_entropy(self(batch["image"]), batch["label"])

    term = FeatureRegularizer(spread, "spread", weight=0.3)
    ours, _ = fitted(tmp_path, FromDict(), term, data=DataLoader(DictBatches(points()), batch_size=8))
    by_hand, _ = fitted(tmp_path, ByHand(), data=loader())
    assert equal(ours, by_hand)


def test_targets_to_be_ignored_are_left_out(tmp_path):
    seen = []

    def record(features, targets):
        seen.append(targets)
        return features.sum()

    fitted(tmp_path, Plain(), FeatureRegularizer(record, "record", ignore_index=1), data=loader())
    assert torch.equal(torch.cat(seen), (y := points().tensors[1])[y != 1])


def test_per_token_targets(tmp_path):
    class Tokens(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            tokens = self.net.body(x.unflatten(0, (4, 2)))  # (4, 2, D)
            return cross_entropy(self.net.fc(tokens).flatten(0, 1), y)

    term = FeatureRegularizer(spread, "spread", weight=0.3, layer="net.body", pooling="tokens")
    ours, _ = fitted(tmp_path, Tokens(), term)
    by_hand, _ = fitted(tmp_path, ByHand())
    for a, b in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(a, b)


def test_value_and_share_are_logged(tmp_path):
    class Constant(Plain):
        def training_step(self, batch, batch_idx):
            return 3.0 + 0.0 * super().training_step(batch, batch_idx)

    _, run = fitted(tmp_path, Constant(lr=0.0), FeatureRegularizer(lambda h: 2.0 + 0 * h.sum(), "two", weight=0.5))
    assert run.callback_metrics["two/loss/penultimate"] == 2.0
    assert run.callback_metrics["two/share/penultimate"] == 0.25


def test_weight_schedule():
    schedule = WeightSchedule(2.0, warmup_epochs=2, start_epoch=1, end_epoch=4)
    assert [schedule.at(epoch, 4, 5) for epoch in range(5)] == [0.0, 1.0, 2.0, 2.0, 0.0]
    assert schedule.at(1, 0, 5) == pytest.approx(0.2)
    assert [WeightSchedule(1.0, every_n_batches=3).at(0, i) for i in range(4)] == [1.0, 0.0, 0.0, 1.0]
    for wrong in ({"peak": float("nan")}, {"every_n_batches": 0}, {"start_epoch": 2, "end_epoch": 2}):
        with pytest.raises(ValueError):
            WeightSchedule(**wrong)


def test_a_scheduled_term_is_not_computed_when_it_is_not_due(tmp_path):
    calls = []
    weight = WeightSchedule(1.0, start_epoch=1, every_n_batches=2)
    term = FeatureRegularizer(lambda h: calls.append(0) or h.sum(), "sum", weight=weight)
    fitted(tmp_path, Plain(lr=0.0), term, max_epochs=2)
    assert len(calls) == 2  # batches 0 and 2 of the second of two epochs


class BareBackward(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        cross_entropy(self(x), y).backward()
        optimizer.step()


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.cycle(points(8))


@pytest.mark.parametrize("when", [{"warmup_epochs": 0.1}, {"start_epoch": 1}, {"end_epoch": 2}])
def test_a_schedule_in_epochs_needs_to_know_how_long_one_is(tmp_path, when):
    def fit(**kwargs):
        term = FeatureRegularizer(norm, "norm", WeightSchedule(0.1, **when))
        run = trainer(tmp_path, callbacks=[term], **kwargs)
        run.fit(Plain(), DataLoader(Endless(), batch_size=4))
        return run

    said = f"the weight of norm@penultimate goes by epochs .{next(iter(when))}="
    with pytest.raises(ValueError, match=f"{said}.* has only one: say it by Trainer.limit_train_batches"):
        fit(max_epochs=-1, max_steps=3)
    with pytest.warns(UserWarning, match=f"{said}.* it stays within an epoch what it is at its beginning"):
        fit(max_epochs=2, max_steps=3)
    run = fit(max_epochs=-1, max_steps=5, limit_train_batches=2)
    assert run.callback_metrics["norm/loss/penultimate"] > 0


def test_a_weight_that_stays_needs_no_epochs(tmp_path):
    term = FeatureRegularizer(norm, "norm", WeightSchedule(0.1, every_n_batches=2))
    run = trainer(tmp_path, callbacks=[term], max_epochs=-1, max_steps=3)
    run.fit(Plain(), DataLoader(Endless(), batch_size=4))
    assert run.callback_metrics["norm/loss/penultimate"] > 0


def test_a_bare_backward_is_refused_and_the_mixin_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"norm@penultimate never reached a loss.*LossTermsMixin"):
        fitted(tmp_path, BareBackward(manual=True), FeatureRegularizer(norm, "norm"))


def test_the_mixin_takes_the_terms_into_a_bare_backward(tmp_path):
    class Mine(LossTermsMixin, Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            optimizer = self.optimizers()
            optimizer.zero_grad()
            (cross_entropy(self(x), y) + self.loss_terms()).backward()
            optimizer.step()

    ours, _ = fitted(tmp_path, Mine(manual=True), FeatureRegularizer(spread, "spread", weight=0.3))
    by_hand, _ = fitted(tmp_path, ByHand(manual=True))
    assert equal(ours, by_hand)
    assert waiting_loss_terms(Plain()) == 0


def test_the_mixin_adds_nothing_twice_in_automatic_optimization(tmp_path):
    class Mine(LossTermsMixin, Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.loss_terms()

    ours, _ = fitted(tmp_path, Mine(), FeatureRegularizer(spread, "spread", weight=0.3))
    by_hand, _ = fitted(tmp_path, ByHand())
    assert equal(ours, by_hand)


def test_backward_index_picks_the_backward_to_join(tmp_path):
    losses = []

    class Two(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            for _ in range(2):
                self.optimizers().zero_grad()
                self.manual_backward(cross_entropy(self(x), y))
                self.optimizers().step()

        def backward(self, loss):
            losses.append(loss.item())
            loss.backward()

    term = FeatureRegularizer(lambda h: 100.0 + 0 * h.sum(), "big", backward_index=1)
    fitted(tmp_path, Two(manual=True, lr=0.0), term, limit_train_batches=1)
    assert losses[1] == pytest.approx(losses[0] + 100.0)


def test_a_closure_that_runs_twice_meets_the_term_twice(tmp_path):
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            return super().step(closure)

    class Sam(Plain):
        def configure_optimizers(self):
            return Twice(self.parameters(), lr=self.lr)

    pull = Pull()
    watch = Watch(pull.p)
    fitted(tmp_path, Sam(lr=0.0), FeatureRegularizer(pull, "pull"), watch)
    assert watch.seen == [3.0] * 8


@pytest.mark.parametrize("style", ["module", "in place", "submodule"])
def test_compiled_modules(tmp_path, style):
    start = Plain().state_dict()
    module, by_hand = Plain(), ByHand()
    for fresh in (module, by_hand):
        fresh.load_state_dict(start)
    if style == "module":
        compiled = torch.compile(module, backend="eager")
    elif style == "in place":
        compiled = module
        module.compile(backend="eager")
    else:
        compiled = module
        module.net = torch.compile(module.net, backend="eager")
    trainer(tmp_path, callbacks=[FeatureRegularizer(spread, "spread", weight=0.3)]).fit(compiled, loader())
    trainer(tmp_path).fit(by_hand, loader())
    for a, b in zip(weights(module), weights(by_hand), strict=True):
        torch.testing.assert_close(a, b)


def test_fit_again_and_after_a_crash_adds_the_term_once(tmp_path):
    class Boom(pl.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("boom")

    module, pull = Plain(lr=0.0), Pull()
    term, watch = FeatureRegularizer(pull, "pull"), Watch(pull.p)
    with pytest.raises(RuntimeError, match="boom"):
        trainer(tmp_path, callbacks=[term, Boom()]).fit(module, loader())
    assert not any(name.startswith(("_feat", "training_step")) for name in module.__dict__)
    for _ in range(2):
        trainer(tmp_path, callbacks=[term, watch]).fit(module, loader())
        trainer(tmp_path, callbacks=[term]).validate(module, loader(), verbose=False)
    assert watch.seen == [3.0] * 8
    assert not module.net.fc._forward_pre_hooks
    assert "training_step" not in module.__dict__


def test_the_learning_rate_finder_trains_with_the_term(tmp_path):
    calls = []
    term = FeatureRegularizer(lambda h: calls.append(0) or h.sum(), "sum")
    module = Plain()
    run = trainer(tmp_path, callbacks=[term])
    Tuner(run).lr_find(module, loader(64), num_training=4, update_attr=False)
    assert len(calls) >= 4


@pytest.mark.skipif(EMAWeightAveraging is None, reason="this Lightning has no averaging of its own")
def test_an_averaged_copy_calls_its_own_network(tmp_path):
    average, term = EMAWeightAveraging(), FeatureRegularizer(norm, "norm")
    module = Plain()
    trainer(tmp_path, callbacks=[term, average], max_epochs=2).fit(module, loader(), loader())
    twin = copy.deepcopy(module)
    assert "training_step" not in twin.__dict__


def test_two_terms_of_one_name_on_one_layer_are_refused_and_on_two_layers_welcome(tmp_path):
    with pytest.raises(ValueError, match="two loss terms 'norm' on layer 'penultimate'"):
        fitted(tmp_path, Plain(), FeatureRegularizer(norm, "norm"), FeatureRegularizer(norm, "norm"))
    _, run = fitted(
        tmp_path, Plain(), FeatureRegularizer(norm, "norm"), FeatureRegularizer(norm, "norm", layer="net.body.0")
    )
    assert {"norm/loss/penultimate", "norm/loss/net.body.0"} <= set(run.callback_metrics)


def test_a_loss_of_the_wrong_form_is_refused():
    with pytest.raises(ValueError, match="needs 3 arguments"):
        FeatureRegularizer(lambda a, b, c: a, "three")


class Peeking(Plain):
    """Runs the network once more without a gradient, as for a consistency target."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self(batch[0] + 10)
        return super().training_step(batch, batch_idx)


def test_a_forward_without_gradient_is_not_heard(tmp_path):
    def trained(cls):
        torch.manual_seed(0)
        module = cls()
        callback = FeatureRegularizer(lambda h: h.square().mean(), name="size", weight=5.0)
        trainer(tmp_path, callbacks=[callback]).fit(module, loader(16))
        return weights(module)

    assert equal(trained(Peeking), trained(Plain))


class Second(Plain):
    """Its network is trained by the second of two optimizers, by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        first.zero_grad()
        self.manual_backward(self.other(batch[0]).square().mean())
        first.step()
        second.zero_grad()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        second.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.other.parameters(), lr=0.1), torch.optim.SGD(self.net.parameters(), lr=0.1)]


class Centre(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.centre = torch.nn.Parameter(torch.zeros(8))

    def forward(self, features):
        return (features - self.centre).square().mean()


def test_own_parameters_join_the_optimizer_that_trains_their_layer(tmp_path):
    centre = Centre()
    callback = FeatureRegularizer(centre, name="centre", backward_index=1)
    trainer(tmp_path, callbacks=[callback]).fit(Second(), loader(32))
    assert centre.centre.norm() > 0.01


def test_a_validation_by_the_training_step_adds_nothing(tmp_path):
    class Validates(Plain):
        def validation_step(self, batch, batch_idx):
            self.log("val", self.training_step(batch, batch_idx))

    module = Validates(lr=0.0)
    term = FeatureRegularizer(lambda h: 100 + h.sum() * 0, "far", layer="net.body")
    run = trainer(tmp_path, callbacks=[term])
    run.fit(module, loader(), loader(16))
    assert run.callback_metrics["val"] < 100


class AccumulatesByHand(Plain):
    """Accumulates two batches, as Lightning does by ``accumulate_grad_batches=2``."""

    def __init__(self, factor):
        super().__init__(manual=True)
        if factor is not None:
            self.loss_terms_factor = factor

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(torch.nn.functional.cross_entropy(self(batch[0]), batch[1]) / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("make", [lambda: FeatureRegularizer(norm, "norm"), NeuralCollapseRegularizer])
def test_a_module_that_accumulates_by_hand_says_by_what_it_divides(tmp_path, make):
    def end(module, **options):
        torch.manual_seed(0)
        module = module()
        trainer(tmp_path, callbacks=[make()], **options).fit(module, loader())
        return weights(module)

    expected = end(Plain, accumulate_grad_batches=2)
    for found, there in zip(end(lambda: AccumulatesByHand(0.5)), expected, strict=True):
        torch.testing.assert_close(found, there)
    assert not equal(end(lambda: AccumulatesByHand(None)), expected)
    with pytest.raises(ValueError, match="loss_terms_factor='half' of AccumulatesByHand"):
        end(lambda: AccumulatesByHand("half"))
