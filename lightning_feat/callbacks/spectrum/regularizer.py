from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import Tensor

from lightning_feat.functional.spectrum import gaussian_uniformity, koleo, wasserstein_uniformity
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.features.batches import TargetKey
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.taps import FeatureTap, Read
from lightning_feat.joints.loss.regularizer import Regularizer
from lightning_feat.joints.loss.terms import FeatureLossTerm, Weight

Spread: TypeAlias = Literal["wasserstein", "gaussian", "koleo"]
_LOSSES: dict[Spread, Callable[[Tensor], Tensor]] = {
    "wasserstein": wasserstein_uniformity,
    "gaussian": gaussian_uniformity,
    "koleo": koleo,
}


class UniformityRegularizer(Regularizer):
    """Spread the directions of features evenly over the sphere, against a collapse onto few of them.

    Logs ``uniformity_<loss>/loss/<layer>``, the value without weight, and ``uniformity_<loss>/share/<layer>``, its
    weighted share of the loss, as means over each epoch. No labels are needed: made for joint-embedding training, whose
    features may collapse. Beside a loss of classes it works against neural collapse.

    ``functional.spectrum`` defines the losses: ``"wasserstein"`` is ``wasserstein_uniformity`` (its paper's weights are
    0.2 beside BYOL and 1 beside MoCo v2), which alone tells empty directions; ``"gaussian"`` is
    ``gaussian_uniformity``; ``"koleo"`` that of DINOv2 (weight 0.1). A batch without two samples adds nothing.

    Under DDP and accumulation each process and each batch is judged by itself, as DINOv2 does, and gradients are
    averaged: all three read a spread off the batch, so their value depends on its size.

    Args:
        loss: which of them.
        weight: factor of the term, a number or a ``WeightSchedule``.
        layer: dotted name of a submodule; None for the input of the classifier.
        read: the ``"output"`` or the ``"input"`` of that layer.
        pooling: how features that are not ``(N, D)`` become so, see ``joints.features.pooling.pool``.
        backward_index: with manual optimization, which ``manual_backward`` of a step the term joins, from 0.
        mask_key: where a batch keeps which tokens count ``(N, T)``, for ``pooling="mean"``, ``"max"``, ``"last"`` or
            ``"tokens"``: without it padding counts.
    """

    @checked
    def __init__(
        self,
        loss: Spread = "wasserstein",
        weight: Weight = 0.2,
        layer: str | None = None,
        read: Read | None = None,
        pooling: Pooling | None = None,
        backward_index: int = 0,
        mask_key: TargetKey = None,
    ) -> None:
        tap = FeatureTap(layer, read, pooling, keep_graph=True)
        term = FeatureLossTerm(
            _Spread(_LOSSES[loss]), f"uniformity_{loss}", tap, weight, backward_index=backward_index, mask_key=mask_key
        )
        super().__init__(term)


class _Spread:
    """A loss that is zero, with a gradient of zero, where there are no two samples to compare."""

    def __init__(self, loss: Callable[[Tensor], Tensor]) -> None:
        self.loss = loss

    def __call__(self, features: Tensor) -> Tensor:
        return self.loss(features) if len(features) > 1 else features[:0].sum()
