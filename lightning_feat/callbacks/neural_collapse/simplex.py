import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_feat.functional.common.class_sums import check_target_range
from lightning_feat.functional.neural_collapse.losses import balanced_lengths, cut_gradient, dot_regression
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.features.batches import TargetKey, class_indices, targets_of
from lightning_feat.joints.features.taps import FeatureTap, around_positions
from lightning_feat.joints.loss.regularizer import Regularizer
from lightning_feat.joints.loss.terms import LossTerm, Weight
from lightning_feat.joints.module.head_check import Asks, check_head, forget_check
from lightning_feat.joints.module.head_swap import (
    HeadSwap,
    begin_head_anew,
    checked_names,
    heads_of,
    joined,
    named_or_found,
    note_head,
    refuse_other_options,
    take_places,
    tell_use,
)
from lightning_feat.joints.module.own_parameters import optimizers_in
from lightning_feat.joints.module.wraps import add_link, remove_link
from lightning_feat.joints.run.averaging import refuse_averaging_before, refuse_other_copies
from lightning_feat.joints.run.twins import refuse_twin
from lightning_feat.layers.neural_collapse import SimplexETF, SparseETF

ClassCounts: TypeAlias = Sequence[int] | Literal["batch"] | None


class SimplexETFHead(Callback):
    """Replace the classifier of any LightningModule by a fixed simplex, ``layers.SimplexETF``: the features are trained
    towards where training would have taken both.

    The loss stays that of the module, commonly cross-entropy; ``DotRegressionRegularizer`` beside this callback takes
    its place, or is added to it. The head stands where the classifier stood, in the state dict too, and has no
    parameters: those of the old one leave the optimizer. Validate, test and resume with the same callback, or build the
    module with a ``SimplexETF``. Where the features come from a ReLU they cannot reach the corners: put a ``Linear`` or
    a ``BatchNorm1d`` between.

    List it before a weight averaging callback, which copies the module.

    Args:
        scale: largest possible logit.
        sparsity: share of the prototypes' entries that are zero; above zero the head is a ``layers.SparseETF``.
        seed: draws the position of the simplex.
        layer: dotted name of the classifier, an ``nn.Linear``, or names of several whose logits the model averages;
            None finds it, or them (see ``joints.features.heads.find_heads``). Several get the same prototypes where
            their features are of one width.
        fresh_head: let a checkpoint with a linear classifier load: the rest comes from it, and the optimizer starts
            anew. Else such a checkpoint is an error.
    """

    @checked
    def __init__(
        self,
        scale: float = 25.0,
        sparsity: float = 0.0,
        seed: int = 0,
        layer: str | list[str] | None = None,
        fresh_head: bool = False,
    ) -> None:
        checked_names(layer)
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity={sparsity} is a share of entries: it must lie in [0, 1).")
        self.head_options: dict[str, Any] = {"scale": scale, "seed": seed}
        if sparsity:
            self.head_options["sparsity"] = sparsity
        self.layer = layer
        self.fresh_head = fresh_head

    @property
    def state_key(self) -> str:
        return f"SimplexETFHead[{joined(self.layer)}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)
        refuse_averaging_before(trainer, self)
        swap = self._swap()
        swap.swap_early(pl_module)
        add_link(pl_module, "configure_model", self.state_key, swap)
        if stage == "fit":
            add_link(pl_module, "configure_optimizers", self.state_key, _TakePlaces(self.layer))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = tuple(name for name, _ in heads_of(pl_module, self.layer))
        for name in names:
            refuse_other_copies(trainer, pl_module, name, "SimplexETFHead")
        check_head(pl_module, Asks("SimplexETFHead", names, replaces=True, named=self.layer is not None))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for label, head in heads_of(pl_module, self.layer):
            note_head(checkpoint, label, head, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        names = {name.replace("_orig_mod.", "") for name in checkpoint.get("state_dict", ())}
        for label, head in heads_of(pl_module, self.layer):
            if trainer.state.fn == TrainerFn.FITTING:
                refuse_other_options(checkpoint, label, head, "SimplexETFHead")
            if self.fresh_head and names and f"{label}.prototypes" not in names:
                begin_head_anew(checkpoint, label, head)
                rank_zero_warn(f"{label} is fixed now, and the optimizer and its schedule start afresh.")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        tell_use(exception, "SimplexETFHead", SimplexETF, SparseETF)
        self._let_go(pl_module)  # after an exception Lightning does not call teardown

    def build_for(self, module: nn.Module, names: Collection[str]) -> None:
        """Put the head into ``module`` if it is not there and weights of these names, as a state dict has them, are its
        own; for weights that are loaded outside of a Trainer.
        """
        self._swap().swap_for(module, names)

    def _swap(self) -> HeadSwap:
        build = functools.partial(_build_head, self.head_options)
        options = {"sparsity": 0.0, **self.head_options}
        return HeadSwap(self.layer, SimplexETF, build, options, SimplexETFHead, self.fresh_head)

    def _let_go(self, pl_module: LightningModule) -> None:
        forget_check(pl_module, "SimplexETFHead")
        for method in ("configure_model", "configure_optimizers"):
            remove_link(pl_module, method, self.state_key)


class DotRegressionRegularizer(Regularizer):
    """Train features by dot-regression onto the prototypes of a ``layers.SimplexETF``, in place of the module's loss or
    beside it. The head comes in by ``SimplexETFHead``, or is built into the module.

    The formula is in ``functional.neural_collapse.dot_regression``. Logs ``dot_regression/loss/<layer>``, without
    weight, and its weighted ``share`` of the returned loss, as means over each epoch.

    ``training_step`` makes its loss as ever. With ``replace_loss`` the logits are detached while the fit lasts, so that
    what the module makes of them, commonly cross-entropy, is computed, logged and returned, and trains nothing; what it
    does not make of the logits, such as a loss of another head, trains on. The loss that Lightning sees is the sum of
    both values.

    Soft targets ``(N, C)`` are taken as they are, so mixup works where it is done in the collate function or in a
    batch transfer hook; what ``training_step`` mixes is not seen.

    Args:
        weight: factor of the term, a number; without ``replace_loss`` also a ``WeightSchedule``.
        replace_loss: keep the gradient of the logits from the network.
        class_counts: samples of each class: classes then weigh the same, by prototypes of the lengths that
            ``functional.neural_collapse.balanced_lengths`` gives. ``"batch"`` counts each batch. None: samples weigh
            the same.
        layer: dotted name of the head; None finds the classifier.
        target_key: where a batch keeps the targets, see ``joints.features.batches.targets_of``.
        ignore_index: samples with this target are left out.
        backward_index: with manual optimization, which ``manual_backward`` of a step the term joins, from 0.
    """

    @checked
    def __init__(
        self,
        weight: Weight = 1.0,
        replace_loss: bool = True,
        class_counts: ClassCounts = None,
        layer: str | None = None,
        target_key: TargetKey = None,
        ignore_index: int = -100,
        backward_index: int = 0,
    ) -> None:
        if replace_loss and not (isinstance(weight, (int, float)) and weight > 0):
            raise ValueError(
                f"weight={weight!r}: a term that replaces the loss needs a number above zero in every batch. Set "
                "replace_loss=False to schedule it."
            )
        tap = _HeadTap(layer, replace_loss)
        super().__init__(_DotRegressionTerm(tap, weight, class_counts, target_key, ignore_index, backward_index))


class _DotRegressionTerm(LossTerm):
    def __init__(
        self,
        tap: "_HeadTap",
        weight: Weight,
        class_counts: ClassCounts,
        target_key: TargetKey,
        ignore_index: int,
        backward_index: int,
    ) -> None:
        super().__init__("dot_regression", weight, [tap], None, backward_index)
        self.tap = tap
        self.class_counts = class_counts
        self.target_key = target_key
        self.ignore_index = ignore_index

    def value(self, module: LightningModule, batch: Any) -> Tensor:
        features, targets = self.tap.take(), targets_of(batch, self.target_key)
        if not (targets.ndim == 2 and targets.is_floating_point()):
            if self.tap.over_positions and targets.ndim == 1 and len(targets) < len(features):
                raise ValueError(
                    f"the head stands at each position of a map, {len(features)} in this batch, but there are "
                    f"{len(targets)} targets: {self.key} needs one for each position. Put an average over positions "
                    "before the classifier, or give a target_key that leads to such targets."
                )
            targets = class_indices(targets, len(features), f"the targets of {self.key}")
            keep = targets != self.ignore_index
            features, targets = features[keep], targets[keep]
        if not len(targets):
            return features.sum()  # zero, and still in the graph, where DDP waits for it
        return dot_regression(features, targets, self._prototypes(targets))

    def _prototypes(self, targets: Tensor) -> Tensor:
        head = self.tap.head
        if head is None:
            raise RuntimeError("the term is not attached to a module.")
        if self.class_counts is None:
            return head.prototypes
        if self.class_counts == "batch":
            soft = targets.ndim == 2
            if not soft and targets.device.type == "cpu":
                check_target_range(targets, head.num_classes)
            counts = targets.sum(0) if soft else torch.bincount(targets, minlength=head.num_classes)
        else:
            counts = torch.tensor(self.class_counts, device=targets.device)
            if counts.shape != (head.num_classes,):
                raise ValueError(
                    f"class_counts has {len(counts)} entries, but the head has {head.num_classes} classes: give the "
                    "samples of each class, in the order of the class indices."
                )
        return balanced_lengths(counts)[:, None] * head.prototypes


class _HeadTap(FeatureTap):
    """Hears the input of the fixed head, knows the head, and can keep gradients out of it."""

    _by_sample = False  # a head over positions is trained at each

    def __init__(self, layer: str | None, detach: bool) -> None:
        super().__init__(layer, read="input", keep_graph=True, pools=False)
        self.detach = detach
        self.over_positions = False
        self.head: SimplexETF | None = None
        self._detaching: RemovableHandle | None = None

    def attach(self, module: nn.Module) -> None:
        name, head = named_or_found(module, self.layer)
        if not isinstance(head, SimplexETF):
            raise ValueError(
                f"the classifier {name} is a {type(head).__name__}, without fixed prototypes: add SimplexETFHead() to "
                "the callbacks, or build the module with a SimplexETF."
            )
        super().attach(module)
        self.head, self.over_positions = head, around_positions(module, head) is not None
        if self.detach:
            self._detaching = head.register_forward_hook(_without_gradient)

    def remove(self) -> None:
        super().remove()
        if self._detaching is not None:
            self._detaching.remove()
        self._detaching = self.head = None


class _TakePlaces:
    """The link around ``configure_optimizers``, for optimizers that were made before the swap."""

    def __init__(self, layer: str | list[str] | None) -> None:
        self.layer = layer

    def __call__(self, module: LightningModule, call: Callable[..., Any]) -> Any:
        if not any(p.requires_grad for p in module.parameters()):
            raise ValueError(
                f"nothing is left to train in {type(module).__name__}: SimplexETFHead has fixed the classifier, and "
                "all that comes before it is frozen. Let a part of it train, or keep a classifier that does."
            )
        configured = call()
        for _, head in heads_of(module, self.layer):
            take_places(optimizers_in(configured), head)
        return configured


def _without_gradient(head: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
    return cut_gradient(logits)  # not detached: FSDP2 must see its backward


def _build_head(options: dict[str, Any], old: nn.Linear) -> SimplexETF:
    kind = SparseETF if "sparsity" in options else SimplexETF
    return kind(old.in_features, old.out_features, device=old.weight.device, **options)
