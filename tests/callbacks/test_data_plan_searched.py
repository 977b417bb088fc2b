import pytest
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from lightning_feat.callbacks import DataPlan
from tests.callbacks.plans import Hook, Seeing, fit, indexed, plan, planned
from tests.helpers import loader, trainer


class AtMilestones(LearningRateFinder):
    """Searches where these epochs begin, and notes nothing that the search trains on."""

    def __init__(self, *epochs):
        super().__init__(num_training_steps=3, update_attr=False)
        self.epochs = epochs

    def on_fit_start(self, trainer, pl_module):
        self.search(trainer, pl_module)

    def on_train_epoch_start(self, trainer, pl_module):
        self.search(trainer, pl_module)

    def search(self, trainer, pl_module):
        begun = trainer.fit_loop._combined_loader is not None
        if (trainer.current_epoch if begun else "start") in self.epochs:
            seen, pl_module.seen = pl_module.seen, {}
            self.lr_find(trainer, pl_module)
            pl_module.seen = seen


@pytest.mark.parametrize("epochs", [("start",), (0,), (1,), (3,), (0, 1, 2, 3)])
def test_a_search_for_a_learning_rate_changes_no_plan(tmp_path, epochs):
    module = Seeing()
    run = fit(tmp_path, module, DataPlan(plan), AtMilestones(*epochs), loaders=indexed())
    assert module.seen == {epoch: planned(epoch) for epoch in range(4)}
    assert run.global_step == 4 + 5 + 5 + 2


class Scaled(Hook):
    def __init__(self):
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self):
        return indexed(self.batch_size)

    def val_dataloader(self):
        return loader(8)


def test_a_search_for_a_batch_size_changes_no_plan(tmp_path):
    search = BatchSizeFinder(max_trials=1, steps_per_trial=1, init_val=3)
    run = trainer(tmp_path, callbacks=[DataPlan(plan), search], max_epochs=4)
    module = Scaled()
    module.on_train_start = module.seen.clear  # what the search has shown
    run.fit(module)
    assert module.batch_size == 3
    assert module.seen == {epoch: planned(epoch) for epoch in range(4)}
