"""SAM in a Trainer is SAM in a loop by hand, bit for bit."""

import itertools

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_feat.callbacks import (
    FeatureRegularizer,
    GrassmannHead,
    NeuralCollapseMonitor,
    SharpnessAwareMinimization,
)
from lightning_feat.functional.simplicity_bias import sharpness_step
from tests.helpers import NUM_CLASSES, Disturbed, Momentum, Plain, equal, points, trainer, weights

RHO = 0.3


class Noted(Disturbed):
    """BatchNorm, dropout, a metric and a count of its own: what a second pass would disturb."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(NUM_CLASSES)
        self.seen = 0

    def note(self, logits, y, loss):
        self.accuracy.update(logits, y)
        self.seen += len(y)
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        self.log("train/accuracy", self.accuracy, on_step=False, on_epoch=True)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = cross_entropy(logits, y)
        self.note(logits, y, loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class ByHand(Noted):
    """The same with the second pass written out; every ``interval``-th step takes it."""

    def __init__(self, interval=1):
        super().__init__()
        self.automatic_optimization, self.interval = False, interval

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        random = torch.get_rng_state()
        logits = self(x)
        loss = cross_entropy(logits, y)
        self.note(logits, y, loss)
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.global_step % self.interval == 0:
            trained = [*self.parameters()]
            before, statistics = weights(self), [b.clone() for b in self.net.buffers()]
            for p, step in zip(trained, sharpness_step([p.grad for p in trained], RHO), strict=True):
                p.data.add_(step)
            torch.set_rng_state(random)
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self(x), y))
            for p, old in zip(trained, before, strict=True):
                p.data.copy_(old)
            for buffer, old in zip(self.net.buffers(), statistics, strict=True):
                buffer.copy_(old)
        optimizer.step()

    def on_train_epoch_end(self):
        self.lr_schedulers().step()


def fit(tmp_path, module, *callbacks, ckpt_path=None, **kwargs):
    run = trainer(tmp_path, callbacks=list(callbacks), **{"max_epochs": 3, **kwargs})
    pl.seed_everything(4)
    run.fit(module, DataLoader(points(32), 8, shuffle=True), ckpt_path=ckpt_path)
    return run


def seeded(kind, *arguments):
    pl.seed_everything(3)
    return kind(*arguments)


def logged(run):
    return {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("train/")}


@pytest.mark.parametrize("interval", [1, 3])
def test_weights_statistics_and_what_is_logged_are_those_of_the_loop_by_hand(tmp_path, interval):
    by_hand = seeded(ByHand, interval)
    expected = fit(tmp_path, by_hand)
    module = seeded(Noted)
    run = fit(tmp_path, module, SharpnessAwareMinimization(RHO, interval=interval))
    assert equal(weights(module), weights(by_hand))
    assert equal([*module.net.buffers()], [*by_hand.net.buffers()])
    assert logged(run) == logged(expected)
    assert module.seen == by_hand.seen == 3 * 32
    assert run.callback_metrics["sharpness/rise"] > 0
    plain = seeded(Noted)
    fit(tmp_path, plain)
    assert not equal(weights(module), weights(plain))


def test_a_run_resumed_between_two_of_its_steps_ends_as_the_whole_one(tmp_path):
    def options():
        return SharpnessAwareMinimization(RHO, interval=3)

    whole, resumed = seeded(Momentum), seeded(Momentum)
    loader = DataLoader(points(32), 8)
    cut = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=8, save_top_k=-1)
    trainer(tmp_path, callbacks=[options(), cut], max_epochs=3, enable_checkpointing=True).fit(whole, loader)
    second = trainer(tmp_path, callbacks=[options()], max_epochs=3)
    second.fit(resumed, loader, ckpt_path=tmp_path / "step=8.ckpt")
    assert equal(weights(whole), weights(resumed))
    plain = Momentum()  # the optimizer's state is its own
    trainer(tmp_path, max_epochs=4).fit(plain, loader, ckpt_path=tmp_path / "step=8.ckpt")


def test_clipping_takes_the_second_gradient_and_bfloat16_runs(tmp_path):
    clipped, free = seeded(Momentum), seeded(Momentum)
    fit(tmp_path, clipped, SharpnessAwareMinimization(RHO), gradient_clip_val=1e6)
    fit(tmp_path, free, SharpnessAwareMinimization(RHO))
    assert equal(weights(clipped), weights(free))
    tight = seeded(Momentum)
    fit(tmp_path, tight, SharpnessAwareMinimization(RHO), gradient_clip_val=1e-3)
    assert not equal(weights(tight), weights(free))
    half = seeded(Noted)
    run = fit(tmp_path, half, SharpnessAwareMinimization(RHO), precision="bf16-mixed")
    assert run.callback_metrics["sharpness/rise"].isfinite()


def test_beside_a_grassmann_head_the_subspaces_stay_on_their_manifold(tmp_path):
    module = seeded(Plain)
    run = fit(tmp_path, module, GrassmannHead(2), SharpnessAwareMinimization(RHO))
    assert run.callback_metrics["grassmann/orthonormality_error/net.fc"] < 1e-5


def test_a_loss_term_is_in_both_passes_and_logged_once(tmp_path):
    def ridge(features):
        return features.square().mean()

    class Summed(Momentum):
        def training_step(self, batch, batch_idx):
            x, y = batch
            features = self.net.body(x)
            return cross_entropy(self.net.fc(features), y) + 0.5 * ridge(features)

    with_term, by_hand = seeded(Momentum), seeded(Summed)
    term = FeatureRegularizer(ridge, name="ridge", weight=0.5)
    fit(tmp_path, with_term, term, NeuralCollapseMonitor(), SharpnessAwareMinimization(RHO))
    fit(tmp_path, by_hand, SharpnessAwareMinimization(RHO))
    assert equal(weights(with_term), weights(by_hand))


class Skips(Momentum):
    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


def test_a_batch_that_training_step_leaves_out_is_left_out(tmp_path):
    run = fit(tmp_path, seeded(Skips), SharpnessAwareMinimization(RHO))
    assert run.callback_metrics["sharpness/rise"].isfinite()


class RunsOut(Momentum):
    """In its fourth pass, the second of the second batch."""

    def __init__(self):
        super().__init__()
        self.passes = itertools.count(1)  # a plain number would be put back after the second pass

    def training_step(self, batch, batch_idx):
        if next(self.passes) == 4:
            raise torch.OutOfMemoryError("no memory left")
        return super().training_step(batch, batch_idx)


def test_where_the_second_pass_fails_the_weights_are_those_of_the_last_step(tmp_path):
    module, one_step = seeded(RunsOut), seeded(Momentum)
    with pytest.raises(torch.OutOfMemoryError):
        fit(tmp_path, module, SharpnessAwareMinimization(RHO))
    fit(tmp_path, one_step, SharpnessAwareMinimization(RHO), max_steps=1)
    assert equal(weights(module), weights(one_step))
    assert "optimizer_step" not in vars(module)


def test_nothing_is_left_of_it(tmp_path):
    module = seeded(Plain)
    fit(tmp_path, module, SharpnessAwareMinimization(RHO))
    assert "optimizer_step" not in vars(module)


@pytest.mark.parametrize(
    ("make", "options", "callbacks", "said"),
    [
        (lambda: Plain(manual=True), {}, [], "call optim.sharpness_aware"),
        (Plain, {"accumulate_grad_batches": 2}, [], "beside accumulate_grad_batches=2"),
        (Plain, {}, [GradientAccumulationScheduler({1: 2})], "beside a GradientAccumulationScheduler"),
        (Plain, {}, [SharpnessAwareMinimization()], "twice: keep one"),
    ],
)
def test_what_it_cannot_go_with_is_said_before_the_first_batch(tmp_path, make, options, callbacks, said):
    module = make()
    with pytest.raises(ValueError, match=said):
        fit(tmp_path, module, SharpnessAwareMinimization(), *callbacks, **options)
    assert "optimizer_step" not in vars(module)


@pytest.mark.parametrize("arguments", [{"interval": 0}, {"rho": 0.0}, {"eta": -1.0}, {"scope": "all"}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SharpnessAwareMinimization(**arguments)


def test_both_passes_see_the_same_numbers_of_a_generator_that_the_module_keeps(tmp_path):
    class Noise:
        def __init__(self):
            self.generator, self.drawn = torch.Generator().manual_seed(5), []

        def __call__(self, x):
            self.drawn.append(torch.randn((), generator=self.generator))
            return x + self.drawn[-1]

    class Noisy(Plain):
        def __init__(self):
            super().__init__()
            self.noise = Noise()

        def forward(self, x):
            return super().forward(self.noise(x))

    module = seeded(Noisy)
    fit(tmp_path, module, SharpnessAwareMinimization(RHO), max_epochs=1)
    expected = torch.randn(4, generator=torch.Generator().manual_seed(5))
    drawn = torch.stack(module.noise.drawn)
    assert len(drawn) == 8
    assert len(drawn.unique()) == len(expected)
    assert torch.equal(drawn[::2], drawn[1::2])
