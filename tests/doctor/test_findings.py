"""Each condition that the doctor knows, provoked."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.utils.data import DataLoader, SequentialSampler, WeightedRandomSampler, default_collate

from lightning_feat.callbacks import (
    DataPlan,
    FeatureRegularizer,
    GrassmannHead,
    GrassmannMonitor,
    NeuralCollapseMonitor,
    NeuralCollapseRegularizer,
    SimplicityBiasUpsampler,
)
from lightning_feat.doctor import doctor
from lightning_feat.joints.loss.terms import WeightSchedule
from lightning_feat.layers import GrassmannLinear
from lightning_feat.optim import follow_subspaces
from tests.helpers import NUM_CLASSES, WIDTH, EMAWeightAveraging, Plain, loader, points, trainer
from tests.joints.ddp_cases import FSDP2_ON_CPU


@pytest.fixture
def examine(tmp_path):
    def run(callbacks=(), module=None, train=None, **kwargs):
        given = trainer(tmp_path, callbacks=list(callbacks), **kwargs)
        return doctor(given, module or Plain(), loader() if train is None else train, loader(), cost=False)

    return run


def only(findings, severity, check):
    """The one finding, of this kind."""
    assert [(f.severity, f.check) for f in findings] == [(severity, check)]
    return findings[0]


def test_a_layer_that_is_not_there(examine):
    found = only(examine([NeuralCollapseMonitor(layer="net.bdy")]), "error", "layer-not-found")
    assert "no layer 'net.bdy'" in found.what
    assert "net.body" in found.what
    assert found.where == "NeuralCollapseMonitor[online, net.bdy]"


def test_a_layer_that_never_runs(examine):
    class Idle(Plain):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(4, 4)

    found = only(examine([NeuralCollapseMonitor(layer="idle")], Idle()), "error", "layer-never-runs")
    assert "did not run" in found.what
    assert "net.body" in found.remedy


def test_a_layer_that_runs_without_gradient_under_a_loss_term(examine):
    class Frozen(Plain):
        def forward(self, x):
            with torch.no_grad():
                h = self.net.body(x)
            return self.net.fc(h)

    term = FeatureRegularizer(lambda h: h.mean(), name="mean", layer="net.body")
    found = only(examine([term], Frozen()), "error", "zero-gradient")
    assert "net.body runs without gradient" in found.what


class Compiled(Plain):
    def __init__(self):
        super().__init__()
        self.fast = torch.compile(self.logits, backend="eager")

    def logits(self, x):
        return self.net(x)

    def forward(self, x):
        return self.fast(x)


@pytest.mark.parametrize("has_run", [True, False])
def test_hooks_that_come_too_late_for_compiled_code(examine, has_run):
    torch.compiler.reset()
    module = Compiled()
    if has_run:
        module(torch.randn(2, 4))
    findings = examine([NeuralCollapseMonitor()], module)
    if has_run:
        found = only(findings, "error", "compiled-before-hooks")
        assert found.where == "fast"
        assert "NeuralCollapseMonitor[online, penultimate]" in found.what
    else:
        assert not findings


def test_too_late_for_compiled_code_is_what_fit_finds_in_its_own_words(tmp_path):
    """What the finding above foretells: the tap hears nothing, in a run that is otherwise in order."""
    torch.compiler.reset()
    module = Compiled()
    trainer(tmp_path).fit(module, loader())
    with pytest.raises(RuntimeError, match="did not run in this batch"):
        trainer(tmp_path, callbacks=[NeuralCollapseMonitor()]).fit(module, loader())


class NewHead(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        pl_module.net.fc = nn.Linear(WIDTH, NUM_CLASSES)


def test_a_head_in_no_optimizer(examine):
    found = only(examine([NewHead()]), "error", "head-not-in-optimizer")
    assert found.where == "net.fc"


def test_a_head_of_subspaces_in_no_optimizer(examine):
    class BodyOnly(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.body.parameters(), lr=0.1)

    findings = examine([GrassmannHead(2)], BodyOnly())
    assert {f.severity for f in findings} == {"error"}
    assert findings[0].where == "GrassmannHead[classifier]"
    assert "no optimizer trains the class subspaces" in findings[0].what


def test_a_body_in_no_optimizer_may_be_meant(examine):
    class HeadOnly(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.fc.parameters(), lr=0.1)

    found = only(examine([], HeadOnly()), "warning", "not-in-optimizer")
    assert found.where == "net.body.0.weight, net.body.0.bias"


@pytest.mark.skipif(not FSDP2_ON_CPU, reason="this torch has no FSDP2 on a CPU")
def test_a_head_that_is_not_sharded_with_the_rest(examine):
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Sharded(Plain):
        layers = ("net.body.0",)

        def configure_model(self):
            from torch.distributed.fsdp import fully_shard

            for layer in self.layers:
                fully_shard(self.get_submodule(layer), mesh=self.device_mesh["data_parallel"])

    class Whole(Sharded):
        layers = ("net.body.0", "net.fc")

    def options():  # two processes in the run, one in its copy
        return {"strategy": ModelParallelStrategy(process_group_backend="gloo"), "devices": 2}

    assert not examine([GrassmannHead(2, layer="net.fc")], Whole(), **options())
    found = only(examine([], Sharded(), **options()), "error", "head-unsharded")
    assert found.where == "net.fc.weight, net.fc.bias"
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(EMAWeightAveraging is None, reason="needs Lightning 2.6")
def test_an_averaging_callback_before_the_head(examine):
    found = only(examine([EMAWeightAveraging(), GrassmannHead(2)]), "error", "averaging-before-head")
    assert "before GrassmannHead" in found.what
    assert not examine([GrassmannHead(2), EMAWeightAveraging()])


class Scheduled(Plain):
    """``steps`` of a schedule; None asks the trainer."""

    def __init__(self, steps, schedule=OneCycleLR):
        super().__init__()
        self.steps, self.schedule = steps, schedule

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        steps = self.steps or self.trainer.estimated_stepping_batches
        made = self.schedule(optimizer, 0.1, total_steps=steps) if self.schedule is OneCycleLR else None
        made = made or self.schedule(optimizer, steps)
        return [optimizer], [{"scheduler": made, "interval": "step"}]


TWICE = [2] * 16 + [1] * 16  # 48 examples for 32: six batches of eight for four


def grown(epoch):
    return TWICE if epoch else None


@pytest.mark.parametrize("schedule", [OneCycleLR, CosineAnnealingLR])
@pytest.mark.parametrize("steps", [None, 16, 22])
def test_a_schedule_shorter_than_the_grown_epochs(examine, schedule, steps):
    findings = examine([DataPlan(grown)], Scheduled(steps, schedule), max_epochs=4)  # 4 + 3 * 6 steps
    if steps == 22:
        assert not findings
        return
    found = only(findings, "error", "schedule-too-short")
    assert "over after 16 steps, but the training takes 22 steps" in found.what
    assert found.where == schedule.__name__


def test_a_schedule_shorter_than_the_grown_epochs_raises_in_fit(tmp_path):
    fit = trainer(tmp_path, callbacks=[DataPlan(grown)], max_epochs=4)
    with pytest.raises(ValueError, match="Tried to step 17 times"):
        fit.fit(Scheduled(16), loader())


def test_plans_that_keep_the_length_need_no_longer_schedule(examine):
    assert not examine([DataPlan(grown, length="keep")], Scheduled(16), max_epochs=4)


@pytest.mark.parametrize(("steps", "severity"), [(None, None), (16, "error"), (24, "error"), (32, None), (20, "error")])
def test_a_schedule_for_a_second_start_that_is_not_yet_known(examine, steps, severity):
    """Four epochs of four batches; of five when a few examples are slow, of eight when all are."""
    findings = examine([SimplicityBiasUpsampler(2)], Scheduled(steps), max_epochs=4)
    if severity is None:
        assert not findings
    else:
        found = only(findings, severity, "schedule-too-short")
        assert ("if all examples turn out slow" in found.what) == (steps in (20, 24))


def test_a_schedule_by_epochs(examine):
    class Epochs(Plain):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [CosineAnnealingLR(optimizer, 3)]

    assert not examine([], Epochs(), max_epochs=3)
    found = only(examine([], Epochs(), max_epochs=5), "warning", "schedule-too-short")
    assert "over after 3 epochs, but the training takes 5 epochs" in found.what


def test_a_schedule_for_the_share_of_one_of_two_processes(examine):
    data = loader(shuffle=True)
    assert not examine([], Scheduled(4), data, max_epochs=2, devices=2, strategy="ddp")
    assert examine([], Scheduled(3), data, max_epochs=2, devices=2, strategy="ddp")
    assert examine([], Scheduled(4), data, max_epochs=2)


class Mixup(Plain):
    """``how`` the loss is made of two samples."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def training_step(self, batch, batch_idx):
        x, y = batch
        other, share = torch.arange(len(y)).roll(1), 0.7
        soft = share * one_hot(y, NUM_CLASSES).float() + (1 - share) * one_hot(y[other], NUM_CLASSES).float()
        logits = self(share * x + (1 - share) * x[other])
        if self.how == "sum":
            return share * cross_entropy(logits, y) + (1 - share) * cross_entropy(logits, y[other])
        if self.how == "soft":
            return cross_entropy(logits, soft)
        if self.how == "by hand":
            return (-soft * logits.log_softmax(1)).sum(1).mean()
        if self.how == "smoothed":
            return cross_entropy(self(x), 0.9 * one_hot(y, NUM_CLASSES) + 0.1 / NUM_CLASSES)
        if self.how == "teacher":
            return cross_entropy(self(x), self(x + 1).detach().softmax(1))
        return cross_entropy(self(x), y)


