"""How well features serve for other tasks."""

from lightning_feat.functional.transfer.class_separation import (
    PairAngleSums,
    add_direction_sums_,
    class_separation_r2,
    direction_sums,
    pair_angle_sums,
    sample_of_each_class,
    within_class_variability,
)
from lightning_feat.functional.transfer.few_shot import FewShotError, few_shot_error, few_shot_error_bound
from lightning_feat.functional.transfer.neighbours import nearest_neighbours, neighbour_accuracy
from lightning_feat.functional.transfer.probe import (
    LinearProbeResult,
    LogisticRegression,
    Scaling,
    fit_logistic_regression,
    hold_out,
    linear_probe,
)
from lightning_feat.functional.transfer.prototypes import calibrated_prototypes, nearest_mean_scores
from lightning_feat.functional.transfer.voting import neighbour_votes

__all__ = [
    "FewShotError",
    "LinearProbeResult",
    "LogisticRegression",
    "PairAngleSums",
    "Scaling",
    "add_direction_sums_",
    "calibrated_prototypes",
    "class_separation_r2",
    "direction_sums",
    "few_shot_error",
    "few_shot_error_bound",
    "fit_logistic_regression",
    "hold_out",
    "linear_probe",
    "nearest_mean_scores",
    "nearest_neighbours",
    "neighbour_accuracy",
    "neighbour_votes",
    "pair_angle_sums",
    "sample_of_each_class",
    "within_class_variability",
]
