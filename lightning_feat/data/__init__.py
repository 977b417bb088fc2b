"""Data sets and datamodules. They use nothing else of this library, and any ``LightningModule`` can train on them."""

from lightning_feat.data.base_to_novel import BaseToNovelDataModule
from lightning_feat.data.captioned_digits import CaptionedDigitsDataModule
from lightning_feat.data.cifar import CifarDataModule
from lightning_feat.data.cifar_files import write_example_cifar
from lightning_feat.data.digits import DigitsDataModule
from lightning_feat.data.elpv import ElpvDataModule
from lightning_feat.data.image_folder import ImageFolderDataModule, write_example_folder
from lightning_feat.data.indexed import IndexedDataset
from lightning_feat.data.plan import PlanSampler
from lightning_feat.data.selection import Selection
from lightning_feat.data.spurious_digits import SpuriousDigitsDataModule
from lightning_feat.data.synthetic import (
    ShortcutDataModule,
    SlabBlocksDataModule,
    TwoFeaturePatchesDataModule,
    shortcut_examples,
    slab_blocks,
    two_feature_patches,
)

__all__ = [
    "BaseToNovelDataModule",
    "CaptionedDigitsDataModule",
    "CifarDataModule",
    "DigitsDataModule",
    "ElpvDataModule",
    "ImageFolderDataModule",
    "IndexedDataset",
    "PlanSampler",
    "Selection",
    "ShortcutDataModule",
    "SlabBlocksDataModule",
    "SpuriousDigitsDataModule",
    "TwoFeaturePatchesDataModule",
    "shortcut_examples",
    "slab_blocks",
    "two_feature_patches",
    "write_example_cifar",
    "write_example_folder",
]
