"""From a network and data to a ``FeatureSet``: a clean pass, a budget, and one set on the first process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import Subset

from lightning_feat.functional.common.lots import lowest_lots
from lightning_feat.joints.data.passes import clean_batches, clean_loader, loader_like, run_forward
from lightning_feat.joints.data.processes import gather_on_first
from lightning_feat.joints.data.samplers import processes_share
from lightning_feat.joints.data.shared_pass import Again
from lightning_feat.joints.data.trace import without_trace
from lightning_feat.joints.data.ways import Ways
from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.report.collecting.budget import chosen_samples
from lightning_feat.report.collecting.ears import Ears
from lightning_feat.report.collecting.samples_of import class_names_of, names_of
from lightning_feat.report.feature_set import TOKENS, FeatureSet, Head, Pictures
from lightning_feat.report.pictures import as_bytes, pictures_of, tile_side


@dataclass(frozen=True)
class Budget:
    """How much of the data is kept.

    Attributes:
        samples: at most, the network runs on no more.
        rows: at most, of all layers: a token is a row.
        megabytes: of the memory of the host, for what is kept.
        seed: of the sample that is taken beyond.
    """

    samples: int = 10_000
    rows: int = 10_000
    megabytes: float = 512.0
    seed: int = 0


@dataclass
class Source:
    """Data as this process goes over them.

    Attributes:
        loader: of the share of this process.
        places: ``(n,)`` of its samples in the whole of the data.
        size: samples in the whole, over all processes.
        whole: whether the network sees all of them.
        dataset: in which places are; None where each process has data of its own.
    """

    loader: Any
    places: Tensor
    size: int
    whole: bool
    dataset: Any


def source_of(trainer: Trainer, loader: Any, name: str, budget: Budget) -> Source:
    """The data that are passed over: all, or a seeded sample of ``budget.samples`` of them, the same for any number of
    processes. Collective. Raises the ``ValueError`` of ``clean_loader``.
    """
    clean = clean_loader(trainer, loader, name)
    own = len(clean.dataset)  # type: ignore[arg-type]
    sizes = [own]
    if trainer.world_size > 1:
        mine = torch.tensor([own], device=trainer.strategy.root_device)
        sizes = [int(n) for n in trainer.strategy.all_gather(mine).flatten()]
    places = trainer.global_rank + trainer.world_size * torch.arange(own)
    dataset: Any = clean.dataset
    if trainer.world_size > 1:
        dataset = (
            dataset.dataset if processes_share(trainer, loader[0] if isinstance(loader, list) else loader) else None
        )
    in_step = type(trainer.strategy).__name__ == "ModelParallelStrategy"  # its processes run equally many batches
    few = bool(getattr(trainer, "fast_dev_run", False))
    chosen = None if in_step or few else chosen_samples(sum(sizes), budget.samples, budget.seed)
    if chosen is None:
        return Source(clean, places, sum(sizes), True, dataset)
    every = torch.cat([rank + len(sizes) * torch.arange(n) for rank, n in enumerate(sizes)]).sort().values
    mine = torch.isin(places, every[torch.tensor(chosen)]).nonzero()[:, 0]
    part = Subset(clean.dataset, mine.tolist())
    return Source(loader_like(clean, part, clean.batch_size), places[mine], sum(sizes), False, dataset)


class Collecting:
    """A reading for ``shared_pass``, which ends with a ``FeatureSet`` on the first process.

    Args:
        trainer: of the run.
        module: the network, the ears attached to it.
        ears: on what is heard.
        source: the data that are passed over.
        budget: what is kept.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, ears: Ears, source: Source, budget: Budget) -> None:
        self.title = "Feature report"
        self._trainer, self._module, self._ears = trainer, module, ears
        self._source, self._budget = source, budget
        self._columns: dict[str, list[Tensor]] = {}
        self._tiles: list[tuple[Tensor, Tensor]] = []  # samples, and their pictures
        self._samples, self._rows, self._held = 0, 0, 0
        self._head = Head()

    @property
    def taps(self) -> Sequence[FeatureTap]:
        """Those of the layers, and those of the classifier."""
        return self._ears.all_taps

    def take(self, batch: Any) -> None:
        heard = self._ears.take(batch)
        places = self._source.places[self._samples : self._samples + heard.size]
        self._samples += heard.size
        sample = places[heard.sample]
        token = torch.zeros_like(sample) if heard.token is None else heard.token
        keep = heard.keep.nonzero()[:, 0]
        self._rows += len(keep)
        found = {f"h{i}": h.float() for i, h in enumerate(heard.features)}
        found |= {} if heard.targets is None else {"targets": heard.targets}
        found |= {} if heard.logits is None else {"logits": heard.logits.float()}
        found = {name: value.detach().cpu()[keep] for name, value in found.items()}
        found["id"] = (sample * TOKENS + token)[keep]
        for name, value in found.items():
            self._columns.setdefault(name, []).append(value)
        if heard.token is not None:
            self._columns.setdefault("token", []).append(token[keep])
        shown = pictures_of(batch, tile_side(min(self._source.size, self._budget.samples)))
        if shown is not None and len(shown) == heard.size:
            self._tiles.append((places, shown))
        self._held += len(keep)
        if self._held > 2 * self._most():
            self._prune()

    def finish(self, again: Again) -> None:
        self._prune()
        columns = {name: parts[0] for name, parts in self._columns.items()}
        tiles = self._tiles[0] if self._tiles else None
        if self._trainer.world_size > 1:
            columns, tiles = _gathered(self._trainer, columns, tiles, len(self._ears.taps))
            rows = torch.tensor(self._rows, device=self._trainer.strategy.root_device)
            self._rows = int(self._trainer.strategy.reduce(rows, reduce_op="sum"))
        self._head = self._ears.head()  # of a sharded module it is there on all processes together
        self._columns = {name: [column] for name, column in columns.items() if self._trainer.is_global_zero}
        self._tiles = [tiles] if tiles is not None and self._trainer.is_global_zero else []
        self._prune()

    def result(self) -> FeatureSet | None:
        """After the pass, on the first process: the set; None elsewhere, and where fewer than two rows count.

        Raises:
            ValueError: if the targets are of no kind that is known.
        """
        if "h0" not in self._columns or len(self._columns["id"][0]) < 2:
            return None
        made = self._set(self._head, self._rows)
        self._columns, self._tiles = {}, []
        return made

    def _most(self) -> int:
        """Rows that fit the budget; twice as many are held for a moment."""
        entries = sum(
            parts[0][:1].numel() * parts[0].element_size() for parts in self._columns.values() if len(parts[0])
        )
        entries += sum(2 * shown[:1].numel() for _, shown in self._tiles[:1])
        return max(2, min(self._budget.rows, int(self._budget.megabytes * 2**20 / 2 / max(1, entries))))

    def _prune(self) -> None:
        if not self._columns:
            return
        joined = {name: torch.cat(parts) for name, parts in self._columns.items()}
        kept = lowest_lots(joined["id"], self._most(), self._budget.seed)
        self._columns = {name: [column[kept]] for name, column in joined.items()}
        self._held = len(kept)
        if self._tiles:
            samples, shown = (torch.cat(parts) for parts in zip(*self._tiles, strict=True))
            seen = torch.isin(samples, self._columns["id"][0] // TOKENS)
            self._tiles = [(samples[seen], shown[seen])]

    def _set(self, head: Any, total: int) -> FeatureSet:
        columns = {name: parts[0] for name, parts in self._columns.items()}
        sample = columns["id"] // TOKENS
        notes, pictures = [], None
        if self._tiles:
            samples, shown = self._tiles[0]
            tiles, stretched = as_bytes(shown)
            row = torch.searchsorted(samples, sample).clamp(max=len(samples) - 1)
            pictures = Pictures(tiles, torch.where(samples[row] == sample, row, -1))
            if stretched:
                notes.append("Pictures are the inputs of the network, stretched to the range of the screen.")
        if self._ears.without_targets:
            notes.append(f"No labels: {self._ears.without_targets}")
        if not self._source.whole:
            every = f"{self._source.size:,} samples"
            notes.append(
                f"The network ran on {self._budget.samples:,} of {every}, drawn with seed {self._budget.seed}."
            )
        if len(sample) < total:
            notes.append(
                f"Of {total:,} rows of features {len(sample):,} are shown, drawn at random with seed "
                f"{self._budget.seed}; all numbers are those of these."
            )
        dataset = self._source.dataset
        names = class_names_of(dataset if dataset is not None else self._source.loader.dataset)
        made = FeatureSet(
            {label: columns[f"h{i}"] for i, label in enumerate(self._ears.labels)},
            columns.get("targets"),
            columns.get("logits"),
            sample,
            columns.get("token"),
            total if self._source.whole else max(total, self._source.size),
            pictures,
            names_of(dataset, sample.tolist()),
            head=head,
            notes=notes,
        )
        made.class_names = names if len(names) >= made.num_classes else []  # else they are of other classes
        return made


def run_pass(
    trainer: Trainer,
    module: LightningModule,
    source: Source,
    name: str,
    ways: Ways,
    reading: Collecting,
    step: Callable[[], object],
) -> None:
    """Run the network over ``source`` without a trace.

    Args:
        trainer: knows the precision and the processes.
        module: the network, the taps of the reading attached.
        source: the data.
        name: of the data, for ``ways``.
        ways: how the network is run.
        reading: takes what is heard.
        step: called after each batch, for a progress bar.
    """
    with without_trace(trainer, module), isolate_rng():
        for batch in clean_batches(trainer, module, source.loader):
            way = ways.find(trainer, module, batch, name, reading.taps)
            for tap in reading.taps:
                tap.listen()
            run_forward(trainer, module, batch, way)
            for tap in reading.taps:
                tap.hold()
            reading.take(batch)
            step()
        reading.finish(lambda: iter(()))


def _gathered(
    trainer: Trainer, columns: dict[str, Tensor], tiles: tuple[Tensor, Tensor] | None, layers: int
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
    """What all processes hold, on the first one; a process without a sample takes part all the same."""
    names = [*(f"h{i}" for i in range(layers)), "targets", "logits", "token"]
    kinds = [_kind(columns.get(name)) for name in names]
    shape = [0] * 3 if tiles is None else [*tiles[1].shape[1:]]
    here = torch.tensor([*kinds, *shape], device=trainer.strategy.root_device)
    flags: list[int] = trainer.strategy.all_gather(here).view(-1, len(names) + 3).amax(0).tolist()
    empty = torch.zeros(0, dtype=torch.long)
    ids = columns.get("id", empty)
    found: dict[str, Tensor] = {}
    for name, kind in zip(names, flags, strict=False):
        if not kind:
            continue
        none = torch.zeros([0] * (1 + (kind == 3)), dtype=torch.long if kind == 1 else torch.float32)
        column = columns.get(name, none)
        gathered = gather_on_first(trainer, column, ids)
        if gathered is not None:
            found[name], found["id"] = gathered
    if not any(flags[len(names) :]):
        return found, None
    samples, shown = tiles if tiles is not None else (empty, torch.zeros(0, *flags[len(names) :]))
    pictures = gather_on_first(trainer, shown.float().flatten(1), samples)
    if pictures is None:
        return found, None
    return found, (pictures[1], pictures[0].view(-1, *flags[len(names) :]).bfloat16())


def _kind(column: Tensor | None) -> int:
    """What a process without a sample must know of a column: that it is there, of whole numbers, floats, or rows."""
    if column is None:
        return 0
    return 1 if not column.is_floating_point() else 2 if column.ndim == 1 else 3
