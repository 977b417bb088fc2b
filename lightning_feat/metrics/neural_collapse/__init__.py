"""Neural collapse of everything seen, exact over batches and processes."""

from lightning_feat.metrics.neural_collapse.collapse import ClassDistanceNormalizedVariance, NeuralCollapse

__all__ = ["ClassDistanceNormalizedVariance", "NeuralCollapse"]
