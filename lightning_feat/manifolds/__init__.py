"""Geometry for geoopt, whose optimizers and parameters take these manifolds like its own."""

from lightning_feat.manifolds.grassmann import Grassmann

__all__ = ["Grassmann"]
