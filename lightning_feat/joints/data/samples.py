"""Features of some data with their class indices, on every process, for what is fitted to them or drawn from them."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, Protocol, TypeAlias

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_feat.joints.data.passes import clean_loader, try_first_batch
from lightning_feat.joints.data.processes import gather_samples
from lightning_feat.joints.data.shared_pass import Again, take_first
from lightning_feat.joints.data.ways import Ways
from lightning_feat.joints.features.batches import TargetKey, class_indices, mask_of, targets_of
from lightning_feat.joints.features.taps import FeatureTap

Loaders: TypeAlias = dict[Literal["train", "val", "test"], Any]


class Labelled(Protocol):
    """The callback that reads them: where features, targets and tokens are, and which target counts as none."""

    tap: FeatureTap
    ways: Ways
    target_key: TargetKey
    mask_key: TargetKey
    ignore_index: int


class Samples:
    """A reading for ``shared_pass``: features and targets of all processes, in the order of the data set, those left
    out that have no class.

    Args:
        title: of the pass, for the progress bar.
        trainer: of the run.
        module: the network.
        reader: the callback.

    Attributes:
        features: ``(N, D)``, after the pass.
        targets: ``(N,)`` class indices.
    """

    def __init__(self, title: str, trainer: Trainer, module: LightningModule, reader: Labelled) -> None:
        self.title, self._trainer, self._reader, self.taps = title, trainer, reader, [reader.tap]
        self.features = torch.zeros(0, 1, device=module.device)
        self.targets = torch.zeros(0, dtype=torch.long, device=module.device)
        self._parts: list[tuple[Tensor, Tensor]] = []

    def take(self, batch: Any) -> None:
        reader, tap = self._reader, self._reader.tap
        mask = mask_of(batch, reader.mask_key)
        h = tap.take(mask)
        where = f"the targets for layer {tap.label}"
        t = class_indices(targets_of(batch, reader.target_key), len(h), where, tap.pooling != "tokens").to(h.device)
        if tap.pooling == "tokens" and mask is not None:
            t = t.masked_fill(~mask.to(h.device).flatten(), reader.ignore_index)
        self._parts.append((h, t))

    def finish(self, again: Again) -> None:
        if self._parts:
            self.features, self.targets = (torch.cat(column) for column in zip(*self._parts, strict=True))
        self._parts = []
        world, device = self._trainer.world_size, self.targets.device
        index = self._trainer.global_rank + world * torch.arange(len(self.targets), device=device)
        h, t, _ = gather_samples(self.features, self.targets, index)
        keep = (t != self._reader.ignore_index) & (t >= 0)
        self.features, self.targets = h[keep], t[keep]


def loaders_of(trainer: Trainer, data: LightningDataModule) -> Loaders:
    """The loaders of a datamodule that is not the run's, prepared once over all processes. The random numbers of the
    run stay where they are.
    """
    with isolate_rng():
        if trainer.local_rank == 0 and (data.prepare_data_per_node or trainer.global_rank == 0):
            data.prepare_data()
        trainer.strategy.barrier("loaders_of")
        data.setup("fit")
        loaders: Loaders = {"train": None, "val": None, "test": None}
        if is_overridden("train_dataloader", data, LightningDataModule):
            loaders["train"] = data.train_dataloader()
        if is_overridden("val_dataloader", data, LightningDataModule):
            loaders["val"] = data.val_dataloader()
        if is_overridden("test_dataloader", data, LightningDataModule):
            data.setup("test")
            loaders["test"] = data.test_dataloader()
    return loaders


def try_parts(
    trainer: Trainer, module: LightningModule, reader: Labelled, parts: Mapping[str, Any], foreign: bool
) -> None:
    """Run the network on the first batch of each part and look at its targets: what is wrong with the data is said now,
    not after the last epoch.

    Args:
        trainer: in ``on_train_start``.
        module: the network, the tap of the reader attached.
        reader: the callback.
        parts: loaders by their names.
        foreign: whether they are other data than the run's; on its own the module says how it is run.
    """
    if foreign and reader.ways.forward is None and isinstance(trainer.train_dataloader, DataLoader):
        run = clean_loader(trainer, trainer.train_dataloader, "train")
        with suppress(ValueError):
            try_first_batch(trainer, module, run, "run", reader.ways, [reader.tap])
    for name, loader in parts.items():
        batch = try_first_batch(
            trainer, module, clean_loader(trainer, loader, name), name, reader.ways, [reader.tap], foreign
        )
        take_first(trainer, module, Samples("", trainer, module, reader), batch, reader.ways, name)
