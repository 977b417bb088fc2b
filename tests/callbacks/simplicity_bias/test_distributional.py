import csv

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks import DataPlan, DistributionalSimplicityMonitor, SimplicityBiasUpsampler
from tests.helpers import DictBatches, Disturbed, Plain, equal, loader, points, trainer, weights

N = 2000
ERROR = 5 * (0.25 / N) ** 0.5  # five standard errors of an accuracy


class Reads(pl.LightningModule):
    """Knows one rule for ever: its logits are ``(-score, score)``."""

    def __init__(self, score):
        super().__init__()
        self.score, self.head = score, nn.Linear(2, 2, bias=False)
        self.head.weight.data = torch.eye(2)

    def forward(self, x):
        score = self.score(x)
        return self.head(torch.stack([-score, score], dim=1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def classes(draw, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(N) % 2
    return DataLoader(TensorDataset(draw(y, generator), y), 250, shuffle=True)


def fit(tmp_path, module, data, monitor=None, **options):
    monitor = DistributionalSimplicityMonitor(num_examples=N, shrinkage=0.0) if monitor is None else monitor
    pl.seed_everything(0)
    run = trainer(tmp_path, callbacks=[monitor], **options)
    run.fit(module() if isinstance(module, type) else module, data)
    return monitor, run


def shifted(y, generator):
    """Classes that differ in their means."""
    return torch.randn(len(y), 4, generator=generator) + 2 * (2.0 * y[:, None] - 1) * torch.eye(4)[0]


def stretched(y, generator):
    """Normal classes that differ in their covariances alone."""
    scale = torch.where(y[:, None] == 1, 3.0, 0.3) ** torch.tensor([1, -1, 0, 0])
    return torch.randn(len(y), 4, generator=generator) * scale


def heavy(y, generator):
    """Classes with one mean and one covariance: signs, or mostly zero and rarely large."""
    signs = 2.0 * torch.randint(2, (len(y), 4), generator=generator) - 1
    rare = signs * 2 * (torch.rand(len(y), 4, generator=generator) < 0.25)
    return torch.where(y[:, None] == 1, rare, signs)


def last(monitor):
    return {name: value for name, value in monitor.curve[-1].items() if name != "step"}


def test_who_reads_means_alone_does_as_well_on_all(tmp_path):
    monitor, _ = fit(tmp_path, Reads(lambda x: x[:, 0]), classes(shifted))
    for value in last(monitor).values():
        assert value == pytest.approx(0.977, abs=ERROR)  # the normal distribution at two deviations


def test_on_gaussian_data_the_gaussian_clone_coincides_and_the_isotropic_one_is_chance(tmp_path):
    monitor, _ = fit(tmp_path, Reads(lambda x: x[:, 0].abs() - x[:, 1].abs()), classes(stretched))
    found = last(monitor)
    assert found["real"] > 0.9
    assert found["gaussian"] == pytest.approx(found["real"], abs=2 * ERROR)
    assert found["isotropic"] == pytest.approx(0.5, abs=ERROR)


def test_what_lies_beyond_the_covariance_is_in_no_clone(tmp_path):
    monitor, _ = fit(tmp_path, Reads(lambda x: (x.abs() - 1).square().sum(1) - 0.5), classes(heavy))
    found = last(monitor)
    assert found["real"] == 1.0
    # both classes are one and the same Gaussian: half of them is right whatever the rule
    assert found["gaussian"] == pytest.approx(0.5, abs=ERROR)
    assert found["isotropic"] == pytest.approx(0.5, abs=ERROR)


def test_what_is_logged_is_the_accuracy_at_the_weights_of_that_step(tmp_path):
    seen = {}

    class Watches(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            x, y = points(64).tensors
            training = pl_module.training
            with torch.no_grad():
                seen[trainer.global_step] = float((pl_module.eval()(x).argmax(1) == y).double().mean())
            pl_module.train(training)

    monitor = DistributionalSimplicityMonitor(num_examples=64, per_decade=3)
    pl.seed_everything(0)
    run = trainer(tmp_path, callbacks=[Watches(), monitor], max_epochs=3)
    run.fit(Disturbed(), loader(64, shuffle=True))
    assert [point["step"] for point in monitor.curve] == [1, 2, 5, 10, 22, 24]  # and the last
    for point in monitor.curve:
        assert point["real"] == pytest.approx(seen[point["step"]], abs=1e-6)
    assert float(run.callback_metrics["distributional_simplicity/accuracy_real/logits"]) == pytest.approx(seen[24])


def test_the_loggers_get_every_value_at_its_step(tmp_path):
    monitor = DistributionalSimplicityMonitor(per_decade=3)
    logger = CSVLogger(tmp_path)
    fit(tmp_path, Plain(), loader(64), monitor, logger=logger, max_epochs=2, log_every_n_steps=50)
    name = "distributional_simplicity/accuracy_gaussian/logits"
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[name]]
    assert [int(row["step"]) for row in rows] == [0, 1, 4, 9, 15]  # Lightning counts from zero
    assert [float(row[name]) for row in rows] == [point["gaussian"] for point in monitor.curve]


def test_the_training_is_bit_for_bit_what_it_is_without_the_monitor(tmp_path):
    runs = []
    for callbacks in ([], [DistributionalSimplicityMonitor()]):
        pl.seed_everything(0)
        module = Disturbed()
        run = trainer(tmp_path, callbacks=callbacks, max_epochs=2)
        run.fit(module, loader(64, shuffle=True))
        runs.append((weights(module), [*module.buffers()], torch.get_rng_state()))
    assert all(equal(a, b) for a, b in zip(runs[0][:2], runs[1][:2], strict=True))
    assert torch.equal(runs[0][2], runs[1][2])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_clones_depend_on_the_seed_alone(tmp_path):
    made = []
    for seed, shuffle in ((0, 0), (0, 1), (1, 0)):
        monitor = DistributionalSimplicityMonitor(seed=seed, num_examples=20)
        pl.seed_everything(shuffle)
        run = trainer(tmp_path, callbacks=[monitor, Keeps(monitor, made)])
        run.fit(Plain(), loader(64, shuffle=True))
    assert all(torch.equal(a, b) for a, b in zip(made[0], made[1], strict=True))
    assert not torch.equal(made[0][0], made[2][0])
    assert sum(len(x) for x in made[0][::2]) == 20


class Keeps(pl.Callback):
    def __init__(self, monitor, made):
        self.monitor, self.made = monitor, made

    def on_train_epoch_end(self, trainer, pl_module):
        self.made.append([clone for examples in self.monitor._examples for clone in examples.clones])


def test_a_run_that_is_resumed_goes_on_with_its_curve(tmp_path):
    whole, _ = fit(tmp_path, Plain, loader(64), DistributionalSimplicityMonitor(), max_epochs=3)
    first, run = fit(tmp_path, Plain, loader(64), DistributionalSimplicityMonitor(), max_epochs=2)
    run.save_checkpoint(tmp_path / "first.ckpt")
    again = DistributionalSimplicityMonitor()
    pl.seed_everything(5)
    resumed = trainer(tmp_path, callbacks=[again], max_epochs=3)
    resumed.fit(Plain(), loader(64), ckpt_path=tmp_path / "first.ckpt")
    assert [point["step"] for point in whole.curve] == [1, 2, 3, 4, 6, 10, 16, 24]
    assert again.curve == whole.curve
    assert again.curve[: len(first.curve)] == first.curve


def test_a_second_fit_begins_a_new_curve(tmp_path):
    monitor, _ = fit(tmp_path, Plain, loader(64), DistributionalSimplicityMonitor())
    fit(tmp_path, Plain(), loader(64), monitor)
    assert [point["step"] for point in monitor.curve] == [1, 2, 3, 4, 6, 8]


def test_beside_an_upsampler_that_starts_again_the_curve_is_that_of_the_second_start(tmp_path):
    monitor = DistributionalSimplicityMonitor(data="val")
    run = trainer(tmp_path, callbacks=[SimplicityBiasUpsampler(separating_epoch=1), monitor], max_epochs=2)
    run.fit(Plain(), loader(64), loader(32))
    steps = [point["step"] for point in monitor.curve]
    assert steps[:5] == [1, 2, 3, 4, 6]
    assert steps == sorted(set(steps))


def test_beside_a_plan_whose_loader_is_made_anew(tmp_path):
    plan = DataPlan(lambda epoch: torch.full((64,), epoch + 1))
    monitor = DistributionalSimplicityMonitor(per_decade=10)
    trainer(tmp_path, callbacks=[plan, monitor], max_epochs=3).fit(Plain(), loader(64))
    assert monitor.curve[-1]["step"] == 48


def test_diverged_logits_are_nan_and_no_end(tmp_path):
    class Diverges(Plain):
        def forward(self, x):
            return super().forward(x) * (torch.nan if self.global_step > 1 else 1.0)

    monitor, _ = fit(tmp_path, Diverges(), loader(32), DistributionalSimplicityMonitor())
    assert monitor.curve[0]["real"] == monitor.curve[0]["real"]
    assert monitor.curve[-1]["real"] != monitor.curve[-1]["real"]


def test_dict_batches_and_examples_without_a_label(tmp_path):
    class Reads(Plain):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch["image"]), batch["label"], ignore_index=-100)

    data = points(64)
    data.tensors[1][:10] = -100
    monitor = DistributionalSimplicityMonitor()
    fit(tmp_path, Reads(), DataLoader(DictBatches(data), 8), monitor)
    assert 0 <= monitor.curve[-1]["gaussian"] <= 1
    assert sum(int((examples.targets >= 0).sum()) for examples in monitor._examples) == 0  # let go of


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_examples": 0}, "must be at least 1"),
        ({"per_decade": 0}, "must be at least 1"),
        ({"shrinkage": 1.5}, "shrinkage=1.5"),
        ({"data": "test"}, "choose 'train' or 'val'"),
    ],
)
def test_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistributionalSimplicityMonitor(**arguments)


