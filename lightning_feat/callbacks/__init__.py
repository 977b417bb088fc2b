"""Plug-ins for LightningModules that you did not write: a ``*Monitor`` only reads, a ``*Regularizer`` changes the
loss.
"""

from lightning_feat.callbacks.grassmann import GrassmannHead
from lightning_feat.callbacks.neural_collapse import NeuralCollapseMonitor
from lightning_feat.callbacks.regularizer import FeatureRegularizer, Regularizer

__all__ = ["FeatureRegularizer", "GrassmannHead", "NeuralCollapseMonitor", "Regularizer"]
