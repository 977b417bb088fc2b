"""Data sets and datamodules. They use nothing else of this library, and any ``LightningModule`` can train on them."""

from lightning_feat.data.digits import DigitsDataModule
from lightning_feat.data.indexed import IndexedDataset

__all__ = ["DigitsDataModule", "IndexedDataset"]
