import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler

from lightning_feat.callbacks import DataPlan, ForgettingMonitor, SimplicityBiasUpsampler
from lightning_feat.functional.simplicity_bias import learning_times
from tests.helpers import Disturbed, Momentum, Plain, equal, loader, points, trainer, weights


class Watches(pl.Callback):
    """Whether each example is right at the end of each epoch."""

    def __init__(self):
        self.right = []

    def on_train_epoch_end(self, trainer, pl_module):
        x, y = points(64).tensors
        training = pl_module.training
        with torch.no_grad():
            self.right.append(pl_module.eval()(x).argmax(1) == y)
        pl_module.train(training)


class Restless(Momentum):
    """Forgets now and then."""

    def __init__(self):
        super().__init__(lr=1.0)


def fit(tmp_path, monitor, *beside, module=Restless, data=None, **options):
    pl.seed_everything(0)
    run = trainer(tmp_path, callbacks=[*beside, *([monitor] if monitor else [])], **{"max_epochs": 6, **options})
    module = module()
    run.fit(module, loader(64, shuffle=True) if data is None else data)
    return run, module


def test_times_are_the_definition(tmp_path):
    monitor, watch = ForgettingMonitor(), Watches()
    run, _ = fit(tmp_path, monitor, watch)
    expected = learning_times(torch.stack(watch.right))
    assert all(torch.equal(a, b) for a, b in zip(monitor.times, expected, strict=True))
    assert expected.forgetting.sum() > 0  # there is something to count
    logged = {k.removeprefix("forgetting/"): float(v) for k, v in run.callback_metrics.items() if "forgetting" in k}
    learned = expected.first_learned > 0
    assert logged == {
        "events/all": pytest.approx(float(expected.forgetting.double().mean())),
        "learned/all": pytest.approx(float(learned.double().mean())),
        "first_epoch/all": pytest.approx(float(expected.first_learned[learned].double().mean())),
    }


def test_an_example_that_contradicts_all_others_is_learned_late_or_never(tmp_path):
    class Line(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 2)

    y = torch.arange(40) % 2
    x = 2.0 * y[:, None] - 1
    y[0] = 1 - y[0]
    monitor = ForgettingMonitor()
    fit(tmp_path, monitor, module=Line, data=DataLoader(torch.utils.data.TensorDataset(x, y), 10))
    assert monitor.times.first_learned[0] == 0
    assert (monitor.times.always_learned[1:] > 0).all()


def test_the_file_holds_the_times_and_what_the_upsampler_has_chosen(tmp_path):
    logger = CSVLogger(tmp_path)
    upsampler, monitor = SimplicityBiasUpsampler(separating_epoch=2, restart=False), ForgettingMonitor()
    run, _ = fit(tmp_path, monitor, upsampler, logger=logger)
    found = np.load(f"{logger.log_dir}/forgetting.npz")
    for name, entry in monitor.times._asdict().items():
        assert np.array_equal(found[name], entry.numpy())
    assert found["looks"].tolist() == [1, 2, 3, 4, 5, 6]
    assert np.array_equal(found["slow"], upsampler.selection.slow.numpy())
    slow = upsampler.selection.slow
    for which, of in (("slow", slow), ("fast", ~slow)):
        expected = monitor.times.forgetting[of].double().mean()
        assert float(run.callback_metrics[f"forgetting/events/{which}"]) == pytest.approx(float(expected))


def test_the_selection_of_another_run(tmp_path):
    upsampler = SimplicityBiasUpsampler(separating_epoch=1, restart=False)
    fit(tmp_path, None, upsampler, max_epochs=2)
    upsampler.selection.save(str(tmp_path / "selection.pt"))
    run, _ = fit(tmp_path, ForgettingMonitor(selection=str(tmp_path / "selection.pt")))
    assert "forgetting/events/slow" in run.callback_metrics


def test_beside_an_upsampler_that_starts_again_the_times_are_those_of_the_second_start(tmp_path):
    monitor = ForgettingMonitor()
    fit(tmp_path, monitor, SimplicityBiasUpsampler(separating_epoch=2), max_epochs=3)
    assert monitor.looks == [1, 2, 3]


def test_without_a_logger_nothing_is_written_unless_asked_for(tmp_path):
    fit(tmp_path / "none", ForgettingMonitor())
    assert not [*tmp_path.rglob("forgetting.npz")]
    fit(tmp_path / "asked", ForgettingMonitor(table=True))
    assert [*tmp_path.rglob("forgetting.npz")] == [tmp_path / "asked" / "forgetting.npz"]