@pytest.mark.parametrize("how", ["sum", "soft", "by hand"])
def test_labels_of_samples_that_training_step_mixes(examine, how):
    found = only(examine([NeuralCollapseMonitor()], Mixup(how)), "error", "mixed-labels")
    differ = [int((y != y.roll(1)).sum()) for _, y in loader()][:3]
    assert f"{sum(differ)} of 24 were mixed" in found.what


@pytest.mark.parametrize("how", ["sum", "soft", "by hand"])
@pytest.mark.parametrize("callback", [GrassmannMonitor(), NeuralCollapseRegularizer(), "exact"])
def test_who_reads_labels_of_training_batches(examine, how, callback):
    if callback == "exact":
        assert not examine([NeuralCollapseMonitor(mode="exact")], Mixup(how))
        return
    head = [GrassmannHead(2)] if isinstance(callback, GrassmannMonitor) else []
    assert "mixed-labels" in [f.check for f in examine([*head, callback], Mixup(how))]


@pytest.mark.parametrize("how", ["plain", "smoothed", "teacher"])
def test_labels_that_are_not_mixed(examine, how):
    assert not examine([NeuralCollapseMonitor()], Mixup(how))


def test_labels_other_than_those_of_the_loss(examine):
    class Coarse(Plain):
        def training_step(self, batch, batch_idx):
            return cross_entropy(self(batch[0]), batch[1] // 2)

    found = only(examine([NeuralCollapseMonitor()], Coarse()), "warning", "other-labels")
    assert "target_key" in found.remedy


@pytest.mark.parametrize("sampler", [WeightedRandomSampler([1.0] * 32, 32), SequentialSampler(points())])
def test_a_sampler_that_lightning_replaces(examine, sampler):
    data = DataLoader(points(), batch_size=8, sampler=sampler)
    found = only(examine([], train=data, devices=2, strategy="ddp"), "warning", "sampler-replaced")
    assert type(sampler).__name__ in found.where
    assert not examine([], train=data, devices=2, strategy="ddp", use_distributed_sampler=False)
    assert not examine([], train=data)
    assert not examine([], train=loader(shuffle=True), devices=2, strategy="ddp")


@pytest.mark.parametrize(
    ("loss", "severity"),
    [
        (lambda h: h.detach().mean(), "error"),
        (lambda h: h.argmax(1).float().mean(), "error"),
        (lambda h: h.round().mean(), "warning"),
        (lambda h: torch.relu(h.mean() - 100), "warning"),
        (lambda h: h.mean(), None),
    ],
)
def test_a_term_with_zero_gradient(examine, loss, severity):
    findings = examine([FeatureRegularizer(loss, name="term")])
    if severity is None:
        assert not findings
    else:
        found = only(findings, severity, "zero-gradient")
        assert found.where == "FeatureRegularizer[term@penultimate]"


def test_a_term_that_begins_later_is_looked_at_now(examine):
    late = WeightSchedule(1.0, warmup_epochs=2.0, start_epoch=50, end_epoch=60, every_n_batches=7)
    dead = FeatureRegularizer(lambda h: h.detach().mean(), name="term", weight=late)
    only(examine([dead], max_epochs=99), "error", "zero-gradient")


@pytest.mark.parametrize("inputs_with_gradient", [False, True])
@pytest.mark.parametrize(
    "term", [lambda: FeatureRegularizer(lambda h: h.mean(), name="term"), NeuralCollapseRegularizer]
)
def test_a_term_on_a_frozen_layer(examine, term, inputs_with_gradient):
    """Also where it trains parameters of its own, or its gradient goes on to the inputs."""

    class Frozen(Plain):
        def __init__(self):
            super().__init__()
            self.net.body.requires_grad_(False)

        def forward(self, x):
            return self.net(x.requires_grad_(inputs_with_gradient))

    assert only(examine([term()], Frozen()), "error", "zero-gradient")


def test_a_term_that_becomes_nan(examine):
    found = only(examine([FeatureRegularizer(lambda h: (h.mean() - 1e9).log(), "term")]), "error", "nonfinite-term")
    assert "term@penultimate" in found.what


def test_a_loss_that_becomes_nan(examine):
    class Lost(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) / (1 - batch_idx)

    assert "batch 1" in only(examine([], Lost()), "error", "nonfinite-loss").what


def test_a_monitor_on_a_batch_without_labels_that_it_can_see(examine):
    class Nested(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["a"], batch["b"]), batch_idx)

    data = loader(collate_fn=lambda rows: dict(zip("ab", default_collate(rows), strict=True)))
    found = only(examine([NeuralCollapseMonitor()], Nested(), data), "error", "labels-not-found")
    assert "dict(a: Tensor(8, 4) float32, b: Tensor(8,) int64)" in found.what
    assert not examine([NeuralCollapseMonitor(target_key="b")], Nested(), data)


