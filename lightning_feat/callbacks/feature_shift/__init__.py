"""Features held to those of a reference, and prompts."""

from lightning_feat.callbacks.feature_shift.monitor import FeatureShiftMonitor
from lightning_feat.callbacks.feature_shift.prompts import PromptLearner
from lightning_feat.callbacks.feature_shift.regularizer import FeatureShiftRegularizer

__all__ = ["FeatureShiftMonitor", "FeatureShiftRegularizer", "PromptLearner"]
