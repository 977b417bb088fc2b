"""Plug-ins for LightningModules that you did not write.

A ``*Monitor`` only reads, a ``*Regularizer`` changes the loss.
"""

from lightning_feat.callbacks.collapse_regularizer import NeuralCollapseRegularizer
from lightning_feat.callbacks.collapse_thresholds import CollapseThreshold
from lightning_feat.callbacks.curves import CurvePlotter, Panel
from lightning_feat.callbacks.data_plan import DataPlan
from lightning_feat.callbacks.feature_shift import FeatureShiftMonitor
from lightning_feat.callbacks.feature_shift_regularizer import FeatureShiftRegularizer
from lightning_feat.callbacks.grassmann import GrassmannHead
from lightning_feat.callbacks.grassmann_monitor import GrassmannMonitor
from lightning_feat.callbacks.history import MetricHistory
from lightning_feat.callbacks.linear_probe import LinearProbe
from lightning_feat.callbacks.mixup_geometry import MixupGeometryMonitor
from lightning_feat.callbacks.neural_collapse import NeuralCollapseMonitor
from lightning_feat.callbacks.prompts import PromptLearner
from lightning_feat.callbacks.regression_collapse import RegressionCollapseMonitor
from lightning_feat.callbacks.regularizer import FeatureRegularizer, Regularizer
from lightning_feat.callbacks.simplex import DotRegressionRegularizer, SimplexETFHead
from lightning_feat.callbacks.summary import SummaryTable
from lightning_feat.callbacks.upsampling import SimplicityBiasUpsampler

__all__ = [
    "CollapseThreshold",
    "CurvePlotter",
    "DataPlan",
    "DotRegressionRegularizer",
    "FeatureRegularizer",
    "FeatureShiftMonitor",
    "FeatureShiftRegularizer",
    "GrassmannHead",
    "GrassmannMonitor",
    "LinearProbe",
    "MetricHistory",
    "MixupGeometryMonitor",
    "NeuralCollapseMonitor",
    "NeuralCollapseRegularizer",
    "Panel",
    "PromptLearner",
    "RegressionCollapseMonitor",
    "Regularizer",
    "SimplexETFHead",
    "SimplicityBiasUpsampler",
    "SummaryTable",
]
