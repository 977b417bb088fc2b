"""Callbacks in trainings of modules that were published by others: monitors leave them alone, and are right."""

import importlib
import math
import warnings

import pytest
import torch

from lightning_feat import callbacks as cb
from tests.clients.client import BATCH, NUM_CLASSES, loaders
from tests.clients.clients import CLIENTS
from tests.helpers import equal, trainer, weights

pytestmark = pytest.mark.slow

CLASSIFIERS = [name for name, client in CLIENTS.items() if client.classifies]
VALUE = "nc1_quotient"
UNDEFINED_IN_FEW = {"vci"}  # nan up to as many samples as features have entries


def counted(client):
    return client.of_features() | ({} if client.classifies and client.head is None else {"num_classes": NUM_CLASSES})


MONITORS = {
    "online": lambda client: [cb.NeuralCollapseMonitor(**counted(client))],
    "exact": lambda client: [cb.NeuralCollapseMonitor(mode="exact", **counted(client))],
    "shift": lambda client: [cb.FeatureShiftMonitor(layers=shift_layer(client), pooling="mean", **client.shift)],
    "probe": lambda client: [cb.LinearProbe(every_n_epochs=1, **client.of_features())],
    "reports": lambda client: [cb.MetricHistory(), cb.CurvePlotter(), cb.SummaryTable()],
}


def fit(client, root, callbacks=(), epochs=2):
    """The module after training, the data, and what was logged."""
    torch.manual_seed(0)
    module, data = client.build()
    Trainer = importlib.import_module(client.root).Trainer
    run = Trainer(
        default_root_dir=root,
        max_epochs=epochs,
        callbacks=[*callbacks],
        accelerator="cpu",
        devices=1,
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, loaders(data), loaders(data) if client.eval_step else None)
    return module, data, {name: float(value) for name, value in run.callback_metrics.items()}


@pytest.fixture(params=CLIENTS)
def client(request):
    client = CLIENTS[request.param]
    pytest.importorskip(client.package)
    return client


def shift_layer(client):
    """A layer of the features that the shift is measured on; the input of a classifier has no name."""
    module, _ = client.build()
    return client.layer or next(name for name, part in module.named_modules() if [*part.parameters(recurse=False)])


def test_monitors_leave_the_training_alone(client, tmp_path):
    plain, _, _ = fit(client, tmp_path)
    for name, build in MONITORS.items():
        if name == "probe" and not client.eval_step:
            continue  # it tests on validation data, and there are none
        watched, _, logged = fit(client, tmp_path, build(client))
        assert equal(weights(plain), weights(watched)), name
        ours = {k: v for k, v in logged.items() if k.startswith(("neural", "feature", "linear"))}
        assert name == "reports" or ours, name
        undefined = {k.split("/")[1] for k, v in ours.items() if not math.isfinite(v)}
        assert undefined <= UNDEFINED_IN_FEW, name


def test_the_exact_monitor_says_what_the_definition_gives(client, tmp_path):
    monitor = cb.NeuralCollapseMonitor(mode="exact", measures=[VALUE], **counted(client))
    module, data, logged = fit(client, tmp_path, [monitor])
    (value,) = [v for name, v in logged.items() if f"/{VALUE}/" in name]
    module.eval()
    parts, labels = [], []
    with torch.no_grad():
        for batch in loaders(data):
            features = client.features(module, batch).double()
            y = client.labels_of(batch)
            parts.append(features)
            labels.append(y.repeat(len(features) // len(y)))
    x, y = torch.cat(parts), torch.cat(labels)
    means = torch.stack([x[y == c].mean(0) for c in range(NUM_CLASSES)])
    within = (x - means[y]).square().sum(1).mean()
    between = (means - means.mean(0)).square().sum(1).mean()
    assert value == pytest.approx(float(within / between), rel=1e-4)  # features in float32


@pytest.mark.parametrize("head", ["grassmann", "simplex"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_head_is_put_in_and_trained_around(name, head, tmp_path):
    client = CLIENTS[name]
    pytest.importorskip(client.package)
    grassmann = [cb.GrassmannHead(2, layer=client.head), cb.GrassmannMonitor(target_key=client.labels)]
    made = {"grassmann": grassmann, "simplex": [cb.SimplexETFHead(layer=client.head)]}[head]
    module, _, logged = fit(client, tmp_path, made)
    assert all(torch.isfinite(w).all() for w in weights(module))
    kinds = {type(part).__name__ for part in module.modules()}
    assert {"grassmann": "GrassmannLinear", "simplex": "SimplexETF"}[head] in kinds
    assert head != "grassmann" or any(k.startswith("grassmann") for k in logged)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_upsampler_finds_its_way(name, tmp_path):
    client = CLIENTS[name]
    pytest.importorskip(client.package)
    upsampler = cb.SimplicityBiasUpsampler(
        separating_epoch=1, restart=False, layer=client.head, target_key=client.labels
    )
    plain, _, _ = fit(client, tmp_path)
    module, _, _ = fit(client, tmp_path, [upsampler])
    assert all(torch.isfinite(w).all() for w in weights(module))
    assert not equal(weights(plain), weights(module))


def test_a_plan_and_a_regularizer_change_what_is_trained(client, tmp_path):
    plain, data, _ = fit(client, tmp_path)
    planned, _, _ = fit(client, tmp_path, [cb.DataPlan([2] * BATCH + [1] * (len(data) - BATCH))])
    assert not equal(weights(plain), weights(planned))
    if plain.automatic_optimization:
        small = cb.FeatureRegularizer(lambda x, y: x.square().mean(), "small", **client.of_features())
        held, _, _ = fit(client, tmp_path, [small])
        assert not equal(weights(plain), weights(held))


def test_a_layer_that_manual_optimization_never_runs_is_said(tmp_path):
    torch.manual_seed(0)
    module, data = CLIENTS["GAN"].build()
    run = trainer(tmp_path, callbacks=[cb.NeuralCollapseMonitor(layer="unused", num_classes=NUM_CLASSES)])
    with pytest.warns(UserWarning, match="heard nothing in epoch 0, and logs nothing"):
        run.fit(module, loaders(data))


def test_a_head_without_a_classifier_is_refused_before_training(tmp_path):
    client = CLIENTS["CLIP"]
    pytest.importorskip(client.package)
    with pytest.raises(ValueError, match=r"no layer that is plainly the classifier|several layers that could be"):
        fit(client, tmp_path, [cb.SimplexETFHead()])
