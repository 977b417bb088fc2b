"""What a network learns late, and on which feature it relies."""

from lightning_feat.functional.simplicity_bias.blocks import block_mask, crossed_counts, reliance_of_counts
from lightning_feat.functional.simplicity_bias.clones import gaussian_clones, ledoit_wolf_shrinkage
from lightning_feat.functional.simplicity_bias.clusters import (
    SlowExamples,
    TwoMeans,
    slow_examples,
    two_means,
    useful_indices,
)
from lightning_feat.functional.simplicity_bias.curvature import TopEigenvalue, top_eigenvalue
from lightning_feat.functional.simplicity_bias.epochs import knee_reached, next_log_step, separating_epoch
from lightning_feat.functional.simplicity_bias.forgetting import LearningTimes, learning_times, no_looks, with_look
from lightning_feat.functional.simplicity_bias.hard_examples import highest_losses, misclassified, random_examples
from lightning_feat.functional.simplicity_bias.linear_rule import LinearRule, linear_discriminant
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
    "LearningTimes",
    "LinearRule",
    "SelectionQuality",
    "SlowExamples",
    "TopEigenvalue",
    "TwoMeans",
    "accuracy",
    "adaptive_scales",
    "binary_auc",
    "block_mask",
    "block_randomized",
    "crossed_counts",
    "feature_reliance",
    "gaussian_clones",
    "highest_losses",
    "knee_reached",
    "learning_times",
    "ledoit_wolf_shrinkage",
    "linear_discriminant",
    "misclassified",
    "next_log_step",
    "no_looks",
    "permuted_block",
    "random_examples",
    "reliance_of_counts",
    "selection_quality",
    "separating_epoch",
    "sharpness_step",
    "shortcut_bias",
    "slow_examples",
    "slow_feature_accuracy",
    "top_eigenvalue",
    "two_means",
    "useful_indices",
    "with_look",
]
