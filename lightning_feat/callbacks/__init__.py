"""Plug-ins for LightningModules that you did not write.

A ``*Monitor`` only reads, a ``*Regularizer`` changes the loss.
"""

from lightning_feat.callbacks.after_training import load_with_head
from lightning_feat.callbacks.data_plan import DataPlan
from lightning_feat.callbacks.feature_regularizer import FeatureRegularizer
from lightning_feat.callbacks.feature_shift import FeatureShiftMonitor, FeatureShiftRegularizer, PromptLearner
from lightning_feat.callbacks.grassmann import GrassmannHead, GrassmannMonitor
from lightning_feat.callbacks.neural_collapse import (
    ClassNormRealignment,
    CollapseThreshold,
    DotRegressionRegularizer,
    MixupGeometryMonitor,
    NeuralCollapseMonitor,
    NeuralCollapseRegularizer,
    RegressionCollapseMonitor,
    SimplexETFHead,
    realign_classifier,
)
from lightning_feat.callbacks.reports import CurvePlotter, FeatureReport, MetricHistory, Panel, SummaryTable
from lightning_feat.callbacks.simplicity_bias import (
    DistributionalSimplicityMonitor,
    FeatureRelianceMonitor,
    ForgettingMonitor,
    SharpnessAwareMinimization,
    SharpnessMonitor,
    SimplicityBiasUpsampler,
)
from lightning_feat.callbacks.spectrum import SpectrumMonitor, UniformityRegularizer
from lightning_feat.callbacks.transfer import (
    FewShotMonitor,
    LinearProbe,
    LinearSVMProbe,
    NearestMeanProbe,
    NeighbourProbe,
)
from lightning_feat.joints.loss.regularizer import Regularizer
from lightning_feat.joints.loss.terms import WeightSchedule

__all__ = [
    "ClassNormRealignment",
    "CollapseThreshold",
    "CurvePlotter",
    "DataPlan",
    "DistributionalSimplicityMonitor",
    "DotRegressionRegularizer",
    "FeatureRegularizer",
    "FeatureRelianceMonitor",
    "FeatureReport",
    "FeatureShiftMonitor",
    "FeatureShiftRegularizer",
    "FewShotMonitor",
    "ForgettingMonitor",
    "GrassmannHead",
    "GrassmannMonitor",
    "LinearProbe",
    "LinearSVMProbe",
    "MetricHistory",
    "MixupGeometryMonitor",
    "NearestMeanProbe",
    "NeighbourProbe",
    "NeuralCollapseMonitor",
    "NeuralCollapseRegularizer",
    "Panel",
    "PromptLearner",
    "RegressionCollapseMonitor",
    "Regularizer",
    "SharpnessAwareMinimization",
    "SharpnessMonitor",
    "SimplexETFHead",
    "SimplicityBiasUpsampler",
    "SpectrumMonitor",
    "SummaryTable",
    "UniformityRegularizer",
    "WeightSchedule",
    "load_with_head",
    "realign_classifier",
]
