"""The validation data of a run, for callbacks that read them at the end of an epoch of their own choice."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng


def make_val_loader(trainer: Trainer) -> None:
    """In ``on_train_start``: let Lightning ask for the validation loader now, as it does where the first epoch ends in
    a validation; with ``check_val_every_n_epoch`` it would wait, and a pass at the end of an earlier epoch, or of a run
    that ends before, would have no data. Without effect where the loader is there, or the run has none.
    """
    if trainer.val_dataloaders is not None or not trainer.enable_validation:
        return
    with isolate_rng():
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        finally:
            trainer.training = True


def val_loaders(trainer: Trainer, owner: str, instead: str) -> Any:
    """The validation loaders of the run.

    Args:
        trainer: of the run, after ``make_val_loader``.
        owner: begins the message.
        instead: what else its user can do, ends it.

    Raises:
        ValueError: if it has none; the message says why.
    """
    loaders = trainer.val_dataloaders
    if loaders is not None and loaders != []:
        return loaders
    if not trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined():
        why = ": give the Trainer some"
    elif trainer.limit_val_batches == 0:
        why = ", by limit_val_batches=0: set it to 1 or more"
    elif not trainer.enable_validation:
        why = ", which Lightning does not load for a module without validation_step: give it one"
    else:
        why = ": its loader is empty"
    raise ValueError(f"{owner} has nothing to look at: the run has no validation data{why}, or {instead}.")
