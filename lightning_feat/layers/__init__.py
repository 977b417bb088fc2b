"""Heads and blocks to build into a model."""

from lightning_feat.layers.grassmann import GrassmannLinear
from lightning_feat.layers.simplex import SimplexETF, SparseETF

__all__ = ["GrassmannLinear", "SimplexETF", "SparseETF"]
