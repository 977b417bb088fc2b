"""What a network learns late, and on which feature it relies."""

from lightning_feat.functional.simplicity_bias.clusters import (
    SlowExamples,
    TwoMeans,
    slow_examples,
    two_means,
    useful_indices,
)
from lightning_feat.functional.simplicity_bias.epochs import knee_reached, separating_epoch
from lightning_feat.functional.simplicity_bias.hard_examples import highest_losses, misclassified, random_examples
from lightning_feat.functional.simplicity_bias.reliance import (
    SelectionQuality,
    accuracy,
    binary_auc,
    block_randomized,
    feature_reliance,
    permuted_block,
    selection_quality,
    shortcut_bias,
    slow_feature_accuracy,
)
from lightning_feat.functional.simplicity_bias.sharpness import adaptive_scales, sharpness_step

__all__ = [
    "SelectionQuality",
    "SlowExamples",
    "TwoMeans",
    "accuracy",
    "adaptive_scales",
    "binary_auc",
    "block_randomized",
    "feature_reliance",
    "highest_losses",
    "knee_reached",
    "misclassified",
    "permuted_block",
    "random_examples",
    "selection_quality",
    "separating_epoch",
    "sharpness_step",
    "shortcut_bias",
    "slow_examples",
    "slow_feature_accuracy",
    "two_means",
    "useful_indices",
]
