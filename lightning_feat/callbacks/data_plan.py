from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_feat.data.plan import Length, PlanSampler
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.epoch_ends import is_last_epoch
from lightning_feat.joints.data.samplers import processes_share, with_sampler
from lightning_feat.joints.data.train_loader import (
    change_train_loader,
    end_the_epoch_resumed,
    make_train_loader_anew,
    one_train_loader,
    place_in_data,
    restore_train_loader,
)
from lightning_feat.joints.run.twins import callbacks_of, refuse_twin

Counts = Tensor | Sequence[int]


class DataPlan(Callback):
    """Show each training example as often as a plan says, from epoch to epoch, in any training loop.

    The order of an epoch depends on the plan, the seed, the epoch and the process alone (``data.PlanSampler``): the
    processes of a run share one order, and a run that is resumed, also in the middle of an epoch, goes on with the very
    examples it had not seen. The loader may be given to ``fit``, or come from the module or the datamodule; its class
    and options stay, the order is always shuffled, and each copy of an example is loaded, and augmented, on its own.

    The training loader is made anew where the counts change, which starts its workers again. This callback moves to
    the end of the Trainer's callbacks, before those that save: at the end of an epoch the others still find the loader.

    Args:
        plan: ``plan(epoch)`` gives the counts ``(N,)`` of an epoch, counted from 0, or None for each example once. It
            must give the same for the same epoch, on all processes. Or the counts themselves, for all epochs.
        length: ``"grow"`` makes an epoch longer by what is shown more often, and a schedule that was sized in advance
            too short; ``"keep"`` takes the counts as weights, see ``data.PlanSampler``.
        seed: of the orders.
        loader: which of several training loaders: its key in a dict, or its position in a list.
    """

    @checked
    def __init__(
        self,
        plan: Callable[..., Any] | Tensor | Sequence[int],
        length: Length = "grow",
        seed: int = 0,
        loader: str | int | None = None,
    ) -> None:
        self.plan, self.length, self.seed, self.loader = plan, length, seed, loader
        self._sampler = PlanSampler([1])  # of the loader in use
        self._batches = _Batches(1, 1, False)  # of that loader
        self._made_for: tuple[int, int] = (0, 0)  # the place in the data that it begins at: epoch, and batches of it
        self._counts: list[int] = []  # of that epoch
        self._had: dict[str, int] | None = None  # what a checkpoint says of an epoch that was cut off
        self._said = False

    @property
    def state_key(self) -> str:
        return f"DataPlan[{'train' if self.loader is None else self.loader}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)
        if stage != "fit":
            return
        self._had, self._said = None, False
        overfit: float = getattr(trainer, "overfit_batches", 0)
        if overfit:
            raise ValueError(
                f"{self.state_key}: overfit_batches={overfit} puts a sampler of its own in the place of the plan's. "
                "Overfit without this callback, or use limit_train_batches."
            )
        callbacks = callbacks_of(trainer)
        if any(isinstance(c, DataPlan) and c is not self and c.loader == self.loader for c in callbacks):
            raise ValueError(f"{self.state_key}: two callbacks plan the same training data; keep one of them.")
        others = [callback for callback in callbacks if callback is not self]
        savers = [callback for callback in others if isinstance(callback, Checkpoint)]
        # A new list: Lightning goes through the old one at this moment.
        trainer.callbacks = [c for c in others if c not in savers] + [self, *savers]  # type: ignore[attr-defined]
        change_train_loader(trainer, self.state_key, self.loader, _Planned(self, trainer))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        epoch, batches = place_in_data(trainer)
        if batches:
            shown = self._sampler.shown_after(self._batches.examples(batches))
            checkpoint[f"{self.state_key} shown"] = {"epoch": epoch, "batches": batches, "examples": shown}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._had = checkpoint.get(f"{self.state_key} shown")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        place = place_in_data(trainer)
        # Made before Lightning knew where it goes on, or for an epoch that is over; or the plan is another by now.
        if self._made_for != place or self._counts_of(place[0]) != self._counts:
            make_train_loader_anew(trainer)
            if place[1] == 0:
                end_the_epoch_resumed(trainer)
            trainer.fit_loop.setup_data()
        self._say_what_is_cut(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._say_what_is_cut(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_last_epoch(trainer):
            return
        following, sampler = self._counts_of(trainer.current_epoch + 1), self._sampler
        changes = following != self._counts
        if changes and self.length == "grow" and any(c.interval == "step" for c in trainer.lr_scheduler_configs):
            rank_zero_warn(
                f"{self.state_key}: the next epoch has another number of batches, and a learning rate scheduler "
                "counts them: size it for the whole plan, or set length='keep'."
            )
        # An epoch that was cut off on other processes has another number of batches than they would give it.
        if changes or len(sampler) != -(-sampler.num_shown // sampler.num_replicas):
            make_train_loader_anew(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        restore_train_loader(trainer, self.state_key)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        restore_train_loader(trainer, self.state_key)  # after an exception Lightning does not call teardown

    def planned(self, trainer: Trainer, loader: DataLoader[Any], cycles: bool = False) -> DataLoader[Any]:
        """The loader with the plan of the epoch that comes; ``cycles`` where one epoch may go through it several times.

        It depends on where the loops stand, and not on what a checkpoint says: Lightning may ask for the loader before
        they are restored, and a search for a learning rate loads checkpoints of its own.
        """
        epoch, batches = place_in_data(trainer)
        counts = self._counts_of(epoch)
        shared = isinstance(loader, DataLoader) and processes_share(trainer, loader)
        where = (shared and trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        size = len(loader.dataset) if hasattr(loader.dataset, "__len__") else 0  # else refused below
        num_replicas, rank = int(where["num_replicas"]), int(where["rank"])
        sampler = PlanSampler(counts or [1] * max(size, 1), self.length, num_replicas, rank, self.seed)
        changed = with_sampler(loader, sampler)
        if counts and len(counts) != size:
            raise ValueError(self._of_other_data(len(counts), size, epoch))
        sampler.set_epoch(epoch)
        self._sampler, self._counts, self._made_for = sampler, counts, (epoch, batches)
        self._batches = _Batches(loader.batch_size or 1, len(changed), cycles)
        if batches:
            had = self._had if shared else None
            known = had is not None and (had["epoch"], had["batches"]) == (epoch, batches)
            sampler.resume(self._batches.examples(batches), had["examples"] if had and known else None)
        return changed

    def _of_other_data(self, number: int, size: int, epoch: int = 0) -> str:
        """What to say where the counts are not those of the training data."""
        return (
            f"{self.state_key}: the plan of epoch {epoch} has {number} counts, but the training data {size} examples: "
            "give one for each."
        )

    def _say_what_is_cut(self, trainer: Trainer) -> None:
        """Warn where an epoch shows more or less than the plan."""
        run, planned = trainer.num_training_batches, len(one_train_loader(trainer, self.loader))
        more, limit = run > planned and self._batches.cycles, getattr(trainer, "limit_train_batches", 1.0)
        if self._said or getattr(trainer, "fast_dev_run", False) or not (run < planned or more):
            return
        self._said = True
        cause = "another training loader beside it" if more or limit == 1.0 else f"limit_train_batches={limit}"
        rank_zero_warn(
            f"{self.state_key}: epoch {trainer.current_epoch} has {run} batches and its plan {planned}, by {cause}: "
            f"{run / planned:.0%} of the plan are shown. Which examples that are changes from epoch to epoch."
        )

    def _counts_of(self, epoch: int) -> list[int]:
        """The counts of an epoch; none where each example comes once."""
        counts = self.plan(epoch) if callable(self.plan) else self.plan
        if counts is None:
            return []
        return counts.tolist() if isinstance(counts, Tensor) else list(counts)


class _Planned:
    def __init__(self, callback: DataPlan, trainer: Trainer) -> None:
        self.callback, self.trainer = callback, trainer

    def __call__(self, loader: DataLoader[Any], cycles: bool) -> DataLoader[Any]:
        return self.callback.planned(self.trainer, loader, cycles)


class _Batches(NamedTuple):
    size: int
    in_round: int  # of the loader, from its beginning to its end
    cycles: bool  # whether an epoch may have several rounds

    def examples(self, batches: int) -> int:
        """Examples that this process has had of a round after so many batches of an epoch."""
        return (batches % self.in_round if self.cycles else batches) * self.size
