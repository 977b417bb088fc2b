"""Give pictures and files to the loggers of a run, each in its own way. For one process alone.

By the names of classes: the loggers of pytorch_lightning are other classes than those of lightning.pytorch, and none of
their packages need be installed.
"""

import csv
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer


def send_image(trainer: Trainer, tag: str, png: bytes) -> None:
    """Show a picture in every logger that shows pictures: TensorBoard, W&B, MLflow, Comet, DVCLive, and what has the
    ``log_image`` of the ``WandbLogger``.

    Args:
        trainer: its step is that of the picture.
        tag: the name of the picture, ``method/figure/layer``; the same one in a later step follows on the earlier.
        png: the content of a PNG file.
    """
    for logger in trainer.loggers:
        for name, show in _SHOW.items():
            if _is_a(logger, name):
                show(logger, tag, png, trainer.global_step)
                break
        else:
            if callable(getattr(logger, "log_image", None)):
                _show_in_wandb(logger, tag, png, trainer.global_step)


def send_file(trainer: Trainer, path: str) -> None:
    """Give a copy of a finished file to every logger that keeps files: W&B, MLflow and Comet. W&B gets a CSV file as
    the table that it is.

    Args:
        trainer: of the run.
        path: of the file, which may be remote.
    """
    senders = [(logger, send) for logger in trainer.loggers for name, send in _SEND.items() if _is_a(logger, name)]
    if senders:
        with _local(path) as copied:
            for logger, send in senders:
                send(logger, copied, trainer.global_step)


def _is_a(logger: Any, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(logger).__mro__)


@contextmanager
def _local(path: str) -> Iterator[str]:
    if os.path.isfile(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copied = os.path.join(folder, os.path.basename(path))
        get_filesystem(path).get(path, copied)
        yield copied


def _image(png: bytes) -> Any:
    from PIL import Image  # comes with matplotlib

    return Image.open(BytesIO(png))


def _show_in_tensorboard(logger: Any, tag: str, png: bytes, step: int) -> None:
    import numpy

    logger.experiment.add_image(tag, numpy.asarray(_image(png).convert("RGB")), step, dataformats="HWC")


def _show_in_wandb(logger: Any, tag: str, png: bytes, step: int) -> None:
    logger.log_image(key=tag, images=[_image(png)], step=step)


def _show_in_mlflow(logger: Any, tag: str, png: bytes, step: int) -> None:
    # As a file, which all its versions show: each step in the folder of its tag.
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"step={step:08d}.png")
        with open(path, "wb") as file:
            file.write(png)
        logger.experiment.log_artifact(logger.run_id, path, tag)


def _show_in_comet(logger: Any, tag: str, png: bytes, step: int) -> None:
    logger.experiment.log_image(BytesIO(png), name=tag, step=step)


def _show_in_dvclive(logger: Any, tag: str, png: bytes, step: int) -> None:
    logger.experiment.log_image(f"{tag}/step={step:08d}.png", _image(png))


def _send_to_wandb(logger: Any, path: str, step: int) -> None:
    name, ending = os.path.splitext(os.path.basename(path))
    if ending == ".csv":
        with open(path, newline="") as file:
            heads, *rows = csv.reader(file)
        logger.log_table(key=name, columns=heads, data=[[_number(cell) for cell in row] for row in rows], step=step)
    else:
        logger.experiment.log_artifact(path, name=f"{name}-{logger.version}", type=name)


def _send_to_mlflow(logger: Any, path: str, step: int) -> None:
    logger.experiment.log_artifact(logger.run_id, path)


def _send_to_comet(logger: Any, path: str, step: int) -> None:
    logger.experiment.log_asset(path, file_name=os.path.basename(path), overwrite=True, step=step)


def _number(cell: str) -> float | str | None:
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell


_SHOW: dict[str, Callable[[Any, str, bytes, int], None]] = {
    "TensorBoardLogger": _show_in_tensorboard,
    "WandbLogger": _show_in_wandb,
    "MLFlowLogger": _show_in_mlflow,
    "CometLogger": _show_in_comet,
    "DVCLiveLogger": _show_in_dvclive,
}
_SEND: dict[str, Callable[[Any, str, int], None]] = {
    "WandbLogger": _send_to_wandb,
    "MLFlowLogger": _send_to_mlflow,
    "CometLogger": _send_to_comet,
}
