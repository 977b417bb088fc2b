import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, SubsetRandomSampler

from lightning_feat.callbacks import NeuralCollapseMonitor
from lightning_feat.joints.data.epoch_ends import is_last_epoch
from tests.helpers import Plain, points, trainer


class Careful(Plain):
    """Does not train on NaN, which would be in its weights for good."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0].nan_to_num(), batch[1]), batch_idx)


def measured(tmp_path, loader, measures=("*",), **options):
    pl.seed_everything(0)
    module = Careful(lr=0.0)
    monitor = NeuralCollapseMonitor(mode="exact", measures=list(measures), **options)
    run = trainer(tmp_path, callbacks=[monitor])
    run.fit(module, loader)
    return {name: float(value) for name, value in run.callback_metrics.items() if "neural_collapse" in name}


def test_a_pass_takes_the_examples_that_a_sampler_selects(tmp_path):
    data = points(60)
    sampled = measured(tmp_path, DataLoader(data, batch_size=8, sampler=SubsetRandomSampler(range(30))))
    assert sampled == pytest.approx(measured(tmp_path, DataLoader(Subset(data, range(30)), batch_size=8)), nan_ok=True)


class Half(Sampler):
    def __iter__(self):
        return iter(range(30))

    def __len__(self):
        return 30


def test_a_sampler_whose_choice_cannot_be_told_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="which examples a Half leaves out"):
        measured(tmp_path, DataLoader(points(60), batch_size=8, sampler=Half()))


class Noisy(Dataset):
    """Augments anew each time."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        x, y = points(40)[index]
        return x + 0.3 * torch.randn(4) + float(np.random.rand()), y  # noqa: NPY002  # both generators


def test_a_second_run_over_the_data_meets_the_same_augmentations(tmp_path):
    kept, again = (
        measured(tmp_path, DataLoader(Noisy(), batch_size=8), memory_budget_mb=budget) for budget in (100.0, 0.0)
    )
    assert kept == pytest.approx(again, nan_ok=True)


def test_a_pass_under_fast_dev_run_takes_one_batch(tmp_path):
    counted, module = [], Plain()
    module.net.fc.register_forward_hook(lambda *_: counted.append(module.trainer.global_step))
    options = {"fast_dev_run": True, "callbacks": [NeuralCollapseMonitor(mode="exact")]}
    trainer(tmp_path, **options).fit(module, DataLoader(points(80), batch_size=8))
    assert counted.count(1) == 1  # after the one training step


def test_one_bad_sample_in_the_first_batch_does_not_decide_what_feeds_the_classifier(tmp_path):
    x, y = points(40).tensors
    x[3] = torch.nan
    with pytest.warns(UserWarning, match="were NaN or inf"):
        values = measured(tmp_path, DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8))
    assert values["neural_collapse/nc3/penultimate"] > 0


def test_a_stop_before_the_least_number_of_epochs_is_not_the_last():
    class Run:
        current_epoch, max_epochs, max_steps, global_step = 1, 10, -1, 20
        min_epochs, min_steps, should_stop = 3, None, True

    assert not is_last_epoch(Run())
    Run.current_epoch = 2
    assert is_last_epoch(Run())
