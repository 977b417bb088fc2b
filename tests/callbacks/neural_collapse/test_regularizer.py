import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks import NeuralCollapseRegularizer, SimplexETFHead
from lightning_feat.functional.neural_collapse.losses import between_class_push, scale_gradient, within_class_pull
from lightning_feat.joints.loss.terms import WeightSchedule
from lightning_feat.mixins import LossTermsMixin
from tests.helpers import BuiltLate, EMAWeightAveraging, Plain, equal, loader, points, trainer, weights

PULL, PUSH = "collapse_pull/loss/penultimate", "collapse_push/loss/penultimate"


def drawn(num_classes=3, num_features=8, seed=0):
    return torch.randn(num_classes, num_features, generator=torch.Generator().manual_seed(seed))


class OwnLoss(Plain):
    """Has the means, and adds ``own_loss`` to its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.means = nn.Parameter(drawn())

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.net.body(x)
        loss = cross_entropy(self.net.fc(features), y)
        with torch.autocast("cpu", enabled=False):
            loss = self.own_loss(loss, features.float(), y)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None


class ByHand(OwnLoss):
    """Both losses as loops over classes, and the means pulled by a loss of their own. Weights 0.2, 0.1; factor 3."""

    def spread(self, features, targets, means):
        classes = [c for c in range(3) if (targets == c).any()]
        return sum((features[targets == c] - means[c]).square().sum(1).mean() for c in classes) / 3

    def nearest_angle(self, means):
        u = means - means.mean(0)
        u = u / u.norm(dim=1, keepdim=True)
        nearest = [max(u[c] @ u[d] for d in range(3) if d != c) for c in range(3)]
        return -sum(cosine.clamp(-0.99999, 0.99999).arccos() for cosine in nearest) / 3

    def own_loss(self, loss, features, targets):
        loss = loss + 0.2 * self.spread(features, targets, self.means.detach())
        return loss + 3.0 * self.spread(features.detach(), targets, self.means) + 0.3 * self.nearest_angle(self.means)


class Calls(OwnLoss):
    """Calls the functions."""

    def own_loss(self, loss, features, targets):
        loss = loss + 0.2 * within_class_pull(features, targets, scale_gradient(self.means, 3.0 / 0.2))
        return loss + 0.1 * between_class_push(scale_gradient(self.means, 3.0))


class Adaptive(Plain):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class Lazy(BuiltLate, Plain):
    pass


def fit(tmp_path, module, *callbacks, data=None, ckpt_path=None, **kwargs):
    run = trainer(tmp_path, callbacks=list(callbacks), **{"max_epochs": 3, **kwargs})
    run.fit(module, loader(64) if data is None else data, ckpt_path=ckpt_path)
    return run


def seeded(cls, seed=0, **kwargs):
    pl.seed_everything(seed)
    return cls(**kwargs)


def assert_near(ours, theirs):
    """Float32, 24 steps: the same terms added up in another order."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"accumulate_grad_batches": 3}], ids=str)
def test_it_equals_the_losses_written_by_hand(tmp_path, kwargs):
    ours, by_hand, without = (seeded(cls) for cls in (Plain, ByHand, Plain))
    regularizer = NeuralCollapseRegularizer(pull_weight=0.2, lr_factor=3.0)
    fit(tmp_path, ours, regularizer, **kwargs)
    fit(tmp_path, by_hand, **kwargs)
    fit(tmp_path, without, **kwargs)
    assert_near(weights(ours.net), weights(by_hand.net))
    assert_near([regularizer.means.detach()], [by_hand.means.detach()])
    assert not equal(weights(ours.net), weights(without.net))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(("accumulate", "manual"), [(1, False), (3, False), (1, True)])
def test_a_module_that_calls_the_functions_itself_gets_the_same_bit_for_bit(tmp_path, precision, accumulate, manual):
    plugin = {} if precision == "32-true" else {"plugins": [MixedPrecision(precision, "cpu")]}
    kwargs = {"accumulate_grad_batches": accumulate, **plugin}
    ours, by_hand = seeded(Plain, manual=manual), seeded(Calls, manual=manual)
    regularizer = NeuralCollapseRegularizer(pull_weight=0.2, lr_factor=3.0)
    fit(tmp_path, ours, regularizer, **kwargs)
    fit(tmp_path, by_hand, **kwargs)
    assert equal(weights(ours.net), weights(by_hand.net))
    assert torch.equal(regularizer.means, by_hand.means)


