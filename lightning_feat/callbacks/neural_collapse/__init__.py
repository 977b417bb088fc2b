"""Neural collapse: watched, induced and held back."""

from lightning_feat.callbacks.neural_collapse.mixup import MixupGeometryMonitor
from lightning_feat.callbacks.neural_collapse.monitor import NeuralCollapseMonitor
from lightning_feat.callbacks.neural_collapse.realignment import ClassNormRealignment, realign_classifier
from lightning_feat.callbacks.neural_collapse.regression import RegressionCollapseMonitor
from lightning_feat.callbacks.neural_collapse.regularizer import NeuralCollapseRegularizer
from lightning_feat.callbacks.neural_collapse.simplex import DotRegressionRegularizer, SimplexETFHead
from lightning_feat.callbacks.neural_collapse.thresholds import CollapseThreshold

__all__ = [
    "ClassNormRealignment",
    "CollapseThreshold",
    "DotRegressionRegularizer",
    "MixupGeometryMonitor",
    "NeuralCollapseMonitor",
    "NeuralCollapseRegularizer",
    "RegressionCollapseMonitor",
    "SimplexETFHead",
    "realign_classifier",
]
