import lightning.pytorch as pl
import pytest
import timm
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_feat.callbacks import GrassmannHead, NeuralCollapseMonitor
from lightning_feat.functional.grassmann import orthonormality_error, principal_angles
from lightning_feat.layers import GrassmannLinear
from lightning_feat.optim import follow_subspaces
from tests.helpers import BuiltLate, EMAWeightAveraging, Momentum, Plain, equal, loader, trainer, weights


class Lazy(BuiltLate, Momentum):
    pass


class Early(Momentum):
    """Makes its optimizer before any callback sees it, as LightningCLI does."""

    def __init__(self):
        super().__init__()
        decay = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": decay}, {"params": rest}]
        self.optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=0.9, weight_decay=1e-3)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.5)

    def configure_optimizers(self):
        return [self.optimizer], [self.scheduler]


class ByHand(Momentum):
    """The head and its steps written into the module."""

    def __init__(self):
        super().__init__()
        self.net.fc = GrassmannLinear(8, 3, 2)

    def configure_optimizers(self):
        optimizers, schedulers = super().configure_optimizers()
        follow_subspaces(optimizers[0], self)
        return optimizers, schedulers


def fit(tmp_path, module, *callbacks, data=None, ckpt_path=None, **kwargs):
    run = trainer(tmp_path, callbacks=list(callbacks), **{"max_epochs": 3, **kwargs})
    run.fit(module, loader(64) if data is None else data, loader(16), ckpt_path=ckpt_path)
    return run


def seeded(cls, seed=0, **kwargs):
    pl.seed_everything(seed)
    return cls(**kwargs)


def head_of(module):
    assert isinstance(module.net.fc, GrassmannLinear)
    assert orthonormality_error(module.net.fc.basis.detach()).max() < 1e-5
    return module.net.fc