def test_the_mixin_takes_both_into_a_bare_backward(tmp_path):
    class Mine(LossTermsMixin, Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            optimizer = self.optimizers()
            optimizer.zero_grad()
            (cross_entropy(self(x), y) + self.loss_terms()).backward()
            optimizer.step()

    ours, by_hand = seeded(Mine, manual=True), seeded(ByHand, manual=True)
    fit(tmp_path, ours, NeuralCollapseRegularizer(pull_weight=0.2, lr_factor=3.0))
    fit(tmp_path, by_hand)
    assert_near(weights(ours.net), weights(by_hand.net))


@pytest.mark.parametrize("cls", [Plain, Lazy])
@pytest.mark.parametrize("hold_back", [False, True])
def test_the_means_follow_the_class_means_whatever_the_weight(tmp_path, cls, hold_back):
    regularizer = NeuralCollapseRegularizer(1e-6, push_weight=0.0, hold_back=hold_back, lr_factor=5.0)
    module = seeded(cls)
    if cls is Plain:
        module.net.requires_grad_(False)  # then the means are all that moves
    data = loader(64, 64)
    fit(tmp_path, module, regularizer, data=data, max_epochs=60)
    x, y = points(64).tensors
    member = one_hot(y, 3).float()
    with torch.no_grad():
        means = (member.T @ module.net.body(x)) / member.sum(0)[:, None]
    # each step goes 0.1 * 5 * 2 / 3 of the way; where the network moves as well the means lag behind
    torch.testing.assert_close(regularizer.means.detach(), means, rtol=0, atol=1e-5 if cls is Plain else 0.1)


def test_the_gradient_of_the_means_is_divided_by_the_weight_of_the_batch(tmp_path):
    class Still(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    grads = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            grads.append((pl_module.net.body[0].weight.grad.clone(), regularizer.means.grad.clone()))

        def on_train_start(self, trainer, pl_module):
            grads.clear()

    class Nothing(Still):
        def training_step(self, batch, batch_idx):
            return 0.0 * super().training_step(batch, batch_idx)

    regularizer = NeuralCollapseRegularizer(WeightSchedule(0.3, warmup_epochs=2), push_weight=0.0)
    fit(tmp_path, seeded(Nothing), regularizer, Watch(), data=loader(64, 64), max_epochs=2)  # weights 0.15 and 0.3
    torch.testing.assert_close(grads[1][0], 2 * grads[0][0])
    torch.testing.assert_close(grads[1][1], grads[0][1])
    assert grads[0][1].abs().min() > 0


class Free(Plain):
    """Each of 48 samples has a feature of its own, so that nothing but the loss decides where features go."""

    def __init__(self):
        super().__init__()
        self.net.body = nn.Embedding(48, 8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5, weight_decay=1e-3)

    def spread_and_nearest_angle(self):
        """Of the features at unit length: their squared distance to their class mean, and the angle of two means."""
        y, h = torch.arange(48) % 3, nn.functional.normalize(self.net.body.weight.detach(), dim=1)
        means = torch.stack([h[y == c].mean(0) for c in range(3)])
        return float(within_class_pull(h, y, means)), -float(between_class_push(means, "global"))


def test_it_induces_collapse_and_holds_it_back(tmp_path):
    found = {}
    for name, callbacks in {
        "induced": [NeuralCollapseRegularizer(0.5, 0.5, num_features=8)],
        "plain": [],
        "held": [NeuralCollapseRegularizer(0.1, 0.5, num_features=8, hold_back=True)],
    }.items():
        module, data = seeded(Free), torch.utils.data.TensorDataset(torch.arange(48), torch.arange(48) % 3)
        fit(tmp_path, module, *callbacks, data=torch.utils.data.DataLoader(data, batch_size=48), max_epochs=100)
        found[name] = module.spread_and_nearest_angle()
    assert found["induced"][0] + 0.02 < found["plain"][0] < found["held"][0] - 0.02
    assert found["induced"][1] - 0.01 > found["plain"][1] > found["held"][1] + 0.01


def test_both_are_logged_without_weight(tmp_path):
    module, regularizer = seeded(Plain, lr=0.0), NeuralCollapseRegularizer(0.2, 0.3, hold_back=True)
    run = fit(tmp_path, module, regularizer, data=loader(64, 64), max_epochs=1)
    x, y = points(64).tensors
    with torch.no_grad():
        features = module.net.body(x)
        pull, push = within_class_pull(features, y, drawn()), between_class_push(drawn())
        whole = cross_entropy(module.net.fc(features), y) - 0.2 * pull + 0.3 * push
    logged = run.callback_metrics
    torch.testing.assert_close(logged[PULL], pull)
    torch.testing.assert_close(logged[PUSH], push)
    torch.testing.assert_close(logged["collapse_pull/share/penultimate"], -0.2 * pull / whole)
    torch.testing.assert_close(logged["collapse_push/share/penultimate"], 0.3 * push / whole)


def test_the_users_random_numbers_and_groups_stay(tmp_path):
    orders = []

    class Order(Plain):
        def training_step(self, batch, batch_idx):
            orders[-1].append(batch[1])
            return super().training_step(batch, batch_idx)

    for callbacks in ([], [NeuralCollapseRegularizer()]):
        orders.append([])
        run = fit(tmp_path, seeded(Order), *callbacks, data=loader(64, shuffle=True))
        assert len(run.optimizers[0].param_groups) == 1
    assert equal(*orders)


def test_the_module_is_left_without_a_trace_and_a_second_fit_goes_on(tmp_path):
    module, regularizer = seeded(Plain), NeuralCollapseRegularizer()
    before = set(module.__dict__)
    fit(tmp_path, module, regularizer)
    first = regularizer.means.detach().clone()
    fit(tmp_path, module, regularizer)
    assert set(module.__dict__) <= before | {"_hparams", "_metric_attributes"}
    assert [name for name, _ in module.named_children()] == ["net"]
    assert not module.net.fc._forward_pre_hooks
    assert not torch.equal(regularizer.means, first)
    assert not torch.equal(first, drawn())


def test_after_an_exception_there_is_no_trace(tmp_path):
    class Boom(pl.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("boom")

    for cls in (Plain, Lazy):
        module = seeded(cls)
        with pytest.raises(RuntimeError, match="boom"):
            fit(tmp_path, module, NeuralCollapseRegularizer(), Boom())
        assert not any(name.startswith(("_feat", "training_step", "configure")) for name in module.__dict__)
        assert [name for name, _ in module.named_children()] == ["net"]


@pytest.mark.parametrize("cls", [Plain, Lazy, Adaptive])
def test_a_checkpoint_resumes_bit_for_bit(tmp_path, cls):
    regularizers = [NeuralCollapseRegularizer(lr_factor=3.0) for _ in range(3)]
    whole = seeded(cls)
    fit(tmp_path, whole, regularizers[0], max_epochs=4)
    half = fit(tmp_path, seeded(cls), regularizers[1], max_epochs=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = seeded(cls, seed=5)
    fit(tmp_path, resumed, regularizers[2], max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert equal(weights(resumed), weights(whole))
    assert torch.equal(regularizers[2].means, regularizers[0].means)


def test_checkpoints_with_and_without_it_can_be_exchanged(tmp_path):
    with_it, plain = seeded(Adaptive), seeded(Adaptive)
    fit(tmp_path, with_it, NeuralCollapseRegularizer(), max_epochs=2).save_checkpoint(tmp_path / "with.ckpt")
    fit(tmp_path, plain, max_epochs=2).save_checkpoint(tmp_path / "plain.ckpt")
    states = [torch.load(tmp_path / name, weights_only=True) for name in ("with.ckpt", "plain.ckpt")]
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()
    assert equal(weights(Adaptive.load_from_checkpoint(tmp_path / "with.ckpt")), weights(with_it))
    fit(tmp_path, seeded(Adaptive), ckpt_path=tmp_path / "with.ckpt", max_epochs=3)
    regularizer = NeuralCollapseRegularizer()
    fit(tmp_path, seeded(Adaptive), regularizer, ckpt_path=tmp_path / "plain.ckpt", max_epochs=3)
    assert not torch.equal(regularizer.means, drawn())


def test_with_a_fixed_head(tmp_path):
    module, regularizer = seeded(Plain), NeuralCollapseRegularizer()
    fit(tmp_path, module, SimplexETFHead(), regularizer)
    assert regularizer.means.shape == (3, 8)


def test_another_layer(tmp_path):
    regularizer = NeuralCollapseRegularizer(layer="net.body.0", num_features=8, variant="frobenius")
    run = fit(tmp_path, seeded(Plain), regularizer)
    assert run.callback_metrics["collapse_push/loss/net.body.0"] >= 0


def test_two_layers_at_once(tmp_path):
    other = NeuralCollapseRegularizer(layer="net.body.0", num_features=8, seed=1)
    run = fit(tmp_path, seeded(Plain), NeuralCollapseRegularizer(), other)
    assert {PULL, PUSH, "collapse_pull/loss/net.body.0"} <= set(run.callback_metrics)


def test_batches_without_a_target_of_ours(tmp_path):
    class Ignores(Plain):
        def training_step(self, batch, batch_idx):
            return cross_entropy(self(batch[0]), batch[1].clamp(min=0))

    data = points(16)
    data.tensors[1].fill_(-100)
    regularizer = NeuralCollapseRegularizer(push_weight=0.0)
    fit(tmp_path, seeded(Ignores), regularizer, data=torch.utils.data.DataLoader(data, batch_size=8))
    assert torch.equal(regularizer.means, drawn())


def test_the_learning_rate_finder_trains_with_it(tmp_path):
    run = trainer(tmp_path, callbacks=[NeuralCollapseRegularizer()])
    Tuner(run).lr_find(seeded(Plain), loader(64), num_training=4, update_attr=False)
    assert PULL in run.callback_metrics


@pytest.mark.skipif(EMAWeightAveraging is None, reason="this Lightning has no averaging of its own")
def test_averaged_weights(tmp_path):
    module = seeded(Plain)
    fit(tmp_path, module, NeuralCollapseRegularizer(), EMAWeightAveraging())
    assert [name for name, _ in module.named_children()] == ["net"]
    assert "training_step" not in copy.deepcopy(module).__dict__


@pytest.mark.parametrize(
    ("callbacks", "text"),
    [
        (
            lambda: [NeuralCollapseRegularizer(), NeuralCollapseRegularizer(0.1)],
            r"the Trainer has NeuralCollapseRegularizer\[penultimate\] twice",
        ),
        (lambda: [NeuralCollapseRegularizer(num_features=5)], "the features are 8 wide, but the class means 5"),
        (
            lambda: [NeuralCollapseRegularizer(layer="net.bdy", num_features=8)],
            "has no layer 'net.bdy'. Nearest: net.b",
        ),
    ],
)
def test_what_a_newcomer_gets_wrong_is_told(tmp_path, callbacks, text):
    module = seeded(Plain)
    with pytest.raises(ValueError, match=text):
        fit(tmp_path, module, *callbacks())
    assert not any(name.startswith("_feat") for name in module.__dict__)
    assert [name for name, _ in module.named_children()] == ["net"]


def test_a_classifier_that_does_not_tell_its_width_is_asked_about(tmp_path):
    class Odd(Plain):
        def __init__(self):
            super().__init__()
            self.net.fc = nn.Bilinear(8, 8, 3)
            self.net.forward = lambda x: self.net.fc(h := self.net.body(x), h)

    with pytest.raises(ValueError, match=r"net.fc, a Bilinear, does not say how wide its features are: set num_f"):
        fit(tmp_path, Odd(), NeuralCollapseRegularizer())
    fit(tmp_path, Odd(), NeuralCollapseRegularizer(num_features=8))


@pytest.mark.parametrize("pooled", [True, False])
def test_a_convolution_that_is_named_tells_its_sizes(tmp_path, pooled):
    class Maps(Plain):
        def __init__(self):
            super().__init__()
            body = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), *([nn.AdaptiveAvgPool2d(1)] if pooled else [])]
            self.net = nn.Sequential(*body, nn.Conv2d(8, 3, 1), *([nn.Flatten()] if pooled else []))

    x, y = torch.randn(8, 1, 4, 4), torch.randint(3, (8,) if pooled else (8, 4, 4))
    name, pooling = ("net.3", "flatten") if pooled else ("net.2", "tokens")
    regularizer = NeuralCollapseRegularizer(layer=name, read="input", pooling=pooling)
    trainer(tmp_path, callbacks=[regularizer]).fit(seeded(Maps), DataLoader(TensorDataset(x, y), 4))
    assert regularizer.means.shape == (3, 8)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"pull_weight": -0.01}, "pull_weight=-0.01 must be above zero.*hold_back=True"),
        ({"pull_weight": 0.0}, "pull_weight=0.0 must be above zero"),
        ({"push_weight": -1.0}, "push_weight=-1.0 not below"),
        ({"lr_factor": 0.0}, "lr_factor=0.0 must be above zero"),
        ({"variant": "all"}, "variant='all': choose"),
        ({"layer": "net.body"}, "layer='net.body': how wide its features are .* set num_features"),
    ],
)
def test_impossible_arguments_are_refused_at_once(kwargs, text):
    with pytest.raises(ValueError, match=text):
        NeuralCollapseRegularizer(**kwargs)


def test_there_are_no_means_before_a_fit():
    with pytest.raises(RuntimeError, match="made when a fit begins"):
        _ = NeuralCollapseRegularizer().means
