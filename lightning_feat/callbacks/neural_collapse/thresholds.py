from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_feat.functional.neural_collapse import known_measures
from lightning_feat.joints.arguments import check_fields


@dataclass
class CollapseThreshold:
    """What to do when a measure of neural collapse passes a value, in an epoch in which it is measured.

    Args:
        measure: name as in ``functional.neural_collapse.collapse_measures``; it need not be among those logged.
        value: of the threshold. The measure itself must lie beyond it: nan never does.
        direction: on which side of the value something happens.
        action: ``"warn"`` says so once; ``"stop"`` ends the run after the epoch, as ``EarlyStopping`` does, on all
            processes alike and not before ``min_epochs``.
        from_epoch: the first epoch to look at, counted from 1: early in training classes are not yet learnt.
        layer: the layer as it stands in logged names; None for each that is watched.
        data: None for both, where both are measured.
    """

    measure: str
    value: float
    direction: Literal["below", "above"] = "below"
    action: Literal["warn", "stop"] = "warn"
    from_epoch: int = 1
    layer: str | None = None
    data: Literal["train", "val"] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.measure not in known_measures():
            near = ", ".join(get_close_matches(self.measure, known_measures(), n=3, cutoff=0.3))
            raise ValueError(f"there is no measure {self.measure!r}{': did you mean ' + near if near else ''}?")


class ThresholdWatch:
    """Hold the values of every round of a monitor against thresholds."""

    def __init__(self, thresholds: Sequence[CollapseThreshold]) -> None:
        self.thresholds = [*thresholds]
        self._said: set[tuple[int, str, str]] = set()
        self._met: set[int] = set()

    def reset(self) -> None:
        """Begin a run: what was said may be said again."""
        self._said, self._met = set(), set()

    def check(self, trainer: Trainer, layer: str, data: str, values: dict[str, float]) -> None:
        """Warn or stop. All processes call this alike, with the same values."""
        epochs = trainer.current_epoch + 1
        for number, threshold in enumerate(self.thresholds):
            place = (number, layer, data)
            if threshold.layer not in (None, layer) or threshold.data not in (None, data):
                continue
            if threshold.measure not in values:
                continue
            self._met.add(number)
            value, below = values[threshold.measure], threshold.direction == "below"
            passed = value < threshold.value if below else value > threshold.value
            # Equal on all processes up to the last bit of different hardware; one that goes on alone would hang.
            passed = trainer.strategy.reduce_boolean_decision(passed, all=False)
            if not passed or epochs < threshold.from_epoch or place in self._said:
                continue
            self._said.add(place)
            sentence = (
                f"neural collapse: {threshold.measure} of layer {layer} ({data} data) is {value:.4g} after {epochs} "
                f"{'epoch' if epochs == 1 else 'epochs'}, {threshold.direction} {threshold.value:g}"
            )
            if threshold.action == "stop":
                trainer.should_stop = True
                rank_zero_info(f"{sentence}: the run stops.")
            else:
                rank_zero_warn(f"{sentence}.")

    def end_round(self) -> None:
        """Say once which thresholds wait for something that is not measured."""
        for number, threshold in enumerate(self.thresholds):
            if number not in self._met:
                self._met.add(number)
                rank_zero_warn(
                    f"neural collapse: the threshold on {threshold.measure} has no effect, as no layer that is watched "
                    "gives that measure: nc4_mismatch and ncc_accuracy need mode='exact', nc0 and nc3 the layer that "
                    "feeds the classifier."
                )