@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
def test_a_metric_that_nobody_logs(examine, kind):
    found = only(examine([kind(monitor="val/los")], enable_checkpointing=True), "error", "metric-not-logged")
    assert found.remedy == "Nearest: val/loss."
    assert not examine([kind(monitor="val/loss")], enable_checkpointing=True)


def test_a_backward_that_no_term_can_join(examine):
    class Bare(Plain):
        def training_step(self, batch, batch_idx):
            cross_entropy(self(batch[0]), batch[1]).backward()

    found = only(examine([NeuralCollapseRegularizer()], Bare(manual=True)), "error", "manual-backward")
    assert "LossTermsMixin" in found.what


def test_the_same_callback_twice(examine):
    assert examine([NeuralCollapseMonitor(), NeuralCollapseMonitor()])[0].check == "twin"


def test_a_fault_of_the_training_itself_is_told_by_its_line(examine):
    class Wrong(Plain):
        def training_step(self, batch, batch_idx):
            return {}["loss"]

    found = only(examine([NeuralCollapseMonitor()], Wrong()), "error", "training")
    assert found.where == "Wrong"
    assert found.what.startswith("KeyError at test_findings.py:")


def test_one_fault_does_not_hide_another(examine):
    faults = [
        GrassmannHead(2, layer="nowhere"),
        GrassmannMonitor(layer="nowhere"),
        NeuralCollapseMonitor(layer="net.body", target_key="z"),
        FeatureRegularizer(lambda h: h.detach().mean(), name="term", layer="net.body"),
        NewHead(),
    ]
    checks = [f.check for f in examine(faults)]
    errors = ["layer-not-found", "labels-not-found", "zero-gradient", "head-not-in-optimizer"]
    assert sorted(checks) == sorted([*errors, "not-looked-at"])
    assert checks[-1] == "not-looked-at"


