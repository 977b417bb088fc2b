"""Begin a fit again from where it began, inside one call of ``Trainer.fit``.

Lightning has no way to do so: the counters of its loops, run with 2.5 and 2.6, are private. What is set back are the
weights and buffers, optimizers and their schedules, the scaler of fp16, averaged weights, the states of callbacks, the
counters, the random numbers and what was logged last. What is not: the step that loggers show, which goes on, as some
of them take no smaller one; files; and what a module keeps in other attributes of its own.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torchmetrics import Metric

from lightning_feat.joints.data.train_loader import make_train_loader_anew


def weights_of(module: LightningModule) -> dict[str, Tensor]:
    """All parameters and buffers by name, those too that its ``state_dict`` hides, in the memory of the host."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in named}


def states_of_callbacks(trainer: Trainer) -> dict[str, Any]:
    """The state of each callback that has one."""
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    return {callback.state_key: copy.deepcopy(state) for callback in callbacks if (state := callback.state_dict())}


class Beginning:
    """What a fit is before its first step; made in ``on_fit_start``, before a checkpoint's optimizers are restored.

    Args:
        trainer: of the fit.
        module: its module.
        weights: the first weights, where those of ``module`` come from a checkpoint.
        callbacks: the first states of callbacks, likewise.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        weights: dict[str, Tensor] | None = None,
        callbacks: dict[str, Any] | None = None,
    ) -> None:
        self.weights = weights_of(module) if weights is None else weights
        self.callbacks = states_of_callbacks(trainer) if callbacks is None else callbacks
        self.flags = {name: p.requires_grad for name, p in module.named_parameters()}
        self.precision = copy.deepcopy(trainer.precision_plugin.state_dict())
        self.owners: list[tuple[Any, Any]] = []
        self.see_optimizers(trainer)

    def see_optimizers(self, trainer: Trainer) -> None:
        """Take the states of optimizers and schedules down again, before the first step."""
        schedules: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
        # Those of a module that makes its optimizers once and for all.
        self.owners = [(owner, copy.deepcopy(owner.state_dict())) for owner in [*trainer.optimizers, *schedules]]


def begin_again(trainer: Trainer, module: LightningModule, beginning: Beginning, seed: int) -> list[list[str]]:
    """Set everything back to ``beginning``, seed all random numbers, and configure the optimizers anew.

    Call it on all processes alike, between two runs of the fit loop, when the training data are those of the second:
    a schedule may be made for their number.

    Returns:
        The step hooks of each optimizer, by name, for ``warn_of_lost_hooks``.

    Raises:
        RuntimeError: if the module or its optimizers have other parameters than at the beginning.
    """
    _set_weights(module, beginning)
    for owner, state in beginning.owners:
        try:
            owner.load_state_dict(copy.deepcopy(state))
        except ValueError as error:
            raise RuntimeError(
                f"{type(owner).__name__} cannot be set back to its beginning ({error}): did a callback change its "
                "parameter groups? Let training go on instead of starting again."
            ) from error
    if beginning.precision:
        trainer.precision_plugin.load_state_dict(copy.deepcopy(beginning.precision))
    _set_loops(trainer)
    trainer.should_stop = False
    trainer._logger_connector.reset_results()
    trainer._logger_connector.reset_metrics()
    _set_callbacks(trainer, module, beginning)
    make_train_loader_anew(trainer)
    trainer.fit_loop._last_train_dl_reload_epoch = float("-inf")
    seed_everything(seed, verbose=False)
    before = _step_hooks(trainer)
    trainer.strategy.setup_optimizers(trainer)
    _optimizers_to_device(trainer.optimizers, trainer.strategy.root_device)
    return before


def run_fit_by(trainer: Trainer, owner: Callback, run: Callable[[Callable[[], None]], None]) -> None:
    """Let ``run(loop)`` stand for the fit loop of the trainer, where ``loop()`` runs it once from where it is.

    A search for a learning rate or a batch size, which runs the loop without the ``owner`` and all other callbacks,
    gets the loop itself.
    """
    trainer.fit_loop.run = _Run(trainer, owner, run)  # type: ignore[method-assign]


def run_fit_as_before(trainer: Trainer) -> None:
    """Undo ``run_fit_by``. Nothing happens if it was not called."""
    trainer.fit_loop.__dict__.pop("run", None)


class _Run:
    def __init__(self, trainer: Trainer, owner: Callback, run: Callable[[Callable[[], None]], None]) -> None:
        self.trainer, self.owner, self.run = trainer, owner, run

    def __call__(self) -> None:
        loop = self.trainer.fit_loop
        callbacks: Any = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.owner in callbacks:
            self.run(lambda: type(loop).run(loop))
        else:
            type(loop).run(loop)


def refuse_averaging_within(trainer: Trainer, epochs: int, owner: str) -> None:
    """Raise a ``ValueError`` if stochastic weight averaging begins in the first ``epochs``: it cannot be set back."""
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, StochasticWeightAveraging):
            start = callback._swa_epoch_start
            first = int(start * (trainer.max_epochs or 0)) if isinstance(start, float) else start
            if first <= epochs:
                raise ValueError(
                    f"StochasticWeightAveraging begins in epoch {first}, before {owner} starts again after {epochs} "
                    "epochs, and cannot be set back: begin it later, or set restart=False."
                )


def warn_of_lost_hooks(trainer: Trainer, before: list[list[str]]) -> None:
    """Name the step hooks that the optimizers of the first start had, and those of the second have not; for its first
    batch. ``configure_optimizers`` and ``on_train_start`` have registered theirs again; what ``on_fit_start`` added is
    gone with the old optimizers.
    """
    after = _step_hooks(trainer)
    lost: list[str] = []
    for index, old in enumerate(before):
        names = list(after[index]) if index < len(after) else []
        for name in old:
            if name in names:
                names.remove(name)
            else:
                lost.append(name)
    if lost:
        rank_zero_warn(
            f"the optimizers are made anew for the second start, without step hooks that were registered outside of "
            f"configure_optimizers: {', '.join(lost)}. Register them there, or in on_train_start, which comes again."
        )


def _step_hooks(trainer: Trainer) -> list[list[str]]:
    """What was registered to run before and after the steps of each optimizer."""
    kinds = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    return [
        [_name(hook) for kind in kinds for hook in getattr(optimizer, kind, {}).values()]
        for optimizer in trainer.optimizers
    ]


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


@torch.no_grad()
def _set_weights(module: LightningModule, beginning: Beginning) -> None:
    there = dict([*module.named_parameters(), *module.named_buffers()])
    if {name: t.shape for name, t in there.items()} != {name: t.shape for name, t in beginning.weights.items()}:
        odd = sorted(there.keys() ^ beginning.weights.keys()) or ["(a shape)"]
        raise RuntimeError(
            f"the module has other parameters or buffers than at the beginning ({', '.join(odd[:5])}): let training go "
            "on instead of starting again."
        )
    for name, tensor in there.items():
        tensor.data.copy_(beginning.weights[name])
    for name, parameter in module.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(beginning.flags.get(name, parameter.requires_grad))
    for part in module.modules():
        if isinstance(part, Metric):
            part.reset()


def _set_loops(trainer: Trainer) -> None:
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    loops: list[Any] = [fit, epoch, epoch.val_loop, epoch.automatic_optimization, epoch.manual_optimization]
    for progress in (
        fit.epoch_progress,
        epoch.batch_progress,
        epoch.scheduler_progress,
        epoch.automatic_optimization.optim_progress,
        epoch.manual_optimization.optim_step_progress,
        epoch.val_loop.batch_progress,
    ):
        progress.reset()
    for loop in loops:
        loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
    for loop in (fit, epoch, epoch.val_loop):
        if hasattr(loop, "reset_restart_stage"):  # from Lightning 2.5.2 on
            loop.reset_restart_stage()


def _set_callbacks(trainer: Trainer, module: LightningModule, beginning: Beginning) -> None:
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        last = getattr(callback, "last_model_path", "")
        if callback.state_key in beginning.callbacks:
            callback.load_state_dict(copy.deepcopy(beginning.callbacks[callback.state_key]))
        if isinstance(callback, Checkpoint):
            callback.__dict__.update(_last_global_step_saved=0, _last_checkpoint_saved="", last_model_path=last)
        averaged = getattr(callback, "_average_model", None)
        if isinstance(averaged, AveragedModel) and not isinstance(callback, StochasticWeightAveraging):
            _set_average(averaged, module)
            callback.__dict__.update(_latest_update_step=0, _latest_update_epoch=-1)


@torch.no_grad()
def _set_average(averaged: AveragedModel, module: LightningModule) -> None:
    now = [*module.parameters(), *module.buffers()]
    for copied, tensor in zip([*averaged.module.parameters(), *averaged.module.buffers()], now, strict=True):
        copied.data.copy_(tensor)
    averaged.n_averaged.zero_()
