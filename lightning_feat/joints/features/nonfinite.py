from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn


class NonfiniteWatch:
    """Says that features were NaN or inf: once in a run for each layer, as a diverged run is no reason to end it.

    Args:
        owner: begins the sentence.
        consequence: ends it, with the comma or word before.
    """

    def __init__(self, owner: str, consequence: str) -> None:
        self.owner, self.consequence = owner, consequence
        self._said: set[str] = set()

    def reset(self) -> None:
        """Begin a run: what was said may be said again."""
        self._said = set()

    def check(self, trainer: Trainer, layer: str, lost: float, total: float) -> None:
        """Warn if ``lost`` of the ``total`` features of this epoch, over all processes, were not finite."""
        if not lost or layer in self._said:
            return
        self._said.add(layer)
        share = f"{lost / total:.1%}" if lost >= 0.001 * total else "less than 0.1%"
        rank_zero_warn(
            f"{self.owner}: {share} of the features of layer {layer} in epoch {trainer.current_epoch} were NaN or inf"
            f"{self.consequence}."
        )
