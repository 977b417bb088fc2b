"""Heads and blocks to build into a model."""

from lightning_feat.layers.grassmann import GrassmannLinear

__all__ = ["GrassmannLinear"]
