"""What adds up over batches and over processes, around the functions of ``functional``."""

from lightning_feat.metrics.class_separation import ClassSeparation, WithinClassVariability
from lightning_feat.metrics.neural_collapse import ClassDistanceNormalizedVariance, NeuralCollapse

__all__ = ["ClassDistanceNormalizedVariance", "ClassSeparation", "NeuralCollapse", "WithinClassVariability"]
