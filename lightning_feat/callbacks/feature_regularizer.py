from collections.abc import Callable

from torch import Tensor

from lightning_feat.joints.arguments import checked
from lightning_feat.joints.features.batches import TargetKey
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.taps import FeatureTap, Read
from lightning_feat.joints.loss.regularizer import Regularizer
from lightning_feat.joints.loss.terms import FeatureLossTerm, WeightSchedule


class FeatureRegularizer(Regularizer):
    """Add any function of the features of a layer to the loss, with the right scale under accumulation, AMP and DDP.

    Logs ``<name>/loss/<layer>``, the value without weight, and ``<name>/share/<layer>``, its weighted share of the
    loss, as means over each epoch. The parameters of ``loss``, if it is an ``nn.Module``, are trained by the user's
    optimizer; a checkpoint keeps them apart from the user's, so that runs with and without this callback can resume
    from one another.

    Args:
        loss: ``loss(features)`` or ``loss(features, targets)`` giving a scalar; a function or an ``nn.Module``.
        name: first part of the logged names.
        weight: factor of the term, a number or a ``WeightSchedule``.
        layer: dotted name of a submodule; None for the input of the classifier.
        read: the ``"output"`` or the ``"input"`` of that layer.
        pooling: how features that are not ``(N, D)`` become so, see ``lightning_feat.joints.features.pooling.pool``.
        target_key: where a batch keeps the class indices, see ``lightning_feat.joints.features.batches.targets_of``.
        ignore_index: samples with this target are left out.
        backward_index: with manual optimization, which ``manual_backward`` of a step the term joins, from 0.
        mask_key: where a batch keeps which tokens count ``(N, T)``, for ``pooling="mean"``, ``"max"``,
            ``"last"`` or ``"tokens"``: without it padding counts.
    """

    @checked
    def __init__(
        self,
        loss: Callable[..., Tensor],
        name: str,
        weight: float | WeightSchedule = 1.0,
        layer: str | None = None,
        read: Read | None = None,
        pooling: Pooling | None = None,
        target_key: TargetKey = None,
        ignore_index: int = -100,
        backward_index: int = 0,
        mask_key: TargetKey = None,
    ) -> None:
        tap = FeatureTap(layer, read, pooling, keep_graph=True)
        super().__init__(FeatureLossTerm(loss, name, tap, weight, target_key, ignore_index, backward_index, mask_key))
