"""One run of the network over some data for all callbacks that want its features at the end of the same epoch.

The first of them that has its turn asks the others, runs the network once, and lets each read every batch; what the
others have read waits for their turn. Each gets the numbers it would get alone, bit for bit: what it does after the
pass begins with the same random numbers, and where a weight has changed before its turn the network runs again for it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_feat.joints.data.pass_progress import PassProgress, pass_progress
from lightning_feat.joints.data.passes import clean_batches, clean_loader, run_forward, try_first_batch
from lightning_feat.joints.data.trace import without_trace
from lightning_feat.joints.data.ways import Ways
from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.joints.run.averaging import WhichWeights
from lightning_feat.joints.run.twins import callbacks_of

Again: TypeAlias = Callable[[], Iterator[Any]]


class Reading(Protocol):
    """What one callback makes of a pass."""

    @property
    def title(self) -> str:
        """Of the pass, for the progress bar."""

    @property
    def taps(self) -> Sequence[FeatureTap]:
        """Attached to the module; they listen while the network runs."""

    def take(self, batch: Any) -> None:
        """The network has run on ``batch``."""

    def finish(self, again: Again) -> None:
        """The pass is over, on all processes. ``again()`` runs the network anew and gives each batch after it."""


@runtime_checkable
class Reader(Protocol):
    """A callback that reads clean features at the end of epochs.

    Attributes:
        ways: how the network is run, by the names of the data.
        weights: on which weights it runs.
    """

    ways: Ways
    weights: WhichWeights

    def wanted(self, trainer: Trainer) -> dict[str, Any]:
        """The loaders that it will read in the epoch that ends, by the names it has for them."""

    def new_reading(self, trainer: Trainer, module: LightningModule, name: str) -> Reading:
        """What is to be fed by a pass over the data of this name."""


_Waiting: TypeAlias = dict[tuple[int, str], tuple[int, "_Weights", Reading]]
_waiting: WeakKeyDictionary[Trainer, _Waiting] = WeakKeyDictionary()


def read_clean(trainer: Trainer, module: LightningModule, reader: Reader, name: str, loader: Any) -> Any:
    """The reading of ``reader`` after a pass over ``loader``, which others may have shared.

    Args:
        trainer: knows the callbacks, the processes, the precision and the progress bar.
        module: the network.
        reader: the callback whose turn it is.
        name: of the data, as it calls them.
        loader: as the Trainer has it.
    """
    waiting, now = _waiting.setdefault(trainer, {}), _Weights(module)
    epoch = trainer.current_epoch
    for key in [key for key, (when, _, _) in waiting.items() if when != epoch]:
        del waiting[key]
    key = id(reader), name
    if key not in waiting or waiting[key][1] != now:
        members = [(reader, name), *_others(trainer, reader, name, loader)]
        readings = [member.new_reading(trainer, module, its_name) for member, its_name in members]
        _run(trainer, module, loader, members, readings)
        for (member, its_name), reading in zip(members, readings, strict=True):
            waiting[id(member), its_name] = epoch, now, reading
    return waiting.pop(key)[2]


def try_reading(
    trainer: Trainer,
    module: LightningModule,
    reader: Reader,
    name: str,
    loader: Any,
    taps: Sequence[FeatureTap] | None = None,
) -> Any:
    """Read the first batch as a pass will, without a trace, in ``on_train_start``: what is wrong with the data, with
    their targets or with how the network is run is said now, and not after an epoch.

    Args:
        trainer: of the run.
        module: the network.
        reader: the callback.
        name: of the data, as it calls them.
        loader: as the Trainer has it.
        taps: which of those of its reading must hear something; None for all.

    Returns:
        The batch, as the module gets it; None where this process has no sample.
    """
    reading = reader.new_reading(trainer, module, name)
    clean = clean_loader(trainer, loader, name)
    batch = try_first_batch(trainer, module, clean, name, reader.ways, reading.taps if taps is None else taps)
    take_first(trainer, module, reading, batch, reader.ways, name)
    return batch


def take_first(trainer: Trainer, module: LightningModule, reading: Reading, batch: Any, ways: Ways, name: str) -> None:
    """Let a reading that is thrown away take what ``try_first_batch`` has given."""
    if batch is None:
        return
    with without_trace(trainer, module), isolate_rng():
        for tap in reading.taps:
            tap.listen()
        try:
            run_forward(trainer, module, batch, ways.of(name))
            for tap in reading.taps:
                tap.hold()
            with _said_of_pass(name):
                reading.take(batch)
        finally:
            for tap in reading.taps:
                tap.drop()


def _others(trainer: Trainer, reader: Reader, name: str, loader: Any) -> list[tuple[Reader, str]]:
    """Who else wants these data in this epoch, the network run in the same way."""
    found: list[tuple[Reader, str]] = []
    for other in callbacks_of(trainer):
        if not isinstance(other, Reader) or other is reader or other.weights != reader.weights:
            continue
        for its_name, its_loader in other.wanted(trainer).items():
            if _one(its_loader) is not _one(loader):
                continue
            same_way = other.ways.of(its_name) == reader.ways.of(name) and other.ways.of(its_name) is not None
            # One decision: a process without a sample has found no way, and would wait for others at another place.
            if trainer.strategy.reduce_boolean_decision(same_way):
                found.append((other, its_name))
    return found


def _one(loader: Any) -> Any:
    return loader[0] if isinstance(loader, list) and len(loader) == 1 else loader


def _run(
    trainer: Trainer, module: LightningModule, loader: Any, members: list[tuple[Reader, str]], readings: list[Reading]
) -> None:
    reader, name = members[0]
    clean = clean_loader(trainer, loader, name)
    title = f"{', '.join(dict.fromkeys(reading.title for reading in readings))}, {name} data"

    def over(readings: list[Reading], progress: PassProgress) -> Iterator[Any]:
        taps = [tap for reading in readings for tap in reading.taps]
        for batch in clean_batches(trainer, module, clean):
            way = reader.ways.find(trainer, module, batch, name, readings[0].taps)
            for tap in taps:
                tap.listen()
            run_forward(trainer, module, batch, way)
            for tap in taps:
                tap.hold()
            yield batch
            progress.step()

    def again_for(reading: Reading, progress: PassProgress) -> Again:
        def again() -> Iterator[Any]:
            progress.start(f"{reading.title}, {name} data again", len(clean))
            yield from over([reading], progress)

        return again

    with without_trace(trainer, module), pass_progress(trainer) as progress:
        progress.start(title, len(clean))
        with isolate_rng():  # what comes after meets the same random numbers, and so the same augmentations
            for batch in over(readings, progress):
                for reading in readings:
                    with _said_of_pass(name):
                        reading.take(batch)
        for reading in readings:
            with isolate_rng():
                reading.finish(again_for(reading, progress))


@contextmanager
def _said_of_pass(name: str) -> Iterator[None]:
    """Labels that do not fit features: in training they may."""
    try:
        yield
    except ValueError as error:
        if "does not fit" not in str(error):
            raise
        raise ValueError(
            f"{error} This was a pass over the {name} data in eval mode, in which a network may give several rows of a "
            "sample (Monte Carlo dropout, ensembles) or run another copy of itself: then give forward=, a function "
            "forward(module, batch) that runs it once on each."
        ) from None


class _Weights:
    """What tells whether a parameter or a buffer has changed: where it is, its version, and its norm."""

    def __init__(self, module: LightningModule) -> None:
        tensors: list[Any] = [*module.parameters(), *module.buffers()]
        local: list[Tensor] = [t.detach().to_local() if hasattr(t, "to_local") else t.detach() for t in tensors]
        self.places = [(t.data_ptr(), t.numel()) for t in local]
        floating = [t for t in local if t.is_floating_point() and t.numel()]
        # Not by version counters: a write to `.data` does not count.
        norms = [norm.float() for norm in torch._foreach_norm(floating)] if floating else []
        self.norms = torch.stack([norm.to(norms[0].device) for norm in norms]).cpu() if norms else None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Weights) or self.places != other.places:
            return False
        if self.norms is None or other.norms is None:
            return self.norms is other.norms
        return torch.equal(self.norms.nan_to_num(), other.norms.nan_to_num())

    __hash__ = None  # type: ignore[assignment]
