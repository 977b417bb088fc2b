"""A module that brings callbacks: the same run as with these callbacks in the Trainer, and nothing lost or doubled."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_feat.callbacks import (
    FeatureRegularizer,
    GrassmannHead,
    GrassmannMonitor,
    LinearProbe,
    NeuralCollapseMonitor,
    NeuralCollapseRegularizer,
    SimplexETFHead,
)
from lightning_feat.layers import GrassmannLinear, SimplexETF
from lightning_feat.mixins import (
    CallbacksMixin,
    FeatureShiftMixin,
    GrassmannMixin,
    NeuralCollapseMixin,
    PromptMixin,
    SimplexETFMixin,
    SimplicityBiasMixin,
)
from tests.helpers import EMAWeightAveraging, Plain, equal, loader, trainer, weights


class Classes(GrassmannMixin, NeuralCollapseMixin, Plain):
    grassmann_head = {"subspace_dim": 2}
    neural_collapse_regularizer = {"pull_weight": 0.1, "push_weight": 0.01}


def in_the_trainer():
    return [
        GrassmannHead(subspace_dim=2),
        NeuralCollapseMonitor(),
        NeuralCollapseRegularizer(pull_weight=0.1, push_weight=0.01),
    ]


def fitted(tmp_path, module_class, *callbacks, epochs=2, ckpt_path=None, **module_options):
    pl.seed_everything(0, verbose=False)
    module = module_class(**module_options)
    run = trainer(tmp_path, max_epochs=epochs, callbacks=[*callbacks])
    run.fit(module, loader(), ckpt_path=ckpt_path)
    return module, run


def names(callbacks):
    return [type(callback).__name__ for callback in callbacks]


@pytest.mark.parametrize("manual", [False, True])
def test_stacked_mixins_are_the_callbacks_in_a_trainer(tmp_path, manual):
    module, run = fitted(tmp_path, Classes, manual=manual)
    other, by_trainer = fitted(tmp_path, Plain, *in_the_trainer(), manual=manual)
    assert equal(weights(module), weights(other))
    assert isinstance(module.net.fc, GrassmannLinear)
    logged = {name for name in by_trainer.callback_metrics if "/" in name}
    assert len(logged) > 10
    for name, value in by_trainer.callback_metrics.items():
        assert torch.equal(run.callback_metrics[name], value), name


def test_each_family_has_its_mixin():
    mixins = {
        GrassmannMixin: ["GrassmannHead"],
        NeuralCollapseMixin: ["NeuralCollapseMonitor"],
        SimplexETFMixin: ["SimplexETFHead"],
        SimplicityBiasMixin: ["SimplicityBiasUpsampler"],
        FeatureShiftMixin: ["FeatureShiftMonitor"],
        PromptMixin: ["PromptLearner"],
    }
    for mixin, expected in mixins.items():
        module = type("Mine", (mixin, Plain), {"feature_shift_monitor": {"layers": "net.body"}})()
        assert names(module.configure_callbacks()) == expected


def test_options_by_one_call_in_init():
    class Mine(GrassmannMixin, NeuralCollapseMixin, Plain):
        def __init__(self, dim):
            super().__init__()
            self.use(grassmann_head={"subspace_dim": dim}, grassmann_monitor={}, neural_collapse_monitor=None)

    head, monitor = Mine(3).configure_callbacks()
    assert head.head_options["subspace_dim"] == 3
    assert isinstance(monitor, GrassmannMonitor)
    assert Mine(2).configure_callbacks()[0].head_options["subspace_dim"] == 2


def test_an_option_that_no_mixin_has_is_refused():
    class Mine(GrassmannMixin, Plain):
        def __init__(self):
            super().__init__()
            self.use(grasmann_head={})

    with pytest.raises(TypeError, match="no option 'grasmann_head'; it has: grassmann_head, grassmann_monitor"):
        Mine()


def test_use_after_the_callbacks_are_made_is_refused():
    module = Classes()
    module.configure_callbacks()
    with pytest.raises(RuntimeError, match=r"call use\(\.\.\.\) in __init__"):
        module.use(grassmann_head={"subspace_dim": 1})


def test_bring_before_init_and_bring_of_options_say_so():
    class Early(CallbacksMixin, Plain):
        def __init__(self):
            self.bring(LinearProbe())

    with pytest.raises(RuntimeError, match=r"call super\(\).__init__\(\) before"):
        Early()
    with pytest.raises(TypeError, match=r"bring takes callbacks, got \{"):
        Classes().bring({"subspace_dim": 2})


def test_mixins_behind_lightning_module_are_refused_where_the_class_is_made():
    with pytest.raises(TypeError, match="put the mixins before LightningModule"):
        type("Mine", (Plain, GrassmannMixin), {})


class Own(Classes):
    """Has callbacks of its own, and does not call super()."""

    def configure_callbacks(self):
        return pl.callbacks.EarlyStopping("val/loss")


class OwnWithSuper(Classes):
    def configure_callbacks(self):
        return [*super().configure_callbacks(), pl.callbacks.EarlyStopping("val/loss")]


class Base(Plain):
    def configure_callbacks(self):
        return [pl.callbacks.EarlyStopping("val/loss")]


class OwnInBase(GrassmannMixin, NeuralCollapseMixin, Base):
    neural_collapse_regularizer = {}


@pytest.mark.parametrize("module_class", [Own, OwnWithSuper, OwnInBase])
def test_a_users_own_configure_callbacks_adds_to_them(tmp_path, module_class):
    expected = [*names(in_the_trainer()), "EarlyStopping"]
    assert names(module_class().configure_callbacks()) == expected
    replaced = pl.callbacks.EarlyStopping("val/loss", patience=7)  # Lightning's rule: the module's takes its place
    run = trainer(tmp_path, callbacks=[replaced])
    run.fit(module_class(), loader(), loader())
    there = [c for c in run.callbacks if type(c).__name__ in expected]
    assert names(there) == expected
    assert replaced not in run.callbacks


def test_callbacks_of_the_trainer_stay_also_of_the_same_class(tmp_path):
    beside = NeuralCollapseMonitor(layer="net.body")
    _, run = fitted(tmp_path, Classes, beside)
    assert beside in run.callbacks
    assert "neural_collapse/cdnv/net.body" in run.callback_metrics
    assert "neural_collapse/cdnv/penultimate" in run.callback_metrics


def test_two_of_a_class_on_one_layer_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"GrassmannHead\[classifier\] twice"):
        fitted(tmp_path, Classes, GrassmannHead(subspace_dim=3))


def test_every_stage_and_every_trainer_has_the_same_callbacks(tmp_path):
    module, run = fitted(tmp_path, Classes)
    mine = module.brought_callbacks()
    assert run.callbacks[: len(mine)] == mine
    run.test(module, loader(), verbose=False)
    run.validate(module, loader(), verbose=False)
    assert run.callbacks[: len(mine)] == mine
    assert len(set(map(id, run.callbacks))) == len(run.callbacks)
    again = trainer(tmp_path)
    again.fit(module, loader())
    assert again.callbacks[: len(mine)] == mine


def test_one_trainer_for_two_modules_does_not_keep_those_of_the_first(tmp_path):
    first, run = fitted(tmp_path, Classes)
    second = Classes()
    run.fit_loop.max_epochs = 4
    run.fit(second, loader())
    assert not set(map(id, first.brought_callbacks())) & set(map(id, run.callbacks))


def test_a_checkpoint_goes_on_by_mixin_or_in_the_trainer(tmp_path):
    whole, _ = fitted(tmp_path, Classes, epochs=4)
    _, half = fitted(tmp_path, Classes, epochs=2)
    half.save_checkpoint(tmp_path / "by_mixin.ckpt")
    _, half = fitted(tmp_path, Plain, *in_the_trainer(), epochs=2)
    half.save_checkpoint(tmp_path / "by_trainer.ckpt")
    for path in ("by_mixin.ckpt", "by_trainer.ckpt"):
        module, _ = fitted(tmp_path, Classes, epochs=4, ckpt_path=tmp_path / path)
        assert equal(weights(module), weights(whole)), path
    module, _ = fitted(tmp_path, Plain, *in_the_trainer(), epochs=4, ckpt_path=tmp_path / "by_mixin.ckpt")
    assert equal(weights(module), weights(whole))


class Simplex(SimplexETFMixin, Plain):
    pass


class LateHead(GrassmannMixin, pl.LightningModule):
    """Builds its network late."""

    grassmann_head = {"subspace_dim": 2, "layer": "net.2"}

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("module_class", "head"), [(Classes, GrassmannLinear), (Simplex, SimplexETF), (LateHead, GrassmannLinear)]
)
def test_load_from_checkpoint_has_the_head(tmp_path, module_class, head):
    module, run = fitted(tmp_path, module_class)
    run.save_checkpoint(tmp_path / "end.ckpt")
    loaded = module_class.load_from_checkpoint(tmp_path / "end.ckpt")
    assert sum(isinstance(part, head) for part in loaded.modules()) == 1
    x = loader().dataset.tensors[0]
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    fresh = module_class()
    if module_class is not LateHead:
        fresh.load_state_dict(torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"])
        assert torch.equal(fresh.eval()(x), module(x))
    trainer(tmp_path, max_epochs=1).fit(loaded, loader())  # and it goes on from there
    assert sum(isinstance(part, head) for part in loaded.modules()) == 1


def test_a_plain_state_dict_loads_into_the_classifier_that_is_there():
    plain, module = Plain(), Classes()
    module.load_state_dict(plain.state_dict())
    assert torch.equal(module.net.fc.weight, plain.net.fc.weight)


def test_copies_and_pickles_bring_callbacks_of_their_own(tmp_path):
    module, _ = fitted(tmp_path, Classes)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert names(other.configure_callbacks()) == names(in_the_trainer())
        assert not set(map(id, other.brought_callbacks())) & set(map(id, module.brought_callbacks()))
        trainer(tmp_path).fit(other, loader())


@pytest.mark.skipif(EMAWeightAveraging is None, reason="this Lightning has no EMA")
def test_averaging_of_the_trainer_comes_after_the_head(tmp_path):
    module, run = fitted(tmp_path, Classes, EMAWeightAveraging())
    assert names(run.callbacks).index("GrassmannHead") < names(run.callbacks).index("EMAWeightAveraging")
    assert isinstance(module.net.fc, GrassmannLinear)


def test_any_other_callback_can_be_brought(tmp_path):
    class Mine(CallbacksMixin, Plain):
        def __init__(self):
            super().__init__()
            self.bring(FeatureRegularizer(lambda h: h.square().mean(), "norm", weight=0.1), SimplexETFHead())

    _, run = fitted(tmp_path, Mine)
    assert run.callback_metrics["norm/loss/penultimate"] > 0
