"""What the callbacks do, for LightningModules that you write yourself."""

from lightning_feat.mixins.loss_terms import LossTermsMixin

__all__ = ["LossTermsMixin"]
