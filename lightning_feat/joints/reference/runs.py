"""What a callback that holds a reference asks of a run."""

import weakref

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn


def is_new_run(trainer: Trainer, module: LightningModule, of: weakref.ref[LightningModule] | None) -> bool:
    """Whether this fit begins anew, rather than going on with what was begun on the module that ``of`` points to."""
    return trainer.global_step == 0 or of is None or of() is not module


def refuse_sharding(trainer: Trainer, owner: str, why: str = "keeps a copy of whole parameters") -> None:
    """Raise a ``ValueError`` under a strategy that spreads one parameter over processes."""
    strategy = type(trainer.strategy).__name__
    if strategy in ("ModelParallelStrategy", "FSDPStrategy", "DeepSpeedStrategy"):
        raise ValueError(f"{owner} {why}, which {strategy} shards: use DDP.")


def warn_of_missing_start(owner: str) -> None:
    """Say that a checkpoint knows no start."""
    rank_zero_warn(
        f"the checkpoint has no reference for {owner}: its weights, and not those that the run began with, are taken "
        "as the start. Give the file of the start (argument `start`), or resume with the callbacks of the first run."
    )
