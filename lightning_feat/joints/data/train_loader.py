"""Change the training loader of a run from outside, whatever way the user hands it over.

Lightning asks a *source* for the loader: the one given to ``fit``, or what ``train_dataloader`` of the module or the
datamodule returns. Here a source of ours stands in its place, asks it, and changes what it gives. That takes private
names of Lightning, run with 2.5 and 2.6: there is no public way to have a loader made anew between two epochs.
"""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader

Change = Callable[[DataLoader[Any], bool], DataLoader[Any]]


class _ChangedSource(_DataLoaderSource):
    def __init__(self, source: _DataLoaderSource, key: str, name: str | int | None, change: Change) -> None:
        super().__init__(source.instance, source.name)
        self.source, self.key, self.which, self.change = source, key, name, change

    def dataloader(self) -> Any:
        return _changed(self.source.dataloader(), self.which, self.change)


def change_train_loader(trainer: Trainer, key: str, name: str | int | None, change: Change) -> None:
    """From the next time that Lightning asks for it, let ``change`` stand between the training loader and the run.

    Args:
        trainer: of the run, in ``setup`` or later.
        key: for ``restore_train_loader``; the same key replaces the earlier change.
        name: which loader of a dict (its key) or list (its position); None where there is but one.
        change: gets the loader, and whether the run begins it again in an epoch where another loader is longer; it
            gives another.
    """
    restore_train_loader(trainer, key)
    trainer.fit_loop._data_source = _ChangedSource(trainer.fit_loop._data_source, key, name, change)


def restore_train_loader(trainer: Trainer, key: str) -> None:
    """Take the change away. Nothing happens if there is none."""
    outer: Any = trainer.fit_loop
    place = "_data_source"
    while isinstance(source := getattr(outer, place, None), _ChangedSource):
        if source.key == key:
            setattr(outer, place, source.source)
            return
        outer, place = source, "source"


def place_in_data(trainer: Trainer) -> tuple[int, int]:
    """The epoch whose training batches come next, and how many of it have been: of a run that is resumed, too, as soon
    as Lightning has restored its loops.
    """
    epoch: Any = trainer.fit_loop.epoch_progress.current
    # Not the completed batches, which lag by one while the hooks of a batch run.
    done: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return epoch.processed, done.processed if epoch.started > epoch.processed else 0


def make_train_loader_anew(trainer: Trainer) -> None:
    """Let Lightning ask for the training loader again before the next epoch: call it when an epoch has ended.

    Until then ``trainer.train_dataloader`` is None.
    """
    trainer.fit_loop._combined_loader = None


def end_the_epoch_resumed(trainer: Trainer) -> None:
    """In ``on_train_start``: a checkpoint that was saved after the last batch of an epoch begins the next one.

    Lightning tells by the number of batches, and by that of the next epoch, which may be larger: then it would run the
    difference alone.
    """
    loop = trainer.fit_loop.epoch_loop
    if loop.restarted_on_train_batch_end:
        loop.batch_progress.increment_completed()
        progresses: list[Any] = [
            loop.batch_progress,
            loop.scheduler_progress,
            loop.automatic_optimization.optim_progress,
        ]
        for progress in progresses:
            progress.reset_on_run()
        loop.val_loop.batch_progress.total.reset()
        loop.reset_restart_stage()


def one_train_loader(trainer: Trainer, name: str | int | None) -> Any:
    """The training loader that the run uses now, of several the one that ``name`` says."""
    loaders = trainer.train_dataloader
    if isinstance(loaders, dict):
        return loaders[_one_of(loaders, name)]
    if isinstance(loaders, (list, tuple)):
        return loaders[_one_of(dict(enumerate(loaders)), name)]
    return loaders


def part_of_batch(trainer: Trainer, batch: Any, name: str | int | None) -> Any:
    """Of a training batch what comes from the loader that ``name`` says; all of it where there is but one loader."""
    loaders = trainer.train_dataloader
    if isinstance(loaders, dict) and isinstance(batch, dict) and batch.keys() == loaders.keys():
        return batch[_one_of(loaders, name)]
    if isinstance(loaders, (list, tuple)) and isinstance(batch, (list, tuple)) and len(batch) == len(loaders):
        return batch[_one_of(dict(enumerate(loaders)), name)]
    return batch


def _changed(loaders: Any, name: str | int | None, change: Change) -> Any:
    if isinstance(loaders, CombinedLoader):
        cycles = loaders._mode == "max_size_cycle"
        return CombinedLoader(_changed_one(loaders.iterables, name, change, cycles), loaders._mode)
    return _changed_one(loaders, name, change, cycles=True)  # as Lightning will combine them


def _changed_one(loaders: Any, name: str | int | None, change: Change, cycles: bool) -> Any:
    if isinstance(loaders, dict):
        return {**loaders, (key := _one_of(loaders, name)): change(loaders[key], cycles and len(loaders) > 1)}
    if isinstance(loaders, (list, tuple)):
        place = _one_of(dict(enumerate(loaders)), name)
        return [
            change(loader, cycles and len(loaders) > 1) if i == place else loader for i, loader in enumerate(loaders)
        ]
    if name is not None:
        raise ValueError(f"loader={name!r}: there is one training loader, without a name. Leave the argument out.")
    return change(loaders, False)


def _one_of(loaders: dict[Any, Any], name: str | int | None) -> Any:
    if name is None and len(loaders) == 1:
        return next(iter(loaders))
    if name not in loaders:
        raise ValueError(f"loader={name!r}: say which of the training loaders is meant, one of {[*loaders]}.")
    return name
