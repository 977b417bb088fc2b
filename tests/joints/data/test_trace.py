"""What a forward may write is put back after a pass; what it logs is dropped."""

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_feat.callbacks import (
    DistributionalSimplicityMonitor,
    FeatureShiftMonitor,
    ForgettingMonitor,
    LinearProbe,
    MixupGeometryMonitor,
    NeuralCollapseMonitor,
    SimplicityBiasUpsampler,
)
from lightning_feat.joints.features.kept import remember
from tests.helpers import NUM_CLASSES, Plain, equal, loader, points, trainer, weights


class Writes(Plain):
    """Its forward writes wherever one can."""

    def __init__(self):
        super().__init__()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(NUM_CLASSES)
        self.seen = torchmetrics.MeanMetric()
        self.kept = torchmetrics.CatMetric()  # its state is a list
        self.register_buffer("queue", torch.zeros(5))
        self.register_buffer("total", torch.zeros(()))
        self.calls, self.history, self.by_name = 0, [], {"last": [torch.zeros(2)]}

    def forward(self, x):
        logits = self.net(x)
        self.accuracy.update(logits, logits.argmax(1))
        self.seen.update(logits.detach().mean())
        self.kept.update(logits.detach().mean())
        self.queue = torch.cat([self.queue[1:], logits.detach().mean()[None]])  # another tensor
        self.total += len(x)  # in place
        self.calls += 1
        self.history.append(len(x))
        self.by_name["last"][0] += 1
        self.by_name[f"call {self.calls}"] = self.calls
        self.latest = logits.detach()  # a new attribute
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        self.log("each step", logits.mean(), on_step=True)
        return logits

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)


def state(module):
    numbers = [module.calls, module.history, list(module.by_name), module.by_name["last"][0].tolist()]
    metrics = [float(module.accuracy.compute()), int(module.accuracy._update_count), len(module.kept.value)]
    return [*numbers, *metrics, module.queue.tolist(), float(module.total)]


def fitted(tmp_path, *callbacks):
    pl.seed_everything(0)
    module = Writes()
    run = trainer(tmp_path, callbacks=list(callbacks), max_epochs=2, logger=CSVLogger(tmp_path))
    run.fit(module, loader(32), loader(16))
    return module, run


@pytest.mark.parametrize(
    "make",
    [
        lambda: NeuralCollapseMonitor(mode="exact", data="both"),
        lambda: LinearProbe(every_n_epochs=1, penalties=[0.1]),
        lambda: MixupGeometryMonitor(num_pairs=4),
        lambda: SimplicityBiasUpsampler(separating_epoch=1, restart=False, length="keep", factor=2, choose="random"),
    ],
    ids=["collapse", "probe", "mixup", "upsampler"],
)
def test_a_pass_leaves_no_trace_in_what_a_forward_writes(tmp_path, make):
    plain, bare = fitted(tmp_path / "plain")
    watched, run = fitted(tmp_path / "watched", make())
    if not isinstance(run.callbacks[0], SimplicityBiasUpsampler):  # which changes what is trained on
        assert state(watched) == state(plain)
        assert equal(weights(watched), weights(plain))
        torch.testing.assert_close(run.callback_metrics["seen"], bare.callback_metrics["seen"], equal_nan=True)
    else:
        assert state(watched)[:2] == state(plain)[:2]
    logged = (tmp_path / "watched/lightning_logs/version_0/metrics.csv").read_text()
    assert logged.count("\n") == (tmp_path / "plain/lightning_logs/version_0/metrics.csv").read_text().count("\n")


def test_statistics_of_a_network_that_stays_in_training_mode_are_put_back(tmp_path):
    """BatchNorm writes them in place, without counting a version of the tensor."""

    class Stubborn(Plain):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(4)

        def forward(self, x):
            return super().forward(self.norm.train()(x))

    def statistics(*callbacks):
        pl.seed_everything(0)
        module = Stubborn()
        trainer(tmp_path, callbacks=list(callbacks), max_epochs=2).fit(module, loader(32))
        return [*module.norm.buffers()]

    assert equal(statistics(NeuralCollapseMonitor(mode="exact")), statistics())


