"""An honest A/B test of a training run: arms, the same seeds for all, and what the difference is."""

from lightning_feat.compare.conditions import Conditions, compare_conditions, report_conditions
from lightning_feat.compare.effects import Effect
from lightning_feat.compare.reporting import Comparison, report
from lightning_feat.compare.running.arms import FunctionArm, YamlArm
from lightning_feat.compare.running.work import StudyError
from lightning_feat.compare.study import compare

__all__ = [
    "Comparison",
    "Conditions",
    "Effect",
    "FunctionArm",
    "StudyError",
    "YamlArm",
    "compare",
    "compare_conditions",
    "report",
    "report_conditions",
]
