"""On which weights a monitor looks, beside a callback that averages them."""

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging

from lightning_feat.callbacks import (
    GrassmannHead,
    GrassmannMonitor,
    LinearProbe,
    MixupGeometryMonitor,
    NeuralCollapseMonitor,
)
from lightning_feat.metrics.grassmann import subspace_geometry
from tests.helpers import Disturbed, EMAWeightAveraging, Plain, equal, loader, trainer, weights

pytestmark = pytest.mark.skipif(EMAWeightAveraging is None, reason="this Lightning has no averaging of its own")
MAKES = {
    "neural_collapse/": lambda **more: NeuralCollapseMonitor("net.fc", "input", mode="exact", measures=["*"], **more),
    "linear_probe/": lambda **more: LinearProbe("net.fc", "input", penalties=[0.01, 0.1], **more),
    "mixup_geometry/": lambda **more: MixupGeometryMonitor(num_pairs=16, **more),
}


class Worse(Plain):
    """Early stopping, which has its turn after all others, ends it."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", -float(self.current_epoch))


def fitted(tmp_path, *callbacks, module=Plain, lr=0.1, **kwargs):
    pl.seed_everything(0)
    module = module()
    module.lr = lr
    run = trainer(tmp_path, callbacks=list(callbacks), **{"max_epochs": 3, **kwargs})
    run.fit(module, loader(48, 8), loader(24, 8))
    return module, {name: float(value) for name, value in run.callback_metrics.items()}


def logged(values, prefix):
    mine = {name: value for name, value in values.items() if name.startswith(prefix)}
    assert mine
    return mine


@pytest.mark.parametrize("prefix", MAKES)
def test_averaged_weights_are_those_that_the_run_ends_with(tmp_path, prefix):
    """Lightning puts the average into the module when training ends; a run that starts there sees it."""
    ema = EMAWeightAveraging(decay=0.8)
    module, values = fitted(tmp_path, MAKES[prefix](weights="averaged"), ema, module=Disturbed)
    ended, module.lr = weights(module), 0.0
    run = trainer(tmp_path, callbacks=[MAKES[prefix]()])
    module.net.body[1].momentum = 0.0  # nor do the statistics of BatchNorm move
    run.fit(module, loader(48, 8), loader(24, 8))
    assert equal(ended, weights(module))
    expected = {name: float(value) for name, value in run.callback_metrics.items()}
    assert logged(values, prefix) == pytest.approx(logged(expected, prefix), rel=0, abs=0, nan_ok=True)


def test_current_weights_are_those_without_an_average_and_the_run_is_not_changed_by_a_look(tmp_path):
    ema = {"decay": 0.8}
    _, alone = fitted(tmp_path, MAKES["neural_collapse/"](), module=Disturbed)
    beside, values = fitted(tmp_path, MAKES["neural_collapse/"](), EMAWeightAveraging(**ema), module=Disturbed)
    looked, others = fitted(
        tmp_path, MAKES["neural_collapse/"](weights="averaged"), EMAWeightAveraging(**ema), module=Disturbed
    )
    assert logged(values, "neural_collapse/") == pytest.approx(logged(alone, "neural_collapse/"), rel=0, nan_ok=True)
    assert equal(weights(beside), weights(looked))
    assert logged(others, "neural_collapse/") != pytest.approx(logged(alone, "neural_collapse/"), rel=0.01, nan_ok=True)


def test_each_has_its_weights_where_they_stand_side_by_side(tmp_path):
    both = [MAKES["linear_probe/"](weights="averaged"), MAKES["neural_collapse/"](), MAKES["mixup_geometry/"]()]
    _, together = fitted(tmp_path, *both, EMAWeightAveraging(decay=0.8))
    for callback, prefix in zip(both, ("linear_probe/", "neural_collapse/", "mixup_geometry/"), strict=True):
        _, alone = fitted(tmp_path, MAKES[prefix](weights=callback.weights), EMAWeightAveraging(decay=0.8))
        assert logged(together, prefix) == pytest.approx(logged(alone, prefix), rel=0, abs=0, nan_ok=True)


def test_subspaces_are_those_that_the_run_ends_with_back_on_their_manifold(tmp_path):
    unseen = {"limit_val_batches": 0}  # a validation would project the average
    monitor = GrassmannMonitor(mode="exact", weights="averaged")
    module, values = fitted(tmp_path, GrassmannHead(2), monitor, EMAWeightAveraging(decay=0.5), lr=2.0, **unseen)
    _, expected = subspace_geometry(module.net.fc.basis.detach(), monitor.start, 1000, 0, alone=False)
    for name, value in expected.items():
        if name != "orthonormality_error":
            assert values[f"grassmann/{name}/net.fc"] == pytest.approx(float(value), rel=1e-5), name
    current = GrassmannHead(2), GrassmannMonitor(mode="exact"), EMAWeightAveraging(decay=0.5)
    _, others = fitted(tmp_path, *current, lr=2.0, **unseen)
    name = "grassmann/distance_from_start_mean/net.fc"
    assert abs(others[name] - values[name]) > 0.01 * values[name]


def test_a_probe_that_catches_up_behind_an_average_says_whose_value_it_is(tmp_path):
    stopping = EarlyStopping("val/loss", mode="max", patience=1)
    with pytest.warns(UserWarning, match="List that callback last"):
        fitted(
            tmp_path, EMAWeightAveraging(decay=0.8), LinearProbe(penalties=[0.1]), stopping, module=Worse, max_epochs=9
        )


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([], "no callback averages weights: add EMAWeightAveraging"),
        ([StochasticWeightAveraging(swa_lrs=0.1)], "StochasticWeightAveraging has no average before its run ends"),
    ],
)
def test_where_there_is_no_average_it_is_said_at_once(tmp_path, callbacks, message):
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path, LinearProbe(weights="averaged"), *callbacks)


@pytest.mark.parametrize("monitor", [NeuralCollapseMonitor, GrassmannMonitor])
def test_an_online_monitor_has_no_choice(monitor):
    with pytest.raises(ValueError, match="choose mode='exact'"):
        monitor(weights="averaged")


class AtEpochEnds(EMAWeightAveraging or object):
    """Takes the weights in at the end of each epoch."""

    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None


@pytest.mark.parametrize("prefix", MAKES)
def test_an_average_of_epochs_comes_first_and_is_refused_behind(tmp_path, prefix):
    monitor = MAKES[prefix](weights="averaged")
    module, found = fitted(tmp_path, AtEpochEnds(decay=0.5), monitor)
    same = MAKES[prefix]()
    run = trainer(tmp_path, callbacks=[same], max_epochs=1)
    module.lr = 0.0
    run.fit(module, loader(48, 8), loader(24, 8))  # the module that the run ended with is the average
    for name, value in run.callback_metrics.items():
        if name.startswith(prefix):
            assert found[name] == pytest.approx(float(value), rel=1e-6, nan_ok=True), name
    with pytest.raises(ValueError, match="put AtEpochEnds before"):
        fitted(tmp_path, MAKES[prefix](weights="averaged"), AtEpochEnds(decay=0.5))
