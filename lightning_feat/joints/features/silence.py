from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_feat.joints.features.taps import TapError


class SilenceWatch:
    """Says that a layer was not heard. A step may skip the network now and then; one that should have run it in the
    first batch is refused, and an epoch in which nothing was heard is told, once in a run.

    Args:
        owner: begins the sentence.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.begin()

    def begin(self) -> None:
        """Begin a run."""
        self._ever_heard = self._said = False
        self._missed: TapError | None = None
        self._heard_in_epoch = False

    def note(self, error: TapError, outputs: Any) -> None:
        """Nothing was heard in a batch. Raises ``error`` where the step gave a loss, and nothing was heard before.

        Where Lightning does not optimize, a step gives none, and may have trained another part.
        """
        if outputs and not self._ever_heard:
            raise error
        self._missed = self._missed or error

    def heard(self) -> None:
        """Something was heard in a batch."""
        self._ever_heard = self._heard_in_epoch = True

    def end_epoch(self, trainer: Trainer) -> None:
        """Warn if nothing was heard in all of it."""
        missed, heard = self._missed, self._heard_in_epoch
        self._missed, self._heard_in_epoch = None, False
        if missed is None or heard or self._said:
            return
        self._said = True
        rank_zero_warn(f"{self.owner} heard nothing in epoch {trainer.current_epoch}, and logs nothing: {missed}")
