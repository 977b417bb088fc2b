from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_feat.data.plan import Length, PlanSampler
from lightning_feat.joints.data.epoch_ends import is_last_epoch
from lightning_feat.joints.data.train_loader import (
    change_train_loader,
    end_the_epoch_resumed,
    make_train_loader_anew,
    restore_train_loader,
    with_sampler,
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

    def __init__(
        self,
        plan: Callable[..., Any] | Tensor | Sequence[int],
        length: Length = "grow",
        seed: int = 0,
        loader: str | int | None = None,
    ) -> None:
        self.plan, self.length, self.seed, self.loader = plan, length, seed, loader
        self._resume: tuple[int, int] | None = None  # the epoch that is resumed, and how many batches it had
        self._built: tuple[int, list[int]] = (0, [])  # the epoch the loader was made for, and its counts

    @property
    def state_key(self) -> str:
        return f"DataPlan[{'train' if self.loader is None else self.loader}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)
        if stage != "fit":
            return
        self._resume = None
        callbacks = callbacks_of(trainer)
        if any(isinstance(c, DataPlan) and c is not self and c.loader == self.loader for c in callbacks):
            raise ValueError(f"{self.state_key}: two callbacks plan the same training data; keep one of them.")
        others = [callback for callback in callbacks if callback is not self]
        savers = [callback for callback in others if isinstance(callback, Checkpoint)]
        # A new list: Lightning goes through the old one at this moment.
        trainer.callbacks = [c for c in others if c not in savers] + [self, *savers]  # type: ignore[attr-defined]
        change_train_loader(trainer, self.state_key, self.loader, _Planned(self, trainer))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        progress = checkpoint["loops"]["fit_loop"]
        epoch = progress["epoch_progress"]["current"]
        # Not the completed batches, which lag by one while the hooks of a batch run.
        batches = progress["epoch_loop.batch_progress"]["current"]["processed"]
        self._resume = (epoch["completed"], batches if epoch["processed"] < epoch["started"] else 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resume = None
        if self._built[0] != trainer.current_epoch:  # it was made for the epoch that the checkpoint ended
            make_train_loader_anew(trainer)
            end_the_epoch_resumed(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_last_epoch(trainer):
            return
        following = self._counts_of(trainer.current_epoch + 1)
        if following != self._built[1]:
            if self.length == "grow" and any(c.interval == "step" for c in trainer.lr_scheduler_configs):
                rank_zero_warn(
                    f"{self.state_key}: the next epoch has another number of batches, and a learning rate scheduler "
                    "counts them: size it for the whole plan, or set length='keep'."
                )
            make_train_loader_anew(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        restore_train_loader(trainer, self.state_key)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        restore_train_loader(trainer, self.state_key)  # after an exception Lightning does not call teardown

    def planned(self, trainer: Trainer, loader: DataLoader[Any]) -> DataLoader[Any]:
        """The loader with the plan of the current epoch."""
        epoch, batches = (trainer.current_epoch, 0) if self._resume is None else self._resume
        counts = self._counts_of(epoch)
        where = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        size = len(loader.dataset) if hasattr(loader.dataset, "__len__") else 0  # else refused below
        sampler = PlanSampler(
            counts or [1] * max(size, 1),
            self.length,
            int(where["num_replicas"]),
            int(where["rank"]),
            self.seed,
            skip=batches * (loader.batch_size or 1),
        )
        changed = with_sampler(loader, sampler)
        if counts and len(counts) != size:
            raise ValueError(
                f"{self.state_key}: the plan of epoch {epoch} has {len(counts)} counts, but the training data "
                f"{size} examples: give one for each."
            )
        sampler.set_epoch(epoch)
        self._built = epoch, counts
        return changed

    def _counts_of(self, epoch: int) -> list[int]:
        """The counts of an epoch; none where each example comes once."""
        counts = self.plan(epoch) if callable(self.plan) else self.plan
        if counts is None:
            return []
        return counts.tolist() if isinstance(counts, Tensor) else list(counts)


class _Planned:
    def __init__(self, callback: DataPlan, trainer: Trainer) -> None:
        self.callback, self.trainer = callback, trainer

    def __call__(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        return self.callback.planned(self.trainer, loader)
