"""Data that are drawn from a distribution whose features, and what can be reached by each of them, are known."""

from lightning_feat.data.synthetic.shortcut import ShortcutDataModule, shortcut_examples
from lightning_feat.data.synthetic.slabs import SlabBlocksDataModule, slab_blocks
from lightning_feat.data.synthetic.two_feature_patches import TwoFeaturePatchesDataModule, two_feature_patches

__all__ = [
    "ShortcutDataModule",
    "SlabBlocksDataModule",
    "TwoFeaturePatchesDataModule",
    "shortcut_examples",
    "slab_blocks",
    "two_feature_patches",
]
