"""Let any optimizer train class subspaces."""

from lightning_feat.optim.grassmann.step import SubspaceStep, follow_subspaces, following

__all__ = ["SubspaceStep", "follow_subspaces", "following"]
