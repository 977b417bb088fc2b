"""A search for a learning rate or a batch size, before training or in its middle, leaves the start of a run alone."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from lightning_feat.callbacks import FeatureShiftMonitor, FeatureShiftRegularizer
from tests.helpers import Plain, equal, points, trainer, weights


class User(Plain):
    def __init__(self):
        super().__init__()
        self.batch_size = 8

    def training_step(self, batch, batch_idx):
        return super().training_step(batch[:2], batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch[:2], batch_idx)

    def val_dataloader(self):
        return self.train_dataloader()

    def train_dataloader(self):
        data = torch.utils.data.TensorDataset(*points(32).tensors, torch.arange(32))
        return torch.utils.data.DataLoader(data, batch_size=self.batch_size)


class RateFinder(LearningRateFinder):
    """Searches where each of the epochs in ``at`` begins, and keeps the rate."""

    def __init__(self, at):
        super().__init__(num_training_steps=4, update_attr=False)
        self.at = at

    def on_fit_start(self, trainer, pl_module):
        if 0 in self.at:
            self.lr_find(trainer, pl_module)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch in self.at and trainer.current_epoch > 0:
            self.lr_find(trainer, pl_module)


def batch_size_finder(at):
    return BatchSizeFinder(steps_per_trial=1, init_val=8, max_trials=1)


CALLBACKS = [
    *(lambda form=form: FeatureShiftRegularizer(form=form, weight=0.5) for form in ("relative", "cosine", "l2_sp")),
    lambda: FeatureShiftRegularizer(reference="cached", index_key=2),
    FeatureShiftMonitor,
]


def fit(tmp_path, *callbacks):
    pl.seed_everything(0, verbose=False)
    module = User()
    run = trainer(tmp_path, callbacks=[*callbacks], max_epochs=3)
    run.fit(module)
    return [*weights(module), *(v for name, v in sorted(run.callback_metrics.items()) if "feature_shift" in name)]


@pytest.mark.filterwarnings("error:the checkpoint has no reference")
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("finder", [lambda: RateFinder([0]), lambda: RateFinder([2]), lambda: batch_size_finder([0])])
@pytest.mark.parametrize("make", CALLBACKS)
def test_a_search_changes_neither_the_start_nor_what_is_logged(tmp_path, make, finder, ours_first):
    plain = fit(tmp_path, make())
    both = [make(), finder()]
    found = fit(tmp_path, *(both if ours_first else both[::-1]))
    assert len(plain) > 4
    assert equal(found, plain)
