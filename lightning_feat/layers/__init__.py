"""Heads and blocks to build into a model."""

from lightning_feat.layers.feature_shift.prompt_hooks import insert_prompts
from lightning_feat.layers.feature_shift.prompts import DeepPrompts
from lightning_feat.layers.feature_shift.surgery import SurgeryBlock, attach_surgery
from lightning_feat.layers.grassmann import GrassmannLinear
from lightning_feat.layers.neural_collapse import SimplexETF, SparseETF

__all__ = [
    "DeepPrompts",
    "GrassmannLinear",
    "SimplexETF",
    "SparseETF",
    "SurgeryBlock",
    "attach_surgery",
    "insert_prompts",
]
