import math
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_feat.functional.neural_collapse.losses import (
    PushVariant,
    between_class_push,
    scale_gradient,
    within_class_pull,
)
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.features.batches import TargetKey
from lightning_feat.joints.features.candidates import head_sizes
from lightning_feat.joints.features.heads import find_classifier
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.taps import FeatureTap, Read, find_layer
from lightning_feat.joints.loss.regularizer import Regularizer
from lightning_feat.joints.loss.terms import FeatureLossTerm, LossTerm, Weight, WeightSchedule
from lightning_feat.joints.module.wraps import add_link, overrides, remove_link
from lightning_feat.joints.run.averaging import refuse_averaging_before
from lightning_feat.joints.run.twins import refuse_twin


class NeuralCollapseRegularizer(Regularizer):
    """Draw the features of each class to a mean, and the means towards a simplex; or hold both back.

    The means ``(C, D)`` are parameters, trained by the user's optimizer in a group that exists. The *pull* draws
    features and means together (``functional.neural_collapse.within_class_pull``); the *push* drives the means apart in
    angle (``between_class_push``), and the features follow by the pull. The gradient that the pull gives to the means
    is divided by its weight, so that they keep up with the features however small it is. Logs, as means over each
    epoch, ``collapse_pull/loss/<layer>`` and ``collapse_push/loss/<layer>``, both without weight, and the weighted
    ``share`` of each in the loss.

    Made for classes of unequal size: every class weighs the same. Source: Liu et al., "Inducing neural collapse in deep
    long-tailed learning", AISTATS 2023, arXiv 2302.12453, whose weights these are. There the means have an SGD of their
    own at a learning rate of 0.5, beside 0.1 for the network at first; ``lr_factor=5`` gives this ratio. Their second
    step, a classifier trained anew on balanced classes, is left to you, and so is their third term.

    Under DDP each process averages over the samples of a class in its own batch, then gradients are averaged: a class
    that the processes hold in unequal numbers weighs otherwise than in one process with the whole batch.

    Clipping by norm sees the gradient of the means, which is not small: it may leave the network a tenth of its step.
    Clip by value, or at a larger norm.

    ``hold_back`` turns the sign of the pull for the features alone: they leave their class mean, which follows them as
    before, and, as the push still moves the means outward, classes are driven towards one another. Nothing bounds how
    far features go: keep the weight small and the weight decay on, and stop it by a ``WeightSchedule`` (``end_epoch``).

    Args:
        pull_weight: factor of the pull, above zero: a number or a ``WeightSchedule``.
        push_weight: factor of the push, zero or above.
        variant: of the push, see ``functional.neural_collapse.between_class_push``.
        hold_back: see above.
        num_classes: number of classes; None asks the classifier.
        num_features: width of the features; None asks the classifier, or the layer that is named with
            ``read="input"``.
        lr_factor: multiplies the gradient of the means: under SGD their learning rate. Adam does not notice.
        seed: draws the means, normally distributed as in the paper, from a generator of its own.
        layer: dotted name of a submodule; None for the input of the classifier.
        read: the ``"output"`` or the ``"input"`` of that layer.
        pooling: how features that are not ``(N, D)`` become so, see ``joints.features.pooling.pool``.
        target_key: where a batch keeps the class indices, see ``joints.features.batches.targets_of``.
        ignore_index: samples with this target are left out.
        backward_index: with manual optimization, which ``manual_backward`` of a step the terms join, from 0.
        mask_key: where a batch keeps which tokens count ``(N, T)``, for ``pooling="mean"``, ``"max"``,
            ``"last"`` or ``"tokens"``: without it padding counts.
    """

    @checked
    def __init__(
        self,
        pull_weight: Weight = 0.01,
        push_weight: Weight = 0.1,
        variant: PushVariant = "per_class",
        hold_back: bool = False,
        num_classes: int | None = None,
        num_features: int | None = None,
        lr_factor: float = 1.0,
        seed: int = 0,
        layer: str | None = None,
        read: Read | None = None,
        pooling: Pooling | None = None,
        target_key: TargetKey = None,
        ignore_index: int = -100,
        backward_index: int = 0,
        mask_key: TargetKey = None,
    ) -> None:
        pull, push = (w if isinstance(w, WeightSchedule) else WeightSchedule(w) for w in (pull_weight, push_weight))
        if pull.peak <= 0 or push.peak < 0:
            raise ValueError(
                f"pull_weight={pull.peak} must be above zero and push_weight={push.peak} not below: without the pull "
                "nothing reaches the features. To work against collapse set hold_back=True."
            )
        if lr_factor <= 0:
            raise ValueError(f"lr_factor={lr_factor} must be above zero: the means would stay where they were drawn.")
        between_class_push(torch.eye(2), variant)  # refuses an unknown variant now
        if layer is not None and read != "input" and num_features is None:
            raise ValueError(
                f"layer={layer!r}: how wide its features are is not known before it runs: set num_features."
            )
        self.pull_weight = replace(pull, peak=-pull.peak) if hold_back else pull
        self.push_weight, self.variant, self.lr_factor, self.seed = push, variant, lr_factor, seed
        self.num_classes, self.num_features = num_classes, num_features
        self.tap = FeatureTap(layer, read, pooling, keep_graph=True)
        self.target_key, self.ignore_index, self.backward_index = target_key, ignore_index, backward_index
        self.mask_key = mask_key
        self.pull: _Pull | None = None
        self.push: _Push | None = None

    @property
    def state_key(self) -> str:
        return f"NeuralCollapseRegularizer[{self.tap.label}]"

    def terms(self) -> list[LossTerm]:
        return [term for term in (self.pull, self.push) if term is not None]

    @property
    def means(self) -> Tensor:
        """The class means ``(C, D)`` as they were trained; there are none before the first fit."""
        if self.pull is None:
            raise RuntimeError("there are no class means yet: they are made when a fit begins.")
        return self.pull.means.means

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)
        if stage != "fit":
            return
        refuse_averaging_before(trainer, self)
        known = self.num_classes is not None and self.num_features is not None
        if known or not any(overrides(pl_module, hook) for hook in ("setup", "configure_model")):
            self.bring_in(pl_module)  # early, so that averaging callbacks copy a module with the means
        else:
            add_link(pl_module, "configure_model", self.state_key, _BringIn(self))

    def bring_in(self, pl_module: LightningModule) -> None:
        """Add both terms to the loss of ``pl_module``; its layers must be there. A second time changes nothing."""
        num_classes = self.num_classes or self._asked(pl_module, 1, "num_classes")
        num_features = self.num_features or self._asked(pl_module, 0, "num_features")
        shape = num_classes, num_features
        if self.pull is None or self.pull.means.means.shape != shape:
            means = _ClassMeans(*shape, self.seed)
            where = self.tap, self.target_key, self.ignore_index, self.backward_index, self.mask_key
            self.pull = _Pull(means, self.lr_factor, self.pull_weight, *where)
            self.push = _Push(means, self.lr_factor, self.push_weight, self.variant, self.tap, self.backward_index)
        self.add_terms(pl_module)

    def _asked(self, pl_module: LightningModule, which: int, argument: str) -> int:
        """The width of the features (0) or the number of classes (1), of the classifier or the layer that is named."""
        named = self.tap.layer if self.tap.read == "input" else None
        try:
            if named is not None and which == 0:
                name, head = named, find_layer(pl_module, named)
            else:
                name, head = find_classifier(pl_module, "layer` with `read='input'")
        except ValueError as error:
            if named is None:
                raise ValueError(f"{error}") from None
            name, head = named, find_layer(pl_module, named)
        size = head_sizes(head)[which]
        if size is None:
            what = ("how wide its features are", "how many classes it has")[which]
            raise ValueError(f"{name}, a {type(head).__name__}, does not say {what}: set {argument}.")
        return size

    def remove_terms(self, pl_module: LightningModule) -> None:
        super().remove_terms(pl_module)
        remove_link(pl_module, "configure_model", self.state_key)


