import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_feat.callbacks.feature_shift.monitor import FeatureShiftMonitor
from lightning_feat.callbacks.grassmann.head import unfollowed_subspaces
from lightning_feat.doctor.checks.labels import TargetEar
from lightning_feat.doctor.checks.terms import Heard, begin_now, listen_to
from lightning_feat.doctor.classifier import ClassifierEar
from lightning_feat.joints.data.epoch_ends import EpochEnds
from lightning_feat.joints.loss.engine import loss_terms_of
from lightning_feat.joints.module.wraps import add_link

_KEY = "doctor"
_KEPT_STEPS = 8  # their batches stay in memory


class Watch(Callback):
    """Stops a trial after some batches, and keeps what was seen until then.

    It comes last among the callbacks.

    Args:
        batches: to run.
        seen: the list that warnings go to.

    Attributes:
        ran: dotted names of the layers that ran in ``training_step``; those whose outputs had a gradient are in
            ``differentiable``.
        steps: of each training step, its batch as it came, and the targets that the loss got.
        warned: the warnings from before the first batch; later ones may come of the shortness of the trial.
        trained: by name, the parameters that had a gradient.
        terms: what was heard of each loss term.
        loaders: of the first epoch, ``num_batches`` of which it has; ``schedules`` as they were then.
        logged: names of what was logged by the end; ``logged_by``, of those that a callback logs at the end of an
            epoch, which one, by its position.
        first_shifts: of the monitors of feature shift, by position, the largest relative shift in the first batch.
        optimizers: of the last batch.
        completed: whether the fit came to its end.
        largest_rate: of learning, in any step.
        classifier: what was heard of it in the first training step.
        whole: parameters that are not sharded, where others are.
        unfollowed: class subspaces that left their manifold, as nobody follows the optimizer.
    """

    def __init__(self, batches: int, seen: list[warnings.WarningMessage]) -> None:
        self.batches, self.seen = batches, seen
        self.ran: set[str] = set()
        self.differentiable: set[str] = set()
        self.steps: list[tuple[Any, TargetEar]] = []
        self.warned: list[warnings.WarningMessage] = []
        self.trained: dict[str, nn.Parameter] = {}
        self.terms: list[Heard] = []
        self.losses: list[float] = []
        self.callbacks: dict[int, Callback] = {}  # those of the trial, by position
        self.largest_rate = 0.0
        self.loaders: list[Any] = []
        self.num_batches = float("inf")
        self.logged: set[str] = set()
        self.logged_by: dict[str, int] = {}
        self.first_shifts: dict[int, float] = {}
        self.schedules: list[Any] = []
        self.optimizers: list[Any] = []
        self.whole: list[str] = []
        self.unfollowed: list[str] = []
        self.completed = False
        self.classifier: ClassifierEar | None = None
        self._batches_run = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        begin_now(pl_module)
        for position, callback in self.callbacks.items():
            if isinstance(callback, FeatureShiftMonitor) and callback.data == "train":
                callback.every_n_batches = 1  # from the first on
            for hook in ("on_train_epoch_end", "on_train_end"):
                if isinstance(getattr(callback, "ends", None), EpochEnds):
                    setattr(callback, hook, _Logs(self, position, getattr(callback, hook)))
        for term in loss_terms_of(pl_module):
            if not any(heard.term is term for heard in self.terms):
                self.terms.append(listen_to(term))
        add_link(pl_module, "training_step", _KEY, self._around_training_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = trainable(pl_module)
        whole = [name for name, p in parameters.items() if not is_sharded(p)]
        self.whole = whole if len(whole) < len(parameters) else []
        if self.loaders:
            return  # training has started again
        combined = trainer.fit_loop._combined_loader
        self.loaders = [] if combined is None else list(combined.flattened)
        self.num_batches = trainer.num_training_batches
        self.schedules = list(trainer.lr_scheduler_configs)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._batches_run == 0:  # not in on_train_start, where a DataPlan comes after this callback
            self.warned = list(self.seen)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trained |= {name: p for name, p in pl_module.named_parameters() if p.grad is not None}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.largest_rate = max([self.largest_rate, *(float(group.get("lr", 1.0)) for group in optimizer.param_groups)])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self.losses.append(float(loss.detach().float().mean()))
        self.optimizers = list(trainer.optimizers)
        self.unfollowed = unfollowed_subspaces(pl_module, self.optimizers)
        if self._batches_run == 0:
            self.first_shifts = {i: largest for i, c in self.callbacks.items() if (largest := _shift_of(c)) is not None}
        self._batches_run += 1
        if self._batches_run >= self.batches:
            trainer.should_stop = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.logged = set(trainer.callback_metrics)
        self.completed = True

    def _around_training_step(self, module: LightningModule, call: Any, *args: Any, **kwargs: Any) -> Any:
        batch = args[0] if args else next(iter(kwargs.values()), None)
        ear = TargetEar()
        handles = [
            part.register_forward_hook(_Ran(self, name.replace("_orig_mod.", "")))
            for name, part in module.named_modules()
            if name
        ]
        try:
            if len(self.steps) < _KEPT_STEPS:
                self.steps.append((_kept(batch), ear))
            with ear, self._classifier_heard(module, handles):
                return call(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _classifier_heard(self, module: LightningModule, handles: list[Any]) -> AbstractContextManager[Any]:
        if self.classifier is not None:
            return nullcontext()
        self.classifier = heard = ClassifierEar(module)
        if heard.head is not None:
            handles.append(heard.head[1].register_forward_pre_hook(heard.hear))
        return heard.follower.following()


def _shift_of(callback: Callback) -> float | None:
    """The largest relative shift from its own start that a monitor has found in this epoch."""
    if not isinstance(callback, FeatureShiftMonitor) or callback.data != "train":
        return None
    if callback.without_prompts or callback.start is not None:
        return None
    shifts = callback.relative_shifts()
    return max((shift for shift in shifts if math.isfinite(shift)), default=0.0)


class _Logs:
    """In place of a hook: notes what is logged in it."""

    def __init__(self, watch: Watch, position: int, hook: Any) -> None:
        self.watch, self.position, self.hook = watch, position, hook

    def __call__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = set(trainer.callback_metrics)
        self.hook(trainer, pl_module)
        self.watch.logged_by |= dict.fromkeys(set(trainer.callback_metrics) - before, self.position)


class _Ran:
    def __init__(self, watch: Watch, name: str) -> None:
        self.watch, self.name = watch, name

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.watch.ran.add(self.name)
        if isinstance(output, Tensor) and output.requires_grad:
            self.watch.differentiable.add(self.name)


def _kept(batch: Any) -> Any:
    """A copy of a batch, which a training step may change in place."""
    if isinstance(batch, Tensor):
        return batch.detach().clone()
    if isinstance(batch, dict):
        return type(batch)({key: _kept(value) for key, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        kept = [_kept(value) for value in batch]
        return type(batch)(*kept) if hasattr(batch, "_fields") else type(batch)(kept)
    if hasattr(batch, "__dict__"):
        copied = object.__new__(type(batch))
        copied.__dict__.update({key: _kept(value) for key, value in vars(batch).items()})
        return copied
    return batch


def trainable(module: LightningModule) -> dict[str, nn.Parameter]:
    """Parameters with a gradient, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def is_sharded(parameter: Tensor) -> bool:
    """Whether FSDP2 has spread it over the processes."""
    return hasattr(parameter, "placements")
