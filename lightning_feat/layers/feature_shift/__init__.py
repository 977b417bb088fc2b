"""Prompts and surgery blocks, and how they get into a tower."""

from lightning_feat.layers.feature_shift.prompt_hooks import insert_prompts
from lightning_feat.layers.feature_shift.prompts import DeepPrompts
from lightning_feat.layers.feature_shift.surgery import SurgeryBlock, attach_surgery

__all__ = ["DeepPrompts", "SurgeryBlock", "attach_surgery", "insert_prompts"]
