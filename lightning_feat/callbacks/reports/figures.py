"""What the figures of all callbacks share: how they are written and shown, and their colours."""

import os
from io import BytesIO
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinct for all kinds of colour vision; Okabe and Ito, "Color Universal Design", 2008, without the yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DOTS_PER_INCH = 200


def folder_for_figures(trainer: Trainer, owner: str) -> str:
    """Where figures go, beside the logger's files. For all processes, before a fit: ``trainer.log_dir`` is a broadcast,
    at which one alone would wait for ever.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{owner} needs matplotlib, which is not installed: pip install "lightning-feat[recipes]"'
        ) from error
    return str(trainer.log_dir or trainer.default_root_dir)


def publish_figure(trainer: Trainer, figure: "Figure", folder: str, filename: str, tag: str) -> None:
    """Write the figure into ``folder``, in the format that the ending of ``filename`` says, and add it as an image to
    every logger that takes images: TensorBoard's, and those with the ``log_image`` of the ``WandbLogger``. For one
    process alone.
    """
    path = os.path.join(folder, filename)
    files = get_filesystem(path)
    files.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with files.open(path, "wb") as file:
        file.write(_rendered(figure, os.path.splitext(path)[1][1:]))
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            _show_in_tensorboard(figure, logger, tag, trainer.global_step)
        elif callable(getattr(logger, "log_image", None)):
            from PIL import Image  # comes with matplotlib

            image: Any = Image.open(BytesIO(_rendered(figure, "png")))
            logger.log_image(key=tag, images=[image], step=trainer.global_step)  # type: ignore[attr-defined]


def _rendered(figure: "Figure", kind: str) -> bytes:
    content = BytesIO()
    figure.savefig(content, dpi=DOTS_PER_INCH, format=kind)
    return content.getvalue()


def _show_in_tensorboard(figure: "Figure", logger: TensorBoardLogger, tag: str, step: int) -> None:
    # By our own pixels: `add_figure` would go by pyplot.
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(DOTS_PER_INCH)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = numpy.asarray(canvas.buffer_rgba())[..., :3]
    logger.experiment.add_image(tag, pixels, step, dataformats="HWC")
