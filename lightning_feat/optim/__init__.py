"""Steps for parameters that live on a manifold, and steps that look for flat minima."""

from lightning_feat.optim.grassmann.step import SubspaceStep, follow_subspaces
from lightning_feat.optim.simplicity_bias import sharpness_aware

__all__ = ["SubspaceStep", "follow_subspaces", "sharpness_aware"]
