import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import LearningRateFinder

from lightning_feat.joints.run.inside import InsideFit
from tests.helpers import Plain, loader, trainer


class Loads(pl.Callback):
    """Notes of each checkpoint that comes whether it is loaded inside the fit."""

    def __init__(self):
        self.inside, self.found = InsideFit(), []

    def setup(self, trainer, pl_module, stage):
        self.inside.setup(trainer)

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.inside.load(trainer)

    def on_train_start(self, trainer, pl_module):
        self.inside.train_start()

    def state_dict(self):
        return {"some": "state"}

    def load_state_dict(self, state_dict):
        self.found.append(bool(self.inside))


class AtMilestone(LearningRateFinder):
    def on_fit_start(self, *args):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


def fit(tmp_path, *callbacks, **kwargs):
    run = trainer(tmp_path, callbacks=list(callbacks), max_epochs=2)
    run.fit(Plain(), loader(), **kwargs)
    return run


def test_a_run_begins_with_its_checkpoint(tmp_path):
    fit(tmp_path, loads := Loads()).save_checkpoint(tmp_path / "end.ckpt")
    assert loads.found == []
    for _ in range(2):  # a second fit begins anew
        fit(tmp_path, loads, ckpt_path=tmp_path / "end.ckpt")
    assert loads.found == [False, False]


@pytest.mark.parametrize("search", [LearningRateFinder, AtMilestone])  # the former comes before all other callbacks
def test_a_search_loads_inside_the_fit(tmp_path, search):
    run = fit(tmp_path, loads := Loads(), search(num_training_steps=3))
    assert loads.found == [True]
    run.save_checkpoint(tmp_path / "end.ckpt")
    loads.found.clear()
    run.fit_loop.max_epochs = 3
    run.fit(Plain(), loader(), ckpt_path=tmp_path / "end.ckpt")
    assert loads.found == ([False] if search is AtMilestone else [False, True])
