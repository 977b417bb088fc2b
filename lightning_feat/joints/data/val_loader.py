"""The validation loader of a run whose first validation comes late."""

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng


def make_val_loader(trainer: Trainer) -> None:
    """In ``on_train_start``: let Lightning ask for the validation loader now, as it does where the first epoch ends in
    a validation; with ``check_val_every_n_epoch`` it would wait, and a pass at the end of an earlier epoch, or of a run
    that ends before, would have no data. Without effect where the loader is there, or the run has none.
    """
    if trainer.val_dataloaders is not None:
        return
    with isolate_rng():
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        finally:
            trainer.training = True
