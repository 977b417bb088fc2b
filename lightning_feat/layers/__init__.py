"""Heads and blocks to build into a model."""

from lightning_feat.layers.grassmann import GrassmannLinear
from lightning_feat.layers.prompts import DeepPrompts, insert_prompts
from lightning_feat.layers.simplex import SimplexETF, SparseETF
from lightning_feat.layers.surgery import SurgeryBlock, attach_surgery

__all__ = [
    "DeepPrompts",
    "GrassmannLinear",
    "SimplexETF",
    "SparseETF",
    "SurgeryBlock",
    "attach_surgery",
    "insert_prompts",
]
