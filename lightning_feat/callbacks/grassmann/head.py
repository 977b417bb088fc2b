import functools
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_feat.functional.grassmann import orthonormality_error
from lightning_feat.functional.grassmann.angles import pairwise_principal_angles
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.processes import full_tensor
from lightning_feat.joints.module.head_check import Asks, check_head, forget_check
from lightning_feat.joints.module.head_swap import (
    HeadSwap,
    begin_head_anew,
    checked_names,
    heads_of,
    joined,
    note_head,
    refuse_other_options,
    take_places,
    tell_use,
)
from lightning_feat.joints.module.own_parameters import in_order, optimizers_in
from lightning_feat.joints.module.wraps import add_link, remove_link
from lightning_feat.joints.run.averaging import refuse_averaging_before, refuse_other_copies
from lightning_feat.joints.run.twins import refuse_twin
from lightning_feat.layers.grassmann import LOST, GrassmannLinear, local_part
from lightning_feat.optim.grassmann.step import SubspaceStep, Update, follow_subspaces, following

_OFF = 1e-4  # one that no Riemannian step leaves
_WATCHED_BATCHES = 4


class GrassmannHead(Callback):
    """Replace the classifier of any LightningModule by one whose classes are subspaces, and keep these on their
    manifold.

    The user's own optimizer, scheduler, clipping, precision and checkpoints stay as they are; the head stands where
    the classifier stood, in the state dict too. Logs at the end of each training epoch
    ``grassmann/orthonormality_error/<layer>`` and ``grassmann/smallest_angle/<layer>``, the smallest principal angle
    between any two class subspaces, in degrees.

    List it before a weight averaging callback, which copies the module: averaged bases are then projected back for
    validation and at the end of the fit. Resume and test with the same callback, or build the module with a
    ``GrassmannLinear``.

    Args:
        subspace_dim: dimensions of every class subspace; well below the width of the features.
        layer: dotted name of the classifier, an ``nn.Linear``, or names of several whose logits the model averages;
            None finds it, or them (see ``joints.features.heads.find_heads``).
        scale: largest possible logit.
        learn_scale: make the scale a parameter.
        update: how the optimizer's step becomes one of the subspaces; this and the next three: see
            ``optim.follow_subspaces``.
        lr_factor: multiplies the step of the subspaces alone.
        lr: peak learning rate of the ``momentum`` and ``adam`` rules; None for 0.1. Given to a rule that
            has none it is an error, and so for the next two.
        momentum: of the ``momentum`` and ``adam`` rules; None for 0.9.
        second_momentum: of the ``adam`` rule; None for 0.999.
        fresh_head: let a checkpoint with a linear classifier load: the rest comes from it, the subspaces stay as they
            were drawn, and the optimizer starts anew. Else such a checkpoint is an error.
    """

    @checked
    def __init__(
        self,
        subspace_dim: int = 8,
        layer: str | list[str] | None = None,
        scale: float = 25.0,
        learn_scale: bool = False,
        update: Update = "auto",
        lr_factor: float = 1.0,
        lr: float | None = None,
        momentum: float | None = None,
        second_momentum: float | None = None,
        fresh_head: bool = False,
    ) -> None:
        checked_names(layer)
        if subspace_dim < 1:
            raise ValueError(f"subspace_dim={subspace_dim} must be at least 1; the paper uses 8.")
        self.layer = layer
        self.head_options: dict[str, Any] = {"subspace_dim": subspace_dim, "scale": scale, "learn_scale": learn_scale}
        self.step_options: dict[str, Any] = {
            "update": update,
            "lr_factor": lr_factor,
            "lr": lr,
            "momentum": momentum,
            "second_momentum": second_momentum,
        }
        self.fresh_head = fresh_head
        self.steps: dict[Optimizer, SubspaceStep] = {}
        self.others: dict[Optimizer, SubspaceStep] = {}
        self._batches_to_watch = 0

    @property
    def state_key(self) -> str:
        return f"GrassmannHead[{joined(self.layer)}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)
        self._refuse_strategy(trainer)
        refuse_averaging_before(trainer, self)
        swap = self._swap()
        swap.swap_early(pl_module)
        add_link(pl_module, "configure_model", self.state_key, swap)
        if stage == "fit":
            # By a link, because Tuner.lr_find calls no hook of ours after this one, and would tune a run without our
            # steps.
            add_link(pl_module, "configure_optimizers", self.state_key, _FollowOptimizers(self))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        heads = self.heads(pl_module)
        for label, _ in heads:
            refuse_other_copies(trainer, pl_module, label, "GrassmannHead")
        names = tuple(label for label, _ in heads)
        named = self.layer is not None
        check_head(pl_module, Asks("GrassmannHead", names, replaces=True, signed=False, named=named))
        self.follow(pl_module, trainer.optimizers)
        for label, head in heads:
            basis = head.basis
            if basis.requires_grad and not any(p is basis for o in trainer.optimizers for p in in_order(o)):
                raise RuntimeError(
                    f"no optimizer trains the class subspaces of {label}: give configure_optimizers the parameters of "
                    "the classifier as well."
                )
        self._batches_to_watch = _WATCHED_BATCHES

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.follow(pl_module, trainer.optimizers)  # an optimizer made anew during fit comes without hooks

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._batches_to_watch:
            self._batches_to_watch -= 1
            for label, head in self.heads(pl_module):
                self._check(label, _error(head))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for label, head in self.heads(pl_module):  # once: a large module takes a while to search
            error = _error(head)
            self._check(label, error)
            pl_module.log(f"grassmann/orthonormality_error/{label}", error, sync_dist=True, reduce_fx="max")
            basis = full_tensor(head.basis)
            if len(basis) > 1:
                angle = pairwise_principal_angles(basis)[:, 0].min().rad2deg().float()
                pl_module.log(f"grassmann/smallest_angle/{label}", angle, sync_dist=True)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:  # an averaging callback has put its weights in by now
            for _, head in self.heads(pl_module):
                head.project_()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for label, head in self.heads(pl_module):
            error = head.project_()
            if error > LOST:
                warnings.warn(
                    f"the averaged class subspaces of {label} were off the manifold (orthonormality error {error:.1e}) "
                    "and have been projected.",
                    stacklevel=2,
                )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for label, head in self.heads(pl_module):
            note_head(checkpoint, label, head, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        names = {name.replace("_orig_mod.", "") for name in checkpoint.get("state_dict", ())}
        for label, head in self.heads(pl_module):
            if trainer.state.fn == TrainerFn.FITTING:
                refuse_other_options(checkpoint, label, head, "GrassmannHead")
            if self.fresh_head and names and f"{label}.basis" not in names:
                begin_head_anew(checkpoint, label, head)
                rank_zero_warn(
                    f"{label} starts afresh, and so do the optimizer and its schedule: they are not those of the "
                    "checkpoint."
                )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        for step in self.steps.values():
            step.undo_unfinished()
        tell_use(exception, "GrassmannHead", GrassmannLinear)
        self._let_go(pl_module)  # after an exception Lightning does not call teardown

    def build_for(self, module: nn.Module, names: Collection[str]) -> None:
        """Put the head into ``module`` if it is not there and weights of these names, as a state dict has them, are its
        own; for weights that are loaded outside of a Trainer.
        """
        self._swap().swap_for(module, names)

    def _swap(self) -> HeadSwap:
        build = functools.partial(_build_head, self.head_options)
        return HeadSwap(self.layer, GrassmannLinear, build, self.head_options, GrassmannHead, self.fresh_head)

    def heads(self, pl_module: nn.Module) -> list[tuple[str, GrassmannLinear]]:
        """The heads in ``pl_module`` with their names, once they have been put in; several where they are averaged."""
        heads = []
        for label, head in heads_of(pl_module, self.layer):
            if not isinstance(head, GrassmannLinear):
                raise RuntimeError(
                    f"the classifier is still a {type(head).__name__}: the head comes in by configure_model."
                )
            heads.append((label, head))
        return heads

    def _check(self, label: str, error: Tensor) -> None:
        if error > LOST:
            names = ", ".join(type(optimizer).__name__ for optimizer in self.steps) or "no optimizer"
            raise RuntimeError(
                f"the class subspaces of {label} left the manifold (orthonormality error "
                f"{float(error):.2g}; followed: {names}). Something moves them outside optimizer.step(), or wraps an "
                "optimizer without calling its hooks, as Lookahead does: use the optimizer inside, or another."
            )

    def follow(self, pl_module: LightningModule, optimizers: list[Optimizer]) -> None:
        """Make these optimizers keep the subspaces on their manifold; those that do already are left alone."""
        for optimizer in optimizers:
            if optimizer not in self.steps and optimizer not in self.others:
                heads = [head for _, head in self.heads(pl_module)]
                others = [following(optimizer, head) for head in heads]
                if others[0] is not None:
                    self.others[optimizer] = others[0]  # the module's own call of follow_subspaces, which stays
                else:
                    self.steps[optimizer] = follow_subspaces(optimizer, nn.ModuleList(heads), **self.step_options)

    def _let_go(self, pl_module: LightningModule) -> None:
        for step in self.steps.values():
            step.remove()
        self.steps.clear()
        self.others.clear()
        forget_check(pl_module, "GrassmannHead")
        for method in ("configure_model", "configure_optimizers"):
            remove_link(pl_module, method, self.state_key)

    def _refuse_strategy(self, trainer: Trainer) -> None:
        name = type(trainer.strategy).__name__
        if name in ("FSDPStrategy", "DeepSpeedStrategy"):
            raise ValueError(
                f"{name} flattens or offloads parameters, so that class subspaces cannot be followed: use "
                "strategy='ddp', or FSDP2 by ModelParallelStrategy."
            )


class _FollowOptimizers:
    """The link around ``configure_optimizers``. A copy or a pickle of the module has nothing to do with our
    optimizers.
    """

    def __init__(self, callback: GrassmannHead | None = None) -> None:
        self.callback = callback

    def __call__(self, module: LightningModule, call: Callable[..., Any]) -> Any:
        configured = call()
        if self.callback is not None:
            optimizers = optimizers_in(configured)
            for _, head in self.callback.heads(module):
                take_places(optimizers, head)
            self.callback.follow(module, optimizers)
        return configured

    def __reduce__(self) -> tuple[Any, ...]:
        return (_FollowOptimizers, ())


def unfollowed_subspaces(module: nn.Module, optimizers: list[Optimizer]) -> list[str]:
    """The names of class subspaces in ``module`` that have left their manifold, as nobody follows their optimizer."""
    heads = [(name, part) for name, part in module.named_modules() if isinstance(part, GrassmannLinear)]
    alone = [
        (name, head)
        for name, head in heads
        if head.basis.requires_grad and not any(following(optimizer, head) for optimizer in optimizers)
    ]
    return [name for name, head in alone if _error(head) > _OFF]


def _error(head: GrassmannLinear) -> Tensor:
    local = local_part(head.basis)
    return orthonormality_error(local).amax() if local.numel() else torch.zeros((), device=local.device)


def _build_head(options: dict[str, Any], old: nn.Linear) -> GrassmannLinear:
    head = GrassmannLinear(old.in_features, old.out_features, device=old.weight.device, **options)
    return head.double() if old.weight.dtype == torch.float64 else head