@pytest.mark.parametrize("cls", [Momentum, Lazy, Early])
@pytest.mark.parametrize("kwargs", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}], ids=str)
def test_the_callback_equals_the_module_written_by_hand(tmp_path, cls, kwargs):
    by_hand, ours = seeded(ByHand), seeded(cls)
    start = by_hand.state_dict()
    swapped = trainer(tmp_path, callbacks=[GrassmannHead(2)])
    swapped.validate(ours, loader(16), verbose=False)  # puts the head in
    ours.load_state_dict(start)
    fit(tmp_path, ours, GrassmannHead(2), **kwargs)
    fit(tmp_path, by_hand, **kwargs)
    head_of(ours)
    if cls is Early and "gradient_clip_val" in kwargs:  # its groups add up the norm in another order
        for a, b in zip(weights(ours), weights(by_hand), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    else:
        assert equal(weights(ours), weights(by_hand))


def test_the_head_is_trained_and_the_module_is_left_without_a_trace(tmp_path):
    module = seeded(Momentum)
    before = set(module.__dict__)
    callback = GrassmannHead(2)
    watch = []

    class Start(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            watch.append(pl_module.net.fc.basis.detach().clone())

    run = fit(tmp_path, module, callback, Start())
    angles = principal_angles(watch[0], head_of(module).basis.detach())
    assert angles.max() > 1e-2
    assert set(module.__dict__) <= before | {"_hparams", "_metric_attributes"}
    assert not run.optimizers[0]._optimizer_step_post_hooks
    assert not callback.steps


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_every_precision_ends_on_the_manifold(tmp_path, precision):
    class Cast(Momentum):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return cross_entropy(self(x.to(self.net.body[0].weight.dtype)), y)

        def validation_step(self, batch, batch_idx):
            self.training_step(batch, batch_idx)

    plugin = {"plugins": [MixedPrecision("16-mixed", "cpu")]} if precision == "16-mixed" else {"precision": precision}
    module = seeded(Cast)
    fit(tmp_path, module, GrassmannHead(2), **plugin)
    assert head_of(module).basis.dtype == (torch.float64 if precision == "64-true" else torch.float32)


def test_what_is_logged(tmp_path):
    module = seeded(Momentum)
    run = fit(tmp_path, module, GrassmannHead(2))
    basis = head_of(module).basis.detach()
    angles = [principal_angles(basis[i], basis[j])[0] for i, j in ((0, 1), (0, 2), (1, 2))]
    logged = run.callback_metrics
    torch.testing.assert_close(logged["grassmann/smallest_angle/net.fc"], torch.stack(angles).min().rad2deg())
    assert 0 <= logged["grassmann/orthonormality_error/net.fc"] < 1e-5


def test_a_checkpoint_resumes_bit_for_bit(tmp_path):
    whole = seeded(Momentum)
    fit(tmp_path, whole, GrassmannHead(2), max_epochs=4)
    half = fit(tmp_path, seeded(Momentum), GrassmannHead(2), max_epochs=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = seeded(Momentum, seed=5)
    fit(tmp_path, resumed, GrassmannHead(2), max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert equal(weights(resumed), weights(whole))


def test_a_checkpoint_of_the_momentum_rule_resumes_bit_for_bit(tmp_path):
    class Adaptive(Plain):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    whole = seeded(Adaptive)
    fit(tmp_path, whole, GrassmannHead(2), max_epochs=4)
    half = fit(tmp_path, seeded(Adaptive), GrassmannHead(2), max_epochs=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = seeded(Adaptive, seed=5)
    fit(tmp_path, resumed, GrassmannHead(2), max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert equal(weights(resumed), weights(whole))


def test_a_checkpoint_is_tested_by_a_fresh_module_and_loads_into_one_built_by_hand(tmp_path):
    module = seeded(Momentum)
    run = fit(tmp_path, module, GrassmannHead(2))
    run.save_checkpoint(path := tmp_path / "last.ckpt")
    fresh = seeded(Momentum, seed=7)
    trainer(tmp_path, callbacks=[GrassmannHead(2)]).test(fresh, loader(16), ckpt_path=path, verbose=False)
    assert equal(weights(fresh), weights(module))
    assert equal(weights(ByHand.load_from_checkpoint(path)), weights(module))
    assert set(torch.load(path, weights_only=True)["state_dict"]) == set(module.state_dict())


def test_a_plain_checkpoint_gives_its_backbone_to_a_fresh_head_where_asked(tmp_path):
    plain = seeded(Momentum)
    fit(tmp_path, plain, max_epochs=2).save_checkpoint(path := tmp_path / "plain.ckpt")
    with pytest.raises(RuntimeError, match=r"linear classifier at net.fc.*fresh_head=True"):
        fit(tmp_path, seeded(Momentum), GrassmannHead(2), ckpt_path=path)
    module = seeded(Momentum, seed=3)
    with pytest.warns(UserWarning, match=r"net.fc starts afresh"):
        run = fit(tmp_path, module, GrassmannHead(2, fresh_head=True), ckpt_path=path, max_epochs=2)
    assert run.current_epoch == 2  # nothing left to train: these are the weights that were loaded
    assert torch.equal(module.net.body[0].weight, plain.net.body[0].weight)
    fit(tmp_path, module, GrassmannHead(2, fresh_head=True), ckpt_path=path, max_epochs=3)
    head_of(module)


def test_fit_validate_fit_keeps_one_head(tmp_path):
    module, callback = seeded(Momentum), GrassmannHead(2)
    fit(tmp_path, module, callback)
    head = head_of(module)
    trainer(tmp_path, callbacks=[callback]).validate(module, loader(16), verbose=False)
    fit(tmp_path, module, callback)
    assert head_of(module) is head


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_timm_networks(tmp_path, name):
    class Images(Plain):
        def __init__(self):
            super().__init__()
            self.net = timm.create_model(name, num_classes=3, in_chans=1)

        def training_step(self, batch, batch_idx):
            x, y = batch
            size = self.net.default_cfg["input_size"][-1]
            return cross_entropy(self.net(x.reshape(-1, 1, 2, 2).repeat(1, 1, size // 2, size // 2)), y)

        validation_step = training_step

    module = seeded(Images)
    fit(tmp_path, module, GrassmannHead(2), max_epochs=1, data=loader(16))
    head = module.net.get_classifier()
    assert isinstance(head, GrassmannLinear)
    assert orthonormality_error(head.basis.detach()).max() < 1e-5


def test_a_compiled_network(tmp_path):
    module = seeded(Momentum)
    module.net = torch.compile(module.net, backend="eager")
    module(torch.zeros(2, 4))  # traced with the old head
    fit(tmp_path, module, GrassmannHead(2))
    head_of(module)
    assert module(torch.randn(9, 4)).min() >= 0  # logits of subspaces are lengths


def test_the_learning_rate_finder_steps_along_the_manifold(tmp_path):
    module, callback, seen = seeded(Momentum), GrassmannHead(2), []
    module.net.fc.register_forward_hook(lambda *_: None)

    class Watched(Momentum):
        def training_step(self, batch, batch_idx):
            seen.append(float(orthonormality_error(self.net.fc.basis.detach()).max()))
            return super().training_step(batch, batch_idx)

    module = seeded(Watched)
    run = trainer(tmp_path, callbacks=[callback])
    Tuner(run).lr_find(module, loader(64), num_training=5, update_attr=False)
    assert len(seen) >= 5
    assert max(seen) < 1e-5


@pytest.mark.parametrize("average", [cls for cls in (EMAWeightAveraging, StochasticWeightAveraging) if cls])
def test_averaged_weights_end_on_the_manifold_and_are_validated_there(tmp_path, average):
    errors = []

    class Watched(Momentum):
        def validation_step(self, batch, batch_idx):
            errors.append(float(orthonormality_error(self.net.fc.basis.detach()).max()))

    module = seeded(Watched, lr=0.5)
    options = {"swa_lrs": 0.5} if average is StochasticWeightAveraging else {"decay": 0.5}
    fit(tmp_path, module, GrassmannHead(2), average(**options), max_epochs=5)
    head_of(module)
    assert max(errors) < 1e-4


def test_an_averaging_callback_before_the_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="put GrassmannHead before it"):
        fit(tmp_path, seeded(Momentum), StochasticWeightAveraging(swa_lrs=0.1), GrassmannHead(2))


def test_an_optimizer_made_anew_during_fit_is_followed(tmp_path):
    class Anew(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.strategy.optimizers = [torch.optim.SGD(pl_module.parameters(), lr=0.3)]

    module = seeded(Plain)
    fit(tmp_path, module, GrassmannHead(2), Anew())
    head_of(module)


def test_lr_monitor_names_and_groups_stay(tmp_path):
    columns = []
    for callbacks in ([], [GrassmannHead(2)]):
        monitor = LearningRateMonitor()
        logger = CSVLogger(tmp_path)
        fit(tmp_path, seeded(Momentum), *callbacks, monitor, logger=logger, log_every_n_steps=1)
        columns.append(list(monitor.lrs))
    assert columns[0] == columns[1] == ["lr-SGD"]


class Hidden(torch.optim.SGD):
    """Wraps another optimizer and calls its step without the hooks that stand on itself, as old Lookaheads do."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups[0]["params"], lr=1.0)

    def step(self, closure=None):
        return self.inner.step(closure)

    step.hooked = True  # torch takes it for wrapped already, so no hook is ever called


@pytest.mark.parametrize(
    ("optimizer", "error", "text"),
    [
        (lambda ps: torch.optim.LBFGS(ps), ValueError, "class subspaces cannot follow LBFGS"),
        (lambda ps: Hidden(torch.optim.SGD(ps, lr=1.0)), RuntimeError, r"left the manifold \(orthonormality error"),
    ],
)
def test_optimizers_that_cannot_be_followed(tmp_path, optimizer, error, text):
    class Strange(Plain):
        def configure_optimizers(self):
            return optimizer(list(self.parameters()))

    with pytest.raises(error, match=text):
        fit(tmp_path, seeded(Strange), GrassmannHead(2))


def test_a_head_that_no_optimizer_trains_is_refused(tmp_path):
    class Forgets(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.body.parameters(), lr=0.1)

    with pytest.raises(RuntimeError, match=r"no optimizer trains the class subspaces of net.fc"):
        fit(tmp_path, seeded(Forgets), GrassmannHead(2))


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"layer": "net.body.1"}, "the classifier net.body.1 is a ReLU, not an nn.Linear"),
        ({"layer": "net.fcc"}, "has no layer 'net.fcc'. Nearest: net.fc"),
        ({"subspace_dim": 9}, "subspace_dim=9 must lie between 1 and the width of the features, 8"),
    ],
)
def test_impossible_heads_are_refused_and_the_module_is_whole(tmp_path, kwargs, text):
    module = seeded(Momentum)
    with pytest.raises(ValueError, match=text):
        fit(tmp_path, module, GrassmannHead(**kwargs))
    assert type(module.net.fc) is nn.Linear
    assert not any(name.startswith("_feat") for name in module.__dict__)
    fit(tmp_path, module)  # and can be trained as before


def test_the_same_head_twice_is_refused_and_on_two_layers_welcome(tmp_path):
    with pytest.raises(ValueError, match=r"the Trainer has GrassmannHead\[classifier\] twice"):
        fit(tmp_path, seeded(Momentum), GrassmannHead(2), GrassmannHead(3))

    class TwoHeads(Plain):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(8, 4)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.other(self.net.body(batch[0])).mean()

    module = seeded(TwoHeads)
    fit(tmp_path, module, GrassmannHead(2, layer="net.fc"), GrassmannHead(3, layer="other"))
    assert (module.net.fc.subspace_dim, module.other.subspace_dim) == (2, 3)
    assert orthonormality_error(module.other.basis.detach()).max() < 1e-5


def test_subspace_dim_below_one_is_refused_at_once():
    with pytest.raises(ValueError, match="subspace_dim=0 must be at least 1"):
        GrassmannHead(0)


class Unnamed(pl.LightningModule):
    """Its only Linear, the classifier, has no name that tells; once replaced there is no Linear at all."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.out(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_only_linear_is_found_again_after_the_swap(tmp_path):
    module = Unnamed()
    run = trainer(tmp_path, callbacks=[GrassmannHead(2), NeuralCollapseMonitor()])
    run.fit(module, loader(32))
    assert isinstance(module.out, GrassmannLinear)
    assert "grassmann/orthonormality_error/out" in run.callback_metrics


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_flatten_or_offload_are_refused_with_the_way_out(tmp_path, name):
    run = trainer(tmp_path, callbacks=[GrassmannHead(2)], strategy=type(name, (SingleDeviceStrategy,), {})("cpu"))
    module = seeded(Plain)
    with pytest.raises(ValueError, match=f"{name} flattens or offloads .* use strategy='ddp', or FSDP2"):
        run.fit(module, loader(16))
    assert isinstance(module.net.fc, nn.Linear)


class Follows(Momentum):
    """Calls follow_subspaces itself, beside the callback."""

    def configure_optimizers(self):
        optimizers, schedulers = super().configure_optimizers()
        follow_subspaces(optimizers[0], self)
        return optimizers, schedulers


def test_a_module_that_follows_by_itself_is_left_to_it(tmp_path):
    once, twice = seeded(Momentum), seeded(Follows)
    for module in (once, twice):
        pl.seed_everything(1)
        fit(tmp_path, module, GrassmannHead(2))
    assert equal(weights(once), weights(twice))


class Diverges(Momentum):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * torch.nan


def test_a_diverged_run_goes_on(tmp_path):
    run = fit(tmp_path, seeded(Diverges), GrassmannHead(2))
    assert run.current_epoch == 3
    assert run.callback_metrics["grassmann/smallest_angle/net.fc"].isnan()


def test_a_frozen_classifier_stays_frozen(tmp_path):
    module = seeded(Plain)
    module.net.fc.requires_grad_(False)
    fit(tmp_path, module, GrassmannHead(2))
    assert not module.net.fc.basis.requires_grad