def test_loggers_hear_nothing_inside_a_pass(tmp_path):
    heard = []

    class Shows(Plain):
        def forward(self, x):
            if not self.training:
                self.logger.experiment.add_image("x", x)  # no CSV logger has that
                heard.append(type(self.logger).__name__)
            return super().forward(x)

        def validation_step(self, batch, batch_idx):
            pass

    pl.seed_everything(0)
    run = trainer(tmp_path, callbacks=[NeuralCollapseMonitor(mode="exact")], logger=CSVLogger(tmp_path))
    run.fit(Shows(), loader())
    assert set(heard) == {"DummyLogger"}
    assert type(run.logger).__name__ == "CSVLogger"


def test_a_module_inside_a_module_logs_nothing_either(tmp_path):
    class Outer(Plain):
        def __init__(self):
            super().__init__()
            self.net = Inner()

    class Inner(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            if not self.training:
                self.log("inner", 1.0)
            return self.fc(self.body(x))

    run = trainer(tmp_path, callbacks=[NeuralCollapseMonitor(mode="exact")])
    run.fit(Outer(), loader())
    assert "inner" not in run.callback_metrics


def test_parameters_are_put_back_where_that_is_asked_for():
    module = nn.Linear(2, 2)
    before, put_back = weights(module), remember(module, parameters=True)
    assert not put_back()
    with torch.no_grad():
        module.weight += 1
    assert put_back()
    assert equal(before, weights(module))


def test_what_holds_itself_is_put_back_once():
    module = nn.Linear(2, 2)
    module.ring = ring = [1]
    ring.append(ring)
    put_back = remember(module)
    ring.append(2)
    put_back()
    assert len(ring) == 2
    assert ring[1] is ring


class Augments(Dataset):
    """Draws by a generator of its own, which the state of the run knows nothing of."""

    def __init__(self, generator):
        self.data, self.transforms = points(32), [Noise(generator)]

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return self.transforms[0](x), y


class Noise:
    def __init__(self, generator):
        self.generator = generator

    def __call__(self, x):
        if isinstance(self.generator, torch.Generator):
            return x + torch.randn((), generator=self.generator)
        return x + torch.tensor(self.generator.normal(size=4), dtype=torch.float32)


class PythonRandom(random.Random):
    def normal(self, size):
        return np.array([self.gauss(0, 1) for _ in range(size)])


GENERATORS = [
    lambda: np.random.default_rng(1),
    lambda: np.random.RandomState(1),  # which others use
    lambda: torch.Generator().manual_seed(1),
    lambda: PythonRandom(1),
]


@pytest.mark.parametrize("generator", GENERATORS, ids=["numpy", "numpy as it was", "torch", "python"])
@pytest.mark.parametrize("where", ["data", "module"])
def test_generators_that_data_or_the_module_keep_for_themselves_are_put_back(tmp_path, generator, where):
    class Noisy(Plain):
        def __init__(self):
            super().__init__()
            self.noise = Noise(generator())

        def forward(self, x):
            return super().forward(self.noise(x) if where == "module" else x)

    def trained(*callbacks):
        pl.seed_everything(0)
        module = Noisy()
        data = Subset(Augments(generator()), range(30)) if where == "data" else points(30)
        trainer(tmp_path, callbacks=list(callbacks), max_epochs=2).fit(module, DataLoader(data, batch_size=8))
        return weights(module)

    plain = trained()
    for watched in (
        NeuralCollapseMonitor(mode="exact"),
        ForgettingMonitor(),
        DistributionalSimplicityMonitor(num_examples=16),
        FeatureShiftMonitor(layers=["net.body"]),
    ):
        assert equal(trained(watched), plain), watched.state_key
