"""How far features have moved from those of a reference."""

from lightning_feat.functional.feature_shift.prompt_gram import (
    exact_dtype,
    gram_consistency_loss,
    gram_discrepancy,
    gram_norm,
    gram_ratio,
)
from lightning_feat.functional.feature_shift.shift import (
    ShiftSums,
    cosine_shift,
    feature_distillation,
    l2_sp,
    relative_shift,
    relative_shift_by_sample,
    shift_consistency_loss,
    shift_discrepancy,
    shift_measures,
    shift_sums,
)

__all__ = [
    "ShiftSums",
    "cosine_shift",
    "exact_dtype",
    "feature_distillation",
    "gram_consistency_loss",
    "gram_discrepancy",
    "gram_norm",
    "gram_ratio",
    "l2_sp",
    "relative_shift",
    "relative_shift_by_sample",
    "shift_consistency_loss",
    "shift_discrepancy",
    "shift_measures",
    "shift_sums",
]
