from typing import Literal, TypeAlias

from lightning.pytorch import Trainer

from lightning_feat.callbacks.simplicity_bias.loss_knee import LossKnee

When: TypeAlias = float | int | Literal["knee"]


class SeparatingEpoch:
    """After how many epochs the slow examples are chosen.

    Args:
        given: a share of ``max_epochs``, a number of epochs, or ``"knee"``.
        knee: seeks it, where it is asked for.

    Attributes:
        until: the number of epochs, once a fit has begun; 0 for a knee that is not known yet.

    Raises:
        ValueError: if it is none of these.
    """

    def __init__(self, given: When, knee: LossKnee) -> None:
        if isinstance(given, float) and given >= 1 and given.is_integer():
            given = int(given)  # from YAML a whole number may come as 8.0
        numbers = given >= 1 if isinstance(given, int) else isinstance(given, float) and 0 < given < 1
        fits = given == "knee" or numbers
        if not fits:
            raise ValueError(
                f"separating_epoch={given!r}: give a share of the epochs between 0 and 1, a whole number of epochs, or "
                "'knee'."
            )
        self.given, self.knee, self.until = given, knee, 0

    @property
    def by_knee(self) -> bool:
        return self.given == "knee"

    def begin(self, trainer: Trainer, followed: bool) -> None:
        """When a fit begins.

        Args:
            trainer: knows the epochs.
            followed: whether an epoch must follow it in the same part of the run.

        Raises:
            ValueError: if the fit does not come so far.
        """
        epochs = trainer.max_epochs or 0
        if isinstance(self.given, int):
            self.until = self.given
        elif epochs < 1:
            raise ValueError(f"separating_epoch={self.given!r} needs max_epochs: set it, or give a number of epochs.")
        elif isinstance(self.given, float):
            self.until = max(1, round(self.given * epochs))
        else:
            self.until = 0
        if 0 < epochs < self.until + followed and not getattr(trainer, "fast_dev_run", False):
            raise ValueError(
                f"separating_epoch={self.given!r} is epoch {self.until} of max_epochs={epochs}: choose an earlier one."
            )

    def is_over(self, trainer: Trainer) -> bool:
        """At the end of an epoch: whether it was the last before the choice, the same on all processes."""
        return self.knee.reached(trainer) if self.by_knee else trainer.current_epoch + 1 >= self.until
