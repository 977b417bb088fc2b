import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks import DotRegressionRegularizer, SimplexETFHead
from lightning_feat.functional.neural_collapse.losses import balanced_lengths, dot_regression
from lightning_feat.joints.loss.terms import WeightSchedule
from lightning_feat.layers import SimplexETF, SparseETF
from lightning_feat.mixins import LossTermsMixin
from tests.helpers import BuiltLate, Momentum, Plain, equal, loader, points, trainer, weights


class Lazy(BuiltLate, Momentum):
    pass


class Early(Momentum):
    """Makes its optimizer before any callback sees it, as LightningCLI does."""

    def __init__(self):
        super().__init__()
        self.optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-3)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.5)

    def configure_optimizers(self):
        return [self.optimizer], [self.scheduler]


class ByHand(Momentum):
    """The head written into the module."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net.fc = SimplexETF(8, 3)


class Regressed(ByHand):
    """The loss written into the module: ``ours`` of dot-regression, ``own`` of cross-entropy."""

    ours, own, counts = 1.0, 0.0, None

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.net.body(x)
        with torch.autocast("cpu", enabled=False):
            e = self.net.fc.prototypes
            if self.counts is not None:
                e = (
                    balanced_lengths(torch.bincount(y, minlength=3) if self.counts == "batch" else self.counts)[:, None]
                    * e
                )
            loss = self.ours * dot_regression(features.float(), y, e)
        if self.own:
            loss = loss + self.own * cross_entropy(self.net.fc(features), y)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None


class Boom(pl.Callback):
    def on_train_batch_end(self, *args):
        raise RuntimeError("boom")


def fit(tmp_path, module, *callbacks, data=None, ckpt_path=None, **kwargs):
    run = trainer(tmp_path, callbacks=list(callbacks), **{"max_epochs": 3, **kwargs})
    run.fit(module, loader(64) if data is None else data, loader(16), ckpt_path=ckpt_path)
    return run


def seeded(cls, seed=0, **kwargs):
    pl.seed_everything(seed)
    return cls(**kwargs)


def body(module):
    return weights(module.net.body)


@pytest.mark.parametrize("cls", [Momentum, Lazy, Early])
@pytest.mark.parametrize("kwargs", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}], ids=str)
def test_the_head_equals_the_module_written_by_hand(tmp_path, cls, kwargs):
    by_hand, ours = seeded(ByHand), seeded(cls)
    start = [w.clone() for w in weights(by_hand)]
    fit(tmp_path, ours, SimplexETFHead(), **kwargs)
    fit(tmp_path, by_hand, **kwargs)
    assert equal(weights(ours), weights(by_hand))
    assert not equal(weights(ours), start)


def test_the_head_stays_as_it_was_made_and_the_module_is_left_without_a_trace(tmp_path):
    module = seeded(Momentum)
    before = set(module.__dict__)
    run = fit(tmp_path, module, SimplexETFHead(seed=4), DotRegressionRegularizer())
    assert torch.equal(module.net.fc.prototypes, SimplexETF(8, 3, seed=4).prototypes)
    assert len(run.optimizers[0].param_groups[0]["params"]) == 2  # weight and bias of the body
    assert set(module.__dict__) <= before | {"_hparams", "_metric_attributes"}
    assert not module.net.fc._forward_hooks
    assert not module.net.fc._forward_pre_hooks


def test_an_optimizer_made_before_the_swap_lets_go_of_the_old_classifier(tmp_path):
    module = seeded(Early)
    fit(tmp_path, module, SimplexETFHead())
    held = [p for group in module.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in module.parameters()}


def test_after_an_exception_there_is_no_trace_and_the_next_fit_is_a_fit(tmp_path):
    module, callbacks = seeded(Momentum), (SimplexETFHead(), DotRegressionRegularizer())
    with pytest.raises(RuntimeError, match="boom"):
        fit(tmp_path, module, *callbacks, Boom())
    assert not any(name.startswith(("_feat", "training_step")) for name in module.__dict__)
    assert not module.net.fc._forward_hooks
    fit(tmp_path, module, *callbacks)


def test_sparsity_makes_a_sparse_head(tmp_path):
    module = seeded(Momentum)
    fit(tmp_path, module, SimplexETFHead(sparsity=0.25))
    assert isinstance(module.net.fc, SparseETF)
    assert (module.net.fc.prototypes == 0).sum() == 6  # of 24


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(("accumulate", "manual"), [(1, False), (3, False), (1, True)])
def test_dot_regression_in_place_of_the_loss_equals_the_loss_written_by_hand(tmp_path, precision, accumulate, manual):
    plugin = {} if precision == "32-true" else {"plugins": [MixedPrecision(precision, "cpu")]}
    kwargs = {"accumulate_grad_batches": accumulate, **plugin}
    ours, by_hand, with_ce = (
        seeded(Plain, manual=manual),
        seeded(Regressed, manual=manual),
        seeded(Plain, manual=manual),
    )
    by_hand.configure_optimizers = lambda: torch.optim.SGD(by_hand.parameters(), lr=0.1)
    fit(tmp_path, ours, SimplexETFHead(), DotRegressionRegularizer(), **kwargs)
    fit(tmp_path, by_hand, **kwargs)
    fit(tmp_path, with_ce, SimplexETFHead(), **kwargs)
    assert equal(body(ours), body(by_hand))
    assert not equal(body(ours), body(with_ce))


def test_the_order_of_the_callbacks_does_not_matter(tmp_path):
    one, other = seeded(Momentum), seeded(Momentum)
    fit(tmp_path, one, SimplexETFHead(), DotRegressionRegularizer())
    fit(tmp_path, other, DotRegressionRegularizer(), SimplexETFHead())
    assert equal(weights(one), weights(other))


def test_beside_the_loss_it_is_added(tmp_path):
    class Sum(Regressed):
        ours, own = 0.5, 1.0

    module, by_hand = seeded(Momentum), seeded(Sum)
    fit(tmp_path, module, SimplexETFHead(), DotRegressionRegularizer(0.5, replace_loss=False))
    fit(tmp_path, by_hand)
    for a, b in zip(weights(module), weights(by_hand), strict=True):  # float32, added in another order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counts", ["batch", [40, 20, 4]])
def test_classes_of_unequal_size_may_weigh_the_same(tmp_path, counts):
    class Balanced(Regressed):
        pass

    Balanced.counts = counts if counts == "batch" else torch.tensor(counts)
    module, by_hand = seeded(Momentum), seeded(Balanced)
    fit(tmp_path, module, SimplexETFHead(), DotRegressionRegularizer(class_counts=counts))
    fit(tmp_path, by_hand)
    assert equal(weights(module), weights(by_hand))


def test_soft_targets_that_are_one_hot_are_class_indices(tmp_path):
    class Soft(Momentum):
        def validation_step(self, batch, batch_idx):
            pass

    x, y = points(64).tensors
    one_hot = DataLoader(TensorDataset(x, torch.eye(3)[y]), batch_size=8)
    soft, hard = seeded(Soft), seeded(Momentum)
    fit(tmp_path, soft, SimplexETFHead(), DotRegressionRegularizer(), data=one_hot)
    fit(tmp_path, hard, SimplexETFHead(), DotRegressionRegularizer())
    for a, b in zip(weights(soft), weights(hard), strict=True):  # float32, summed over classes instead of picked
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_targets_to_be_ignored_are_left_out(tmp_path):
    class Ignores(Plain):
        def training_step(self, batch, batch_idx):
            return cross_entropy(self(batch[0]), batch[1], ignore_index=1)

    module, seen = seeded(Ignores), []
    regularizer = DotRegressionRegularizer(ignore_index=1)
    regularizer.term._prototypes = lambda targets: seen.append(targets) or module.net.fc.prototypes
    fit(tmp_path, module, SimplexETFHead(), regularizer, max_epochs=1)
    y = points(64).tensors[1]
    assert torch.equal(torch.cat(seen), y[y != 1])


def test_what_is_not_made_of_the_logits_trains_on(tmp_path):
    class Auxiliary(Momentum):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(8, 2)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.other(self.net.body(batch[0])).square().mean()

    module = seeded(Auxiliary)
    before = module.other.weight.detach().clone()
    fit(tmp_path, module, SimplexETFHead(layer="net.fc"), DotRegressionRegularizer(layer="net.fc"))
    assert not torch.equal(module.other.weight, before)


def test_the_mixin_takes_it_into_a_bare_backward(tmp_path):
    class Mine(LossTermsMixin, Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            optimizer = self.optimizers()
            optimizer.zero_grad()
            (cross_entropy(self(x), y) + self.loss_terms()).backward()
            optimizer.step()

    ours, by_hand = seeded(Mine, manual=True), seeded(Regressed, manual=True)
    by_hand.configure_optimizers = lambda: torch.optim.SGD(by_hand.parameters(), lr=0.1)
    fit(tmp_path, ours, SimplexETFHead(), DotRegressionRegularizer())
    fit(tmp_path, by_hand)
    assert equal(body(ours), body(by_hand))


def test_value_and_share_are_logged(tmp_path):
    module = seeded(Plain, lr=0.0)
    run = fit(tmp_path, module, SimplexETFHead(), DotRegressionRegularizer(2.0), max_epochs=1, data=loader(64, 64))
    x, y = points(64).tensors
    with torch.no_grad():
        value = dot_regression(module.net.body(x), y, module.net.fc.prototypes)
        whole = 2 * value + cross_entropy(module(x), y)
    torch.testing.assert_close(run.callback_metrics["dot_regression/loss/penultimate"], value)
    torch.testing.assert_close(run.callback_metrics["dot_regression/share/penultimate"], 2 * value / whole)


def test_a_compiled_network(tmp_path):
    module, plain = seeded(Momentum), seeded(Momentum)
    module.net = torch.compile(module.net, backend="eager")
    module(torch.zeros(2, 4))  # traced with the old head
    for each in (module, plain):
        fit(tmp_path, each, SimplexETFHead(), DotRegressionRegularizer())
    assert equal(weights(module), weights(plain))


def test_the_learning_rate_finder_finds_it_for_this_loss(tmp_path):
    module = seeded(Momentum)
    run = trainer(tmp_path, callbacks=[SimplexETFHead(), DotRegressionRegularizer()])
    Tuner(run).lr_find(module, loader(64), num_training=4, update_attr=False)
    assert "dot_regression/loss/penultimate" in run.callback_metrics


def test_a_checkpoint_resumes_bit_for_bit(tmp_path):
    def callbacks(seed):
        return SimplexETFHead(seed=seed), DotRegressionRegularizer()

    whole = seeded(Momentum)
    fit(tmp_path, whole, *callbacks(0), max_epochs=4)
    half = fit(tmp_path, seeded(Momentum), *callbacks(0), max_epochs=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = seeded(Momentum, seed=5)
    fit(tmp_path, resumed, *callbacks(1), max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert equal(weights(resumed), weights(whole))
    assert torch.equal(resumed.net.fc.prototypes, whole.net.fc.prototypes)  # those of the checkpoint


def test_a_checkpoint_is_tested_by_a_fresh_module_and_loads_into_one_built_by_hand(tmp_path):
    module = seeded(Momentum)
    run = fit(tmp_path, module, SimplexETFHead(seed=3))
    run.save_checkpoint(path := tmp_path / "last.ckpt")
    fresh = seeded(Momentum, seed=7)
    trainer(tmp_path, callbacks=[SimplexETFHead()]).test(fresh, loader(16), ckpt_path=path, verbose=False)
    by_hand = ByHand.load_from_checkpoint(path)
    for other in (fresh, by_hand):
        assert torch.equal(other(torch.ones(1, 4)), module(torch.ones(1, 4)))


def test_a_plain_checkpoint_gives_its_backbone_to_a_fixed_head_where_asked(tmp_path):
    plain = seeded(Momentum)
    fit(tmp_path, plain, max_epochs=2).save_checkpoint(path := tmp_path / "plain.ckpt")
    with pytest.raises(RuntimeError, match=r"linear classifier at net.fc.*SimplexETFHead\(fresh_head=True\)"):
        fit(tmp_path, seeded(Momentum), SimplexETFHead(), ckpt_path=path)
    module = seeded(Momentum, seed=3)
    with pytest.warns(UserWarning, match=r"net.fc is fixed now"):
        fit(tmp_path, module, SimplexETFHead(fresh_head=True), ckpt_path=path, max_epochs=2)
    assert equal(body(module), body(plain))
    fit(tmp_path, module, SimplexETFHead(fresh_head=True), ckpt_path=path, max_epochs=3)


def test_dot_regression_leaves_nothing_in_a_checkpoint(tmp_path):
    run = fit(tmp_path, seeded(ByHand), DotRegressionRegularizer(), max_epochs=2)
    run.save_checkpoint(path := tmp_path / "half.ckpt")
    resumed = seeded(ByHand, seed=1)
    fit(tmp_path, resumed, ckpt_path=path, max_epochs=3)  # by cross-entropy from here
    assert torch.load(path, weights_only=True)["state_dict"].keys() == resumed.state_dict().keys()


def test_a_copy_of_the_module_made_during_the_fit_has_no_need_of_the_callbacks(tmp_path):
    copies = []

    class Copy(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            copies.append(copy.deepcopy(pl_module))

    module = seeded(Momentum)
    fit(tmp_path, module, SimplexETFHead(), DotRegressionRegularizer(), Copy())
    assert torch.equal(copies[-1](torch.ones(1, 4)), module(torch.ones(1, 4)))


@pytest.mark.parametrize(
    ("callbacks", "text"),
    [
        ([SimplexETFHead(layer="net.body.1")], "the classifier net.body.1 is a ReLU, not an nn.Linear"),
        ([SimplexETFHead(layer="net.fcc")], "has no layer 'net.fcc'. Nearest: net.fc"),
        ([SimplexETFHead(), SimplexETFHead(seed=1)], r"the Trainer has SimplexETFHead\[classifier\] twice"),
        ([StochasticWeightAveraging(swa_lrs=0.1), SimplexETFHead()], "put SimplexETFHead before it"),
        ([DotRegressionRegularizer()], r"the classifier net.fc is a Linear, without fixed prototypes: add SimplexETFH"),
        (
            [SimplexETFHead(), DotRegressionRegularizer(), DotRegressionRegularizer(2.0)],
            "two loss terms 'dot_regression' on layer 'penultimate'",
        ),
        (
            [SimplexETFHead(), DotRegressionRegularizer(class_counts=[1, 2])],
            "has 2 entries, but the head has 3 classes",
        ),
    ],
)
def test_what_a_newcomer_gets_wrong_is_told_and_the_module_stays_whole(tmp_path, callbacks, text):
    module = seeded(Momentum)
    with pytest.raises(ValueError, match=text):
        fit(tmp_path, module, *callbacks)
    assert not any(name.startswith("_feat") for name in module.__dict__)
    assert not module.net.fc._forward_hooks
    fit(tmp_path, module)  # and can be trained


def test_too_many_classes_for_the_features_are_refused(tmp_path):
    class Wide(Plain):
        def __init__(self):
            super().__init__()
            self.net.fc = nn.Linear(8, 10)

    with pytest.raises(ValueError, match=r"8 features have no room for a simplex of 10 classes"):
        fit(tmp_path, Wide(), SimplexETFHead())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SimplexETFHead(sparsity=1.0), "sparsity=1.0 is a share of entries"),
        (lambda: DotRegressionRegularizer(0.0), "weight=0.0: a term that replaces the loss needs a number above zero"),
        (lambda: DotRegressionRegularizer(WeightSchedule(1.0, start_epoch=1)), "Set replace_loss=False to schedule it"),
    ],
)
def test_impossible_arguments_are_refused_at_once(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_fixed_head_on_a_frozen_network_leaves_nothing_to_train(tmp_path):
    module = Plain()
    module.net.body.requires_grad_(False)
    run = trainer(tmp_path, callbacks=[SimplexETFHead()])
    with pytest.raises(ValueError, match="nothing is left to train in Plain"):
        run.fit(module, loader())