class _ClassMeans(nn.Module):
    """The means, and the pull on them. ``step`` multiplies the gradient that the means get from it."""

    def __init__(self, num_classes: int, num_features: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(num_classes, num_features, generator=generator, dtype=torch.float32, device="cpu")
        self.means = nn.Parameter(drawn)
        self.step = 1.0

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        if features.shape[1] != self.means.shape[1]:
            raise ValueError(
                f"the features are {features.shape[1]} wide, but the class means {self.means.shape[1]}: set "
                "num_features."
            )
        return within_class_pull(features, targets, scale_gradient(self.means, self.step))


class _Pull(FeatureLossTerm):
    def __init__(
        self,
        means: _ClassMeans,
        lr_factor: float,
        weight: WeightSchedule,
        tap: FeatureTap,
        target_key: TargetKey,
        ignore_index: int,
        backward_index: int,
        mask_key: TargetKey,
    ) -> None:
        super().__init__(means, "collapse_pull", tap, weight, target_key, ignore_index, backward_index, mask_key)
        self.means, self.lr_factor = means, lr_factor

    def value(self, module: LightningModule, batch: Any) -> Tensor:
        trainer = module._trainer  # None where the step is called by hand, as on a copy
        now: tuple[int, int, float] = (0, 0, math.inf)
        if trainer is not None:
            now = (trainer.current_epoch, trainer.fit_loop.batch_idx, trainer.num_training_batches)
        self.means.step = self.lr_factor / self.weight.at(*now)  # not zero, or it would not be called; below: held back
        return super().value(module, batch)


class _Push(LossTerm):
    def __init__(
        self,
        means: _ClassMeans,
        lr_factor: float,
        weight: WeightSchedule,
        variant: PushVariant,
        tap: FeatureTap,
        backward_index: int,
    ) -> None:
        super().__init__("collapse_push", weight, [tap], backward_index=backward_index)  # the tap for its name alone
        self.means, self.lr_factor, self.variant = means, lr_factor, variant

    def value(self, module: LightningModule, batch: Any) -> Tensor:
        return between_class_push(scale_gradient(self.means.means, self.lr_factor), self.variant)


class _BringIn:
    """The link around ``configure_model``, for modules that build layers late. A copy of the module does nothing."""

    def __init__(self, callback: NeuralCollapseRegularizer | None = None) -> None:
        self.callback = callback

    def __call__(self, module: LightningModule, call: Any) -> None:
        call()
        if self.callback is not None:
            self.callback.bring_in(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_BringIn, ())
