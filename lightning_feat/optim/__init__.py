"""Steps for parameters that live on a manifold."""

from lightning_feat.optim.grassmann.step import SubspaceStep, follow_subspaces

__all__ = ["SubspaceStep", "follow_subspaces"]
