import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar


class PassProgress:
    """A line for a pass over data, drawn by the Trainer's own progress bar; nothing where it has none, or another kind.

    Made by :func:`pass_progress`, which takes the line away again.
    """

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._line: Any = None
        self._rich: Any = None

    def start(self, title: str, total: int) -> None:
        """Begin a line of ``total`` steps, in place of the last."""
        self.close()
        if isinstance(self._bar, TQDMProgressBar) and not self._bar.is_disabled:
            from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

            self._line = Tqdm(
                desc=title,
                total=total,
                position=2 * self._bar.process_position + 1,  # below that of training, where validation has its own
                leave=False,
                dynamic_ncols=True,
                file=sys.stdout,
                bar_format=self._bar.BAR_FORMAT,
            )
        elif isinstance(self._bar, RichProgressBar) and not self._bar.is_disabled:
            self._rich = self._bar.progress
            if self._rich is not None:
                self._line = self._rich.add_task(title, total=total)

    def step(self) -> None:
        """One batch is done."""
        if self._line is None:
            return
        if self._rich is not None:
            self._rich.advance(self._line)
            self._bar.refresh()
        else:
            self._line.update()

    def close(self) -> None:
        """Take the line away."""
        line, self._line = self._line, None
        if line is None:
            return
        if self._rich is not None:
            # Hidden and not removed: Lightning finds its own tasks by their place in the list.
            self._rich.update(line, visible=False)
            self._bar.refresh()
        else:
            line.close()


@contextmanager
def pass_progress(trainer: Trainer) -> Iterator[PassProgress]:
    """A :class:`PassProgress` that ends with the block, also by an exception."""
    progress = PassProgress(trainer.progress_bar_callback)
    try:
        yield progress
    finally:
        progress.close()
