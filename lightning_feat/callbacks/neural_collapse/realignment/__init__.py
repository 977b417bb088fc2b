"""Lengths of a classifier's rows, set anew after training."""

from lightning_feat.callbacks.neural_collapse.realignment.classifier_norms import (
    ClassNormRealignment,
    realign_classifier,
)

__all__ = ["ClassNormRealignment", "realign_classifier"]