def test_what_cannot_be_copied_is_said_and_the_rest_looked_at(examine):
    module = Plain()
    module.open = open(__file__)  # noqa: SIM115
    found = only(examine([], module), "warning", "not-tried")
    assert "TextIOWrapper" in found.what
    module.open.close()


def test_a_function_that_leads_back_to_the_module_is_not_run(examine):
    module = Plain()
    net = module.net
    module.forward = lambda x: net(x)
    assert "runs the layers of the module itself" in only(examine([], module), "warning", "not-tried").what
    assert all(p.grad is None for p in module.parameters())


def test_what_callbacks_warn_of_before_the_first_batch(examine):
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, index):
            return torch.randn(4), index % NUM_CLASSES

    findings = examine([SimplicityBiasUpsampler(1)], train=DataLoader(Noisy(), batch_size=8), max_epochs=2)
    assert "clean_train_dataloader" in only(findings, "warning", "said-by-callback").what


def test_a_callback_of_others_may_fail_for_want_of_a_logger(examine):
    class Pictures(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            raise TypeError(f"a {type(trainer.logger).__name__} takes no pictures")

    findings = examine([Pictures(), NeuralCollapseMonitor(layer="nowhere")], logger=True)
    assert [(f.severity, f.check) for f in findings] == [("error", "layer-not-found"), ("warning", "other-callback")]
    assert "silent loggers" in findings[1].what


def test_class_subspaces_that_nobody_follows(examine):
    class Built(Plain):
        def __init__(self):
            super().__init__()
            self.net.fc = GrassmannLinear(WIDTH, NUM_CLASSES, 2)

    class Followed(Built):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            follow_subspaces(optimizer, self)
            return optimizer

    found = only(examine([], Built()), "error", "subspaces-without-follower")
    assert found.where == "net.fc"
    assert "follow_subspaces" in found.remedy
    assert not examine([], Followed())
    assert not examine([GrassmannHead(2)], Built())
