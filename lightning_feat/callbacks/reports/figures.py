"""What the figures of all callbacks share: how they are written and shown, and their colours."""

import os
from io import BytesIO
from typing import TYPE_CHECKING

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer

from lightning_feat.joints.run.folder import run_folder
from lightning_feat.joints.run.loggers import send_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinct for all kinds of colour vision; Okabe and Ito, "Color Universal Design", 2008, without the yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DOTS_PER_INCH = 200


def folder_for_figures(trainer: Trainer, owner: str) -> str:
    """Where figures go, see ``run_folder``. For all processes, before a fit: one alone would wait for ever.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{owner} needs matplotlib, which is not installed: pip install "lightning-feat[recipes]"'
        ) from error
    return run_folder(trainer)


def publish_figure(trainer: Trainer, figure: "Figure", folder: str, filename: str, tag: str) -> None:
    """Write the figure into ``folder``, in the format that the ending of ``filename`` says, and show it in the loggers,
    see ``send_image``. For one process alone.
    """
    path = os.path.join(folder, filename)
    files = get_filesystem(path)
    files.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with files.open(path, "wb") as file:
        file.write(_rendered(figure, os.path.splitext(path)[1][1:]))
    if trainer.loggers:
        send_image(trainer, tag, _rendered(figure, "png"))


def _rendered(figure: "Figure", kind: str) -> bytes:
    content = BytesIO()
    figure.savefig(content, dpi=DOTS_PER_INCH, format=kind)
    return content.getvalue()
