import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_feat.callbacks import GrassmannHead, NeuralCollapseMonitor
from lightning_feat.functional.neural_collapse import center_sums, class_centers, class_sums, collapse_measures
from tests.helpers import DictBatches, Disturbed, Plain, equal, loader, points, trainer, weights

PREFIX, LABEL = "neural_collapse/", "/penultimate"


class Noisy(Disturbed):
    """With a metric of its own: everything that a careless pass over the data would disturb."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("train/accuracy", self.accuracy, on_epoch=True)
        return cross_entropy(logits, y)


def fit(tmp_path, module, *callbacks, data=None, val=None, **kwargs):
    run = trainer(tmp_path, callbacks=list(callbacks), **{"max_epochs": 3, **kwargs})
    run.fit(module, loader(64, shuffle=True) if data is None else data, loader(20) if val is None else val)
    return run


def seeded(cls, **kwargs):
    pl.seed_everything(0)
    return cls(**kwargs)


def definition(module, data):
    """The measures of the network as it stands, over all samples at once."""
    module.eval()
    with torch.no_grad():
        x, y = data.tensors
        features = module.net.body(x)
        logits = module.net.fc(features)
        totals = class_sums(features, y, 3)
        residuals = center_sums(features, y, logits, class_centers(totals))
        return collapse_measures(totals, residuals=residuals, weight=module.net.fc.weight, bias=module.net.fc.bias)


def logged(run, prefix=PREFIX, label=LABEL):
    return {
        name[len(prefix) : -len(label)]: value.double()
        for name, value in run.callback_metrics.items()
        if name.startswith(prefix) and name.endswith(label)
    }


@pytest.mark.parametrize("budget", [1024.0, 0.0])  # features kept, and run over twice
def test_exact_is_the_definition_at_the_weights_of_the_epochs_end(tmp_path, budget):
    module = seeded(Noisy)
    monitor = NeuralCollapseMonitor(mode="exact", data="both", measures=["*"], memory_budget_mb=budget)
    run = fit(tmp_path, module, monitor)
    for prefix, data in ((PREFIX, points(64)), ("neural_collapse_val/", points(20))):
        expected = definition(module, data)
        values = logged(run, prefix)
        assert set(values) == set(expected)
        for name, value in expected.items():  # batches of 8 and all at once differ by float32 rounding in the features
            torch.testing.assert_close(
                values[name], value.double(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("mode", ["online", "exact"])
def test_the_training_is_bit_for_bit_what_it_is_without_the_monitor(tmp_path, mode):
    ends = []
    for callbacks in ([], [NeuralCollapseMonitor(mode=mode)]):
        module = seeded(Noisy)
        run = fit(tmp_path, module, *callbacks)
        buffers = [b.clone() for b in module.buffers()]
        ends.append((weights(module) + buffers, run.callback_metrics["train/accuracy_epoch"], torch.rand(3)))
    assert equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert torch.equal(ends[0][2], ends[1][2])


def test_online_sums_the_training_batches_as_they_pass(tmp_path):
    seen = []

    class Recording(Plain):
        def training_step(self, batch, batch_idx):
            seen.append((self.net.body(batch[0]).detach(), batch[1]))
            return super().training_step(batch, batch_idx)

    module = seeded(Recording)
    run = fit(tmp_path, module, NeuralCollapseMonitor(measures=["cdnv", "nc1_quotient"]), max_epochs=2)
    features, targets = (torch.cat(parts) for parts in zip(*seen[8:], strict=True))  # the second epoch
    expected = collapse_measures(class_sums(features, targets, 3))
    for name, value in logged(run).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=0)  # logged in float32


def test_online_hears_one_pass_of_an_optimizer_that_runs_its_closure_twice(tmp_path):
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            return super().step(closure)

    class Sam(Plain):
        def configure_optimizers(self):
            return Twice(self.parameters(), lr=0.0)

    run = fit(tmp_path, seeded(Sam), NeuralCollapseMonitor(measures=["cdnv"]), max_epochs=1)
    still = fit(tmp_path, seeded(Plain, lr=0.0), NeuralCollapseMonitor(measures=["cdnv"]), max_epochs=1)
    assert logged(run) == logged(still)


@pytest.mark.parametrize("mode", ["online", "exact"])
def test_a_grassmann_head_is_measured_by_its_subspaces(tmp_path, mode):
    run = fit(tmp_path, seeded(Plain), GrassmannHead(2), NeuralCollapseMonitor(mode=mode))
    names = set(logged(run))
    assert {"nc2_subspace_chordal_cv", "nc2_subspace_spread", "nc3_subspace_angle"} <= names
    assert not {"nc0", "nc3"} & names
    assert ("nc4_mismatch" in names) == (mode == "exact")


def test_several_layers_at_once_and_only_the_last_has_a_classifier(tmp_path):
    run = fit(tmp_path, seeded(Plain), NeuralCollapseMonitor(layer=["net.body.0", "net.body.1"], mode="exact"))
    assert "nc3" in logged(run, label="/net.body.1")
    assert "nc3" not in logged(run, label="/net.body.0")
    assert "nc1_pinv_over_k" in logged(run, label="/net.body.0")


def test_batches_of_another_form(tmp_path):
    class FromDict(Plain):
        def training_step(self, batch, batch_idx):
            return cross_entropy(self(batch["image"]), batch["label"])

        def validation_step(self, batch, batch_idx):
            self.training_step(batch, batch_idx)

    data = DataLoader(DictBatches(points()), batch_size=8)
    monitor = NeuralCollapseMonitor(mode="exact", forward=lambda module, batch: module(batch["image"]))
    module = seeded(FromDict)
    run = fit(tmp_path, module, monitor, data=data, val=data)
    expected = definition(module, points())
    torch.testing.assert_close(logged(run)["cdnv"], expected["cdnv"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["online", "exact"])
def test_per_token_targets_with_an_ignored_index(tmp_path, mode):
    class Tokens(Plain):
        def forward(self, x):
            return self.net.fc(self.net.body(x.unflatten(1, (2, 2)).repeat(1, 1, 2)))

        def training_step(self, batch, batch_idx):
            x, y = batch
            return cross_entropy(self(x).flatten(0, 1), y.flatten())

    x, y = points(32).tensors
    y = torch.stack([y, y.roll(1)], 1)
    y[::3, 1] = -100
    data = DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    module = seeded(Tokens, lr=0.0)
    monitor = NeuralCollapseMonitor(mode=mode, pooling="tokens", measures=["cdnv"])
    run = trainer(tmp_path, callbacks=[monitor])
    run.fit(module, data)
    features = module.net.body(x.unflatten(1, (2, 2)).repeat(1, 1, 2)).detach().flatten(0, 1)
    keep = y.flatten() >= 0
    expected = collapse_measures(class_sums(features[keep], y.flatten()[keep], 3))["cdnv"]
    torch.testing.assert_close(logged(run)["cdnv"], expected, rtol=1e-6, atol=0)


def test_soft_labels_weigh_the_sums(tmp_path):
    class Soft(Plain):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return x, 0.8 * nn.functional.one_hot(y, 3).float() + 0.2 / 3

    module = seeded(Soft, lr=0.0)
    run = fit(tmp_path, module, NeuralCollapseMonitor(measures=["cdnv"]), max_epochs=1)
    x, y = points(64).tensors
    soft = 0.8 * nn.functional.one_hot(y, 3).float() + 0.2 / 3
    expected = collapse_measures(class_sums(module.net.body(x).detach(), soft, 3))["cdnv"]
    torch.testing.assert_close(logged(run)["cdnv"], expected, rtol=1e-5, atol=0)


def test_a_module_that_mixes_its_training_batches_is_passed_over_unmixed(tmp_path):
    class Mixes(Plain):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return (x + 100.0, y) if self.trainer.training else (x, y)

    module = seeded(Mixes, lr=0.0)
    run = fit(tmp_path, module, NeuralCollapseMonitor(mode="exact"), max_epochs=1)
    torch.testing.assert_close(logged(run)["cdnv"], definition(module, points(64))["cdnv"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("every", "epochs", "expected"),
    [(1, 3, [1, 2, 3]), (2, 5, [1, 2, 4, 5]), (4, 3, [1, 3]), ("log", 13, [1, 2, 3, 4, 6, 8, 12, 13])],
)
def test_the_epochs_of_exact_passes(tmp_path, every, epochs, expected):
    done = []

    class Counting(NeuralCollapseMonitor):
        def _measure(self, trainer, *args):
            done.append(trainer.current_epoch + 1)

    fit(tmp_path, seeded(Plain), Counting(mode="exact", every_n_epochs=every), max_epochs=epochs)
    assert done == expected


def test_features_that_are_not_finite_are_left_out_and_said_once(tmp_path):
    class Harmless(Plain):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self(batch[0])
            return 0.0 * self.net.fc.weight.sum()

    x, y = points(64).tensors
    x[::8] = float("nan")
    data = DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    monitor = NeuralCollapseMonitor(measures=["cdnv"])
    with pytest.warns(UserWarning, match=r"12.5% of the features of layer penultimate in epoch 0 were NaN or inf"):
        run = fit(tmp_path, seeded(Harmless, lr=0.0), monitor, data=data, max_epochs=2)
    keep = torch.arange(64) % 8 != 0
    module = seeded(Plain)
    expected = collapse_measures(class_sums(module.net.body(x[keep]).detach(), y[keep], 3))["cdnv"]
    torch.testing.assert_close(logged(run)["cdnv"], expected, rtol=1e-5, atol=0)


def test_early_stopping_can_watch_a_measure(tmp_path):
    stop = EarlyStopping("neural_collapse/cdnv/penultimate", divergence_threshold=1e-9)
    run = fit(tmp_path, seeded(Plain), stop, NeuralCollapseMonitor(), max_epochs=5)
    assert run.current_epoch < 5


def test_no_hook_is_left_behind(tmp_path):
    module, monitor = seeded(Plain), NeuralCollapseMonitor()
    fit(tmp_path, module, monitor)
    assert not module.net.fc._forward_pre_hooks
    assert not module.net.fc._forward_hooks

    class Boom(pl.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fit(tmp_path, module, monitor, Boom())
    assert not module.net.fc._forward_pre_hooks


class Stream(IterableDataset):
    def __iter__(self):
        yield from points(32)


class NoLabels(Plain):
    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()


@pytest.mark.parametrize(
    ("kwargs", "module", "data", "text"),
    [
        ({"layer": "net.bodi"}, Plain, None, r"Plain has no layer 'net.bodi'. Nearest: net.body"),
        ({"num_classes": 2}, Plain, None, "a target is 2 but num_classes=2: set num_classes to at least 3"),
        (
            {"target_key": 0},
            Plain,
            None,
            r"or \(N, 3\) floating soft targets",
        ),
        (
            {"mode": "exact"},
            Plain,
            DataLoader(Stream(), batch_size=8),
            "got a DataLoader over an IterableDataset: choose the online",
        ),
        (
            {},
            NoLabels,
            DataLoader(points(32).tensors[0][:, None], batch_size=8),
            "found no targets in a batch of Tensor",
        ),
    ],
)
def test_errors_of_the_first_second(tmp_path, kwargs, module, data, text):
    with pytest.raises(ValueError, match=text):
        fit(tmp_path, seeded(module), NeuralCollapseMonitor(**kwargs), data=data)


@pytest.mark.parametrize(
    "kwargs",
    [{"mode": "offline"}, {"every_n_epochs": 0}, {"data": "val"}, {"layer": ["a", "a"]}, {"layer": []}],
    ids=str,
)
def test_impossible_arguments_are_refused_at_once(kwargs):
    with pytest.raises(ValueError):
        NeuralCollapseMonitor(**kwargs)


def test_the_same_monitor_twice_is_refused_and_on_two_layers_welcome(tmp_path):
    with pytest.raises(ValueError, match=r"the Trainer has NeuralCollapseMonitor\[online, penultimate\] twice"):
        fit(tmp_path, seeded(Plain), NeuralCollapseMonitor(), NeuralCollapseMonitor())
    run = fit(tmp_path, seeded(Plain), NeuralCollapseMonitor(), NeuralCollapseMonitor(layer="net.body.0"))
    assert logged(run)
    assert logged(run, label="/net.body.0")


def test_two_modes_for_one_layer_log_under_two_names(tmp_path):
    alone = trainer(tmp_path, callbacks=NeuralCollapseMonitor(mode="exact"))
    torch.manual_seed(0)
    alone.fit(Plain(), loader())
    both = trainer(tmp_path, callbacks=[NeuralCollapseMonitor(), NeuralCollapseMonitor(mode="exact")])
    torch.manual_seed(0)
    both.fit(Plain(), loader())
    name = "nc1_quotient/penultimate"
    assert both.callback_metrics[f"neural_collapse_exact/{name}"] == alone.callback_metrics[f"neural_collapse/{name}"]
    assert both.callback_metrics[f"neural_collapse/{name}"] != alone.callback_metrics[f"neural_collapse/{name}"]


@pytest.mark.parametrize("mode", ["online", "exact"])
def test_nc1_over_that_of_the_layer_before(tmp_path, mode):
    layers = ["net.body.0", "net.body.1", "net.fc"]
    monitor = NeuralCollapseMonitor(layer=layers, mode=mode, num_classes=3, measures=["nc1_quotient", "nc1_layer_*"])
    logged = fit(tmp_path, seeded(Plain), monitor).callback_metrics
    nc1 = [float(logged[f"neural_collapse/nc1_quotient/{layer}"]) for layer in layers]
    for before, value, layer in zip(nc1, nc1[1:], layers[1:], strict=False):
        ratio = float(logged[f"neural_collapse/nc1_layer_ratio/{layer}"])
        assert ratio == pytest.approx(value / before, rel=1e-6)
    assert "neural_collapse/nc1_layer_ratio/net.body.0" not in logged


def test_the_ratio_of_layers_asked_for_with_one_layer_is_said_to_have_no_effect(tmp_path):
    with pytest.warns(UserWarning, match=r"nc1_layer_ratio.*no layer.*nc1_layer_ratio several layers"):
        fit(tmp_path, seeded(Plain), NeuralCollapseMonitor(measures=["nc1_layer_ratio"]))
