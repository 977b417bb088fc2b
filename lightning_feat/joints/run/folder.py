import os

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer

_WITH_FOLDER = {"TensorBoardLogger", "CSVLogger"}  # whose log_dir is of one run
_WITHOUT_ID = {"DVCLiveLogger"}  # what it calls version is the same for all runs that do not name it


def run_folder(trainer: Trainer) -> str:
    """The folder of this run alone, for what callbacks write: beside the files of the first logger, or the
    ``default_root_dir`` of a Trainer without one.

    ``trainer.log_dir`` is it for TensorBoard and CSV only; of other loggers it is what all their runs share, or None.
    There this is ``save_dir/name/version``, with the id of the run for a version, where Lightning puts checkpoints,
    too; of a logger that gives no id, the first ``version_<n>`` that is free.

    For all processes alike, in ``setup`` or later: the first one knows, and tells the others.
    """
    folder = _own_folder(trainer) if trainer.is_global_zero else ""
    return str(trainer.strategy.broadcast(folder))


def _own_folder(trainer: Trainer) -> str:
    if not trainer.loggers:
        return str(trainer.default_root_dir)
    logger = trainer.loggers[0]
    # By name: the loggers of pytorch_lightning are other classes than those of lightning.pytorch.
    names = {cls.__name__ for cls in type(logger).__mro__}
    if names & _WITH_FOLDER:
        return str(logger.log_dir)
    parent = os.path.join(str(logger.save_dir or trainer.default_root_dir), str(logger.name or ""))
    version = None if names & _WITHOUT_ID else logger.version
    if version is None or version == "":
        return _first_free(parent)
    return os.path.join(parent, version if isinstance(version, str) else f"version_{version}")


def _first_free(parent: str) -> str:
    files = get_filesystem(parent)
    number = 0
    while files.exists(folder := os.path.join(parent, f"version_{number}")):
        number += 1
    return folder