def test_a_disk_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "taken").write_text("a file in the place of the folder")
    with pytest.warns(UserWarning, match="could not write forgetting.npz"):
        run, _ = fit(tmp_path / "taken", ForgettingMonitor(table=True))
    assert run.current_epoch == 6


class SaveAt(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (2, 3):
            trainer.save_checkpoint(self.path)


def test_a_run_that_is_resumed_in_mid_epoch_ends_with_the_same_times(tmp_path):
    whole, plan = ForgettingMonitor(), torch.ones(64, dtype=torch.long)
    fit(tmp_path, whole, DataPlan(plan), SaveAt(tmp_path / "mid.ckpt"), data=loader(64))
    again = ForgettingMonitor()
    pl.seed_everything(7)
    run = trainer(tmp_path, callbacks=[DataPlan(plan), again], max_epochs=6)
    run.fit(Restless(), loader(64), ckpt_path=tmp_path / "mid.ckpt")
    assert again.looks == whole.looks
    assert all(torch.equal(a, b) for a, b in zip(again.times, whole.times, strict=True))


def test_a_second_fit_begins_anew(tmp_path):
    monitor = ForgettingMonitor()
    fit(tmp_path, monitor)
    fit(tmp_path, monitor, max_epochs=2)
    assert monitor.looks == [1, 2]


def test_chosen_epochs_keep_their_numbers(tmp_path):
    monitor = ForgettingMonitor(every_n_epochs=4)
    fit(tmp_path, monitor)
    assert monitor.looks == [1, 4, 6]
    assert set(monitor.times.first_learned.tolist()) <= {0, 1, 4, 6}


def test_the_training_is_bit_for_bit_what_it_is_without_the_monitor(tmp_path):
    runs = []
    for monitor in (None, ForgettingMonitor()):
        _, module = fit(tmp_path, monitor, module=Disturbed, max_epochs=2)
        runs.append((weights(module), [*module.buffers()], torch.get_rng_state()))
    assert all(equal(a, b) for a, b in zip(runs[0][:2], runs[1][:2], strict=True))
    assert torch.equal(runs[0][2], runs[1][2])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_a_part_of_the_data_by_a_sampler(tmp_path):
    monitor = ForgettingMonitor()
    fit(tmp_path, monitor, data=DataLoader(points(64), 8, sampler=SubsetRandomSampler(range(40))))
    assert len(monitor.times.forgetting) == 40


class Shifts(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        x, y = points(64)[index]
        return x + torch.randn(4), y


def test_augmented_examples_are_looked_at_as_they_are(tmp_path):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Shifts(), 8, shuffle=True)

        def clean_train_dataloader(self):
            return loader(64)

    monitor, watch = ForgettingMonitor(), Watches()
    fit(tmp_path, monitor, watch, data=Data())
    assert torch.equal(monitor.times.forgetting, learning_times(torch.stack(watch.right)).forgetting)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_epochs": 0}, "must be at least 1"),
        ({"selection": "nowhere.pt"}, "there is no selection at nowhere.pt"),
    ],
)
def test_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, ForgettingMonitor(**arguments))


class NeverSteps(Plain):
    def training_step(self, batch, batch_idx):
        raise AssertionError("not reached")

    def validation_step(self, batch, batch_idx):
        self(batch[0])


def test_several_rows_of_an_example_are_refused_before_training(tmp_path):
    class Twice(NeverSteps):
        def forward(self, x):
            return super().forward(torch.cat([x, x]))

    with pytest.raises(ValueError, match="16 rows of logits for 8 examples"):
        fit(tmp_path, ForgettingMonitor(), module=Twice)


def test_a_selection_of_other_data_is_refused_before_training(tmp_path):
    upsampler = SimplicityBiasUpsampler(separating_epoch=1, restart=False)
    fit(tmp_path, None, upsampler, max_epochs=2)
    upsampler.selection.save(str(tmp_path / "selection.pt"))
    other = ForgettingMonitor(selection=str(tmp_path / "selection.pt"))
    with pytest.raises(ValueError, match="the selection is of 64 examples, but the training data have 32"):
        fit(tmp_path, other, module=NeverSteps, data=DataLoader(Subset(points(64), range(32)), 8))