class NeverSteps(Plain):
    def training_step(self, batch, batch_idx):
        raise AssertionError("not reached")

    def validation_step(self, batch, batch_idx):
        self(batch[0])


def test_what_cannot_be_cloned_is_refused_before_training(tmp_path):
    class Embeds(NeverSteps):
        def forward(self, x):
            return super().forward(nn.functional.one_hot(x, 4).float())

    data = TensorDataset(torch.randint(4, (16,)), torch.arange(16) % 3)
    with pytest.raises(ValueError, match=r"the inputs are Tensor\(8,\) int64.*input_key"):
        trainer(tmp_path, callbacks=[DistributionalSimplicityMonitor()]).fit(Embeds(), DataLoader(data, 8))


def test_labels_out_of_range_are_refused_before_training(tmp_path):
    data = TensorDataset(torch.randn(16, 4), torch.arange(16) % 5)
    with pytest.raises(ValueError, match="a target is 4"):
        trainer(tmp_path, callbacks=[DistributionalSimplicityMonitor()]).fit(NeverSteps(), DataLoader(data, 8))


def test_without_validation_data_that_is_said(tmp_path):
    with pytest.raises(ValueError, match="the run has no validation data"):
        trainer(tmp_path, callbacks=[DistributionalSimplicityMonitor(data="val")]).fit(NeverSteps(), loader())


def test_two_of_them_on_the_same_data_are_refused(tmp_path):
    twins = [DistributionalSimplicityMonitor(), DistributionalSimplicityMonitor()]
    with pytest.raises((ValueError, RuntimeError), match="DistributionalSimplicityMonitor"):
        trainer(tmp_path, callbacks=twins)
