"""The start of a run as features that are looked up by the index of an example."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_feat.functional.feature_shift import relative_shift
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.data.passes import clean_batches, clean_loader, run_forward
from lightning_feat.joints.data.trace import without_trace
from lightning_feat.joints.data.ways import Ways
from lightning_feat.joints.features.batches import TargetKey, targets_of
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.taps import Read
from lightning_feat.joints.reference.hearing import ComparedTap, silence

_MOST_APART = 0.01  # share of their length by which cached features may differ: rounding, in another batch, of bfloat16


class CachedStart:
    """The features of the start for every training example, in host memory; no second network, no second pass.

    Valid only where an example is the same in every epoch. Before the first batch the network, still at its start, is
    run on it in eval mode, as the module gets it: features that differ from the cached ones are refused. What a
    ``training_step`` itself does to its inputs is not seen.

    Memory: examples x features x 2 or 4 bytes for each layer, on every process and in every checkpoint (tokens and
    positions count each). 50,000 examples of 512 features take 51 MB in float16.
    Time: one pass over the training data when the run begins.

    Args:
        layers: dotted names; None for the input of the classifier.
        read: the ``"output"`` or the ``"input"`` of the layers.
        pooling: see ``joints.features.pooling.pool``.
        index_key: where a batch keeps the index of each example, int64 ``(N,)``: see ``joints.features.batches``.
        dtype: ``"float16"`` or ``"float32"``; values beyond 65504 need the latter.
        forward: ``forward(module, batch)`` that runs the network.
    """

    def __init__(
        self,
        layers: Sequence[str | None],
        read: Read | None,
        pooling: Pooling | None,
        index_key: TargetKey,
        dtype: Literal["float16", "float32"] = "float32",
        forward: Forward | None = None,
    ) -> None:
        if index_key is None:
            raise ValueError(
                "cached features are looked up by the index of an example: set index_key to where a batch keeps it "
                "(lightning_feat.data.IndexedDataset adds it), or reference='live'."
            )
        if dtype not in ("float16", "float32"):
            raise ValueError(f"cache_dtype={dtype!r}: choose 'float16' or 'float32'.")
        self.taps = [ComparedTap(layer, read, pooling) for layer in layers]
        self.labels = [tap.label for tap in self.taps]
        self.index_key = index_key
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self.ways = Ways(forward, "the features of the start")
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.cache = _Cache()

    def begin(self) -> None:
        """Forget an earlier run."""
        self.cache = _Cache()
        self.ways.begin()

    def remove(self) -> None:
        """Nothing was put on the module."""

    def fill(self, trainer: Trainer, module: LightningModule) -> None:
        """Run the network over the training data; nothing happens where that is done."""
        if self.cache.rows:
            return
        if trainer.global_step > 0:
            raise RuntimeError("the network has been trained, and its features at the start are not known any more.")
        loader = clean_loader(trainer, trainer.train_dataloader, "training")
        parts: list[tuple[Tensor, dict[str, Tensor]]] = []
        with self._attached(module), without_trace(trainer, module):
            for batch in clean_batches(trainer, module, loader):
                index = self._indices(batch)
                rows = {label: self._by_example(h, index) for label, h in self._run(trainer, module, batch).items()}
                parts.append((index.cpu(), {label: h.to(self.dtype).cpu() for label, h in rows.items()}))
        index = torch.cat([part for part, _ in parts])
        rows = {label: torch.cat([part[label] for _, part in parts]) for label in self.labels}
        self.cache.rows = {label: _of_all_processes(trainer, module, index, rows[label]) for label in self.labels}
        for label, h in self.cache.rows.items():
            if not bool(h.isfinite().all()):
                raise ValueError(
                    f"cached features of {label} are not finite, or an index below {len(h)} is missing: set "
                    "cache_dtype='float32', and give every example an index, from 0 on."
                )
        self.cache.is_fresh = True

    def features(self, module: LightningModule, batch: Any) -> dict[str, Tensor]:
        if not self.cache.rows:
            self.fill(module.trainer, module)
        return self._look_up(module, batch)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"rows": self.cache.rows} if self.cache.rows else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Undo ``state``."""
        if state:
            if sorted(state["rows"]) != sorted(self.labels):
                raise ValueError(
                    f"the checkpoint has cached features of {sorted(state['rows'])}, not of {sorted(self.labels)}: "
                    "resume with the layers that the run began with."
                )
            self.cache.rows = state["rows"]

    def _look_up(self, module: LightningModule, batch: Any) -> dict[str, Tensor]:
        index = self._indices(batch).cpu()
        size = min(len(rows) for rows in self.cache.rows.values())
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= size):
            raise ValueError(f"an example has the index {int(index.max())}, but features of {size} are cached.")
        found = {label: rows[index] for label, rows in self.cache.rows.items()}
        return {label: rows.flatten(0, 1).to(module.device) for label, rows in found.items()}

    def check(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Refuse features that are not those of the first batch, before the network has run on it (which changes
        BatchNorm's statistics); nothing happens in later batches.
        """
        if not self.cache.is_fresh:
            return
        self.cache.is_fresh = False
        with self._attached(module), without_trace(trainer, module):
            now = self._run(trainer, module, batch)
        for label, cached in self._look_up(module, batch).items():
            apart = float(relative_shift(now[label], cached)) if now[label].shape == cached.shape else float("inf")
            if apart > _MOST_APART:
                raise ValueError(
                    f"the features of {label} in the first batch are not those that were cached, by {apart:.2g} of "
                    "their length: the training data are augmented, or index_key is wrong. Use reference='live'."
                )

    def _run(self, trainer: Trainer, module: LightningModule, batch: Any) -> dict[str, Tensor]:
        way = self.ways.find(trainer, module, batch, "training", self.taps)
        for tap in self.taps:
            tap.listen()
        run_forward(trainer, module, batch, way)
        self.shapes = {tap.label: [shape[1:] for shape in tap.shapes] for tap in self.taps}
        return {tap.label: tap.take() for tap in self.taps}

    @contextmanager
    def _attached(self, module: LightningModule) -> Iterator[None]:
        with silence(module):  # the pass is nobody else's
            for tap in self.taps:
                tap.attach(module)
            try:
                yield
            finally:
                for tap in self.taps:
                    tap.remove()

    def _indices(self, batch: Any) -> Tensor:
        index = targets_of(batch, self.index_key, "index_key")
        if index.is_floating_point() or index.ndim != 1:
            raise ValueError(
                f"index_key={self.index_key!r} leads to {index.dtype} of shape {tuple(index.shape)}, not to one "
                "integer for each example."
            )
        return index

    def _by_example(self, features: Tensor, index: Tensor) -> Tensor:
        if len(features) % len(index):
            raise ValueError(f"{len(features)} features do not divide by {len(index)} examples: choose a pooling.")
        return features.unflatten(0, (len(index), -1))


class _Cache:
    """Shared by copies of a module that is being trained."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}  # by label, (examples, tokens, D)
        self.is_fresh = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Cache":
        return self


def _of_all_processes(trainer: Trainer, module: LightningModule, index: Tensor, rows: Tensor) -> Tensor:
    """The rows of all processes in the order of their indices, on every one; piece by piece, by way of the device."""
    shares = [(index, rows)]
    if trainer.world_size > 1:
        shares = []
        for source in range(trainer.world_size):
            mine = source == trainer.global_rank
            size = torch.tensor(len(index), device=module.device)
            torch.distributed.broadcast(size, source)
            for start in range(0, int(size), 4096):
                stop = min(start + 4096, int(size))
                pieces = (
                    [index[start:stop], rows[start:stop]]
                    if mine
                    else [index.new_empty(stop - start), rows.new_empty(stop - start, *rows.shape[1:])]
                )
                on_device = [piece.to(module.device).contiguous() for piece in pieces]
                for piece in on_device:
                    torch.distributed.broadcast(piece, source)
                shares.append((on_device[0].cpu(), on_device[1].cpu()))
    everything = torch.cat([index for index, _ in shares])
    ordered = rows.new_full((int(everything.max()) + 1, *rows.shape[1:]), torch.nan)
    ordered[everything] = torch.cat([rows for _, rows in shares])
    return ordered
