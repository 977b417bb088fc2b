from typing import Any

from lightning.pytorch import Trainer


class InsideFit:
    """Whether a checkpoint that comes is loaded inside a fit, and not the one that the run begins with.

    A search for a learning rate or a batch size, before training or at a milestone, saves a checkpoint, trains for a
    while without the callbacks, and loads it to go back to where it was. Lightning calls the same hooks for both. A
    callback that takes what a checkpoint brings for the beginning of its run keeps one of these, tells it of three of
    its own hooks, and asks it there or in ``load_state_dict``, which comes after ``on_load_checkpoint``::

        def setup(...):               self._inside.setup(trainer)          # of "fit"
        def on_load_checkpoint(...):  self._inside.load(trainer)
        def on_train_start(...):      self._inside.train_start()
        def load_state_dict(...):     if not self._inside: ...
    """

    def __init__(self) -> None:
        self._optimizers: Any = None  # those from before the fit
        self._training = self._inside = False

    def __bool__(self) -> bool:
        return self._inside

    def setup(self, trainer: Trainer) -> None:
        """A fit begins."""
        self._optimizers, self._training, self._inside = trainer.optimizers, False, False

    def load(self, trainer: Trainer) -> None:
        """A checkpoint comes."""
        # That of a run comes before its optimizers are made. Where a strategy loads it afterwards (FSDP), a search
        # before training cannot be told from it.
        made = trainer.optimizers is not self._optimizers and not trainer.strategy.restore_checkpoint_after_setup
        self._inside = self._training or made

    def train_start(self) -> None:
        """The run has what it begins with."""
        self._training, self._optimizers = True, None
