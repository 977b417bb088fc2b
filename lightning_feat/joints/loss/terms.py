"""Terms that can be added to a loss, and how their weight goes with time; every regularizer has one. How they get into
the loss of a LightningModule is in ``loss_engine``.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_feat.joints.arguments import check_fields
from lightning_feat.joints.features.at_once import try_all
from lightning_feat.joints.features.batches import TargetKey, class_indices, mask_of, targets_of
from lightning_feat.joints.features.taps import FeatureTap


@dataclass(frozen=True)
class WeightSchedule:
    """A weight that depends on the time: zero before ``start_epoch``, from ``end_epoch`` on, and between every n-th
    batch.

    Epochs of a stream without length are counted when they end: its weight rises from epoch to epoch, which is said. A
    run in steps (``max_epochs=-1``) on such a stream may never end one, and is refused. ``limit_train_batches`` says
    how long an epoch is.

    Args:
        peak: the weight after warm-up.
        warmup_epochs: epochs over which it rises from zero, linearly and batch by batch, counted from ``start_epoch``.
        start_epoch: first epoch (from 0) with the term.
        end_epoch: first epoch without it again; None for never.
        every_n_batches: the term is computed in batches 0, n, 2n, ... of each epoch only. Its weight there is not
            multiplied by n.
    """

    peak: float = 1.0
    warmup_epochs: float = 0.0
    start_epoch: int = 0
    end_epoch: int | None = None
    every_n_batches: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        if not math.isfinite(self.peak):
            raise ValueError(f"a loss weight must be finite, got {self.peak}.")
        if self.warmup_epochs < 0 or self.start_epoch < 0 or self.every_n_batches < 1:
            raise ValueError(f"need warmup_epochs >= 0, start_epoch >= 0 and every_n_batches >= 1, got {self}.")
        if self.end_epoch is not None and self.end_epoch <= self.start_epoch:
            raise ValueError(f"end_epoch={self.end_epoch} must come after start_epoch={self.start_epoch}.")

    def at(self, epoch: int, batch_idx: int = 0, num_batches: float = math.inf) -> float:
        """The weight in batch ``batch_idx`` (from 0) of ``num_batches`` in ``epoch`` (from 0)."""
        over = self.end_epoch is not None and epoch >= self.end_epoch
        if epoch < self.start_epoch or over or batch_idx % self.every_n_batches:
            return 0.0
        if self.warmup_epochs == 0:
            return self.peak
        share_of_epoch = (batch_idx + 1) / num_batches if math.isfinite(num_batches) else 0.0
        return self.peak * min(1.0, (epoch - self.start_epoch + share_of_epoch) / self.warmup_epochs)

    def check_stream(self, max_epochs: int | None, owner: str) -> None:
        """Say what becomes of this schedule on training data without length: nothing where it counts no epochs.

        Args:
            max_epochs: of the run; -1 or None where it has no such limit.
            owner: whose weight it is, for the message.

        Raises:
            ValueError: if the run need not come to a second epoch.
        """
        times = {"warmup_epochs": self.warmup_epochs, "start_epoch": self.start_epoch, "end_epoch": self.end_epoch}
        counted = ", ".join(f"{name}={value}" for name, value in times.items() if value)
        if not counted:
            return
        what = f"the weight of {owner} goes by epochs ({counted}), but the training data do not say how long one is"
        if max_epochs is None or max_epochs < 0:
            raise ValueError(
                f"{what}, and a stream that does not end has only one: say it by Trainer(limit_train_batches=...), or "
                "set max_epochs if the stream ends."
            )
        rank_zero_warn(
            f"{what}: it stays within an epoch what it is at its beginning. Trainer(limit_train_batches=...) says it."
        )


Weight: TypeAlias = float | WeightSchedule


class LossTerm(ABC):
    """Something to be added to the loss.

    Args:
        name: the first part of what is logged: ``<name>/loss/<layer>``, the value without weight, and
            ``<name>/share/<layer>``, the weighted value as a share of the whole loss. One name and layer stand for
            one term.
        weight: factor of the value, a number or a schedule.
        taps: the taps that listen while ``training_step`` runs; the first one's layer is part of what is logged.
        parameters: a module whose parameters are trained along with the user's, if the term has any.
        backward_index: with manual optimization, which ``manual_backward`` of the step the term joins, from 0. It
            sees what ran since the one before.
    """

    def __init__(
        self,
        name: str,
        weight: Weight,
        taps: Sequence[FeatureTap],
        parameters: nn.Module | None = None,
        backward_index: int = 0,
    ) -> None:
        if backward_index < 0:
            raise ValueError(f"backward_index={backward_index}: it counts the manual_backward calls of a step from 0.")
        self.name = name
        self.weight = weight if isinstance(weight, WeightSchedule) else WeightSchedule(float(weight))
        self.taps = list(taps)
        self.parameters = parameters
        self.backward_index = backward_index

    @property
    def key(self) -> str:
        """What tells this term from others: its name and layer."""
        return f"{self.name}@{self.taps[0].label}" if self.taps else self.name

    def log_name(self, measure: str) -> str:
        """The name under which ``measure`` is logged."""
        return f"{self.name}/{measure}/{self.taps[0].label}" if self.taps else f"{self.name}/{measure}"

    @abstractmethod
    def value(self, module: LightningModule, batch: Any) -> Tensor:
        """The scalar to be weighted and added; called outside autocast, after the taps have heard the step."""


class FeatureLossTerm(LossTerm):
    """A function of the features of one layer, and of the targets if it takes two arguments.

    Args:
        loss: ``loss(features)`` or ``loss(features, targets)``, a scalar tensor; features ``(N, D)`` in float32 at
            least, targets ``(N,)`` int64. The parameters of an ``nn.Module`` are trained along.
        name: see ``LossTerm``; and there ``weight`` and ``backward_index``.
        tap: where the features come from; it must keep the graph.
        target_key: where a batch keeps the targets, see ``targets_of``.
        ignore_index: samples with this target are left out. With no sample left the term is zero.
        mask_key: where a batch keeps which tokens count ``(N, T)``, see ``joints.features.pooling.pool``.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        name: str,
        tap: FeatureTap,
        weight: Weight = 1.0,
        target_key: TargetKey = None,
        ignore_index: int = -100,
        backward_index: int = 0,
        mask_key: TargetKey = None,
    ) -> None:
        parameters = loss if isinstance(loss, nn.Module) else None
        super().__init__(name, weight, [tap], parameters, backward_index)
        self.loss = loss
        self.tap = tap
        self.target_key = target_key
        self.ignore_index, self.mask_key = ignore_index, mask_key
        self._told = False
        self.takes_targets = _takes_two(loss)

    def value(self, module: LightningModule, batch: Any) -> Tensor:
        mask, targets = try_all(
            lambda: mask_of(batch, self.mask_key),
            lambda: targets_of(batch, self.target_key) if self.takes_targets else None,
            self.tap.check,
        )[:2]
        features = self.tap.take(mask)
        if not (features.requires_grad or self._told):
            self._told = True
            rank_zero_warn(
                f"the term {self.key} reaches no layer of the network: the features of {self.tap.label} have no "
                "gradient, as where all that comes before is frozen. Nothing is left to train by it until a part is "
                "unfrozen."
            )
        if features.dtype != torch.float64:
            features = features.float()
        counts = self._counted_tokens(batch, len(features))
        if not self.takes_targets:
            features = features if counts is None else features[counts]
            return self.loss(features) if len(features) else features.sum()
        targets = class_indices(
            targets,
            len(features),
            f"the targets of {self.key}",
            views=self.tap.pooling != "tokens",
        )
        keep = targets.to(features.device) != self.ignore_index
        keep = keep if counts is None else keep & counts
        if not bool(keep.any()):
            # Still a function of the features, so that DDP finds every parameter in the graph on every rank. A sum over
            # nothing: zero times a NaN that is ignored would be NaN.
            return features[keep].sum()
        return self.loss(features, targets) if bool(keep.all()) else self.loss(features[keep], targets[keep])

    def _counted_tokens(self, batch: Any, num_rows: int) -> Tensor | None:
        """Where each token is a sample of its own, which of the rows are no padding."""
        mask = mask_of(batch, self.mask_key) if self.tap.pooling == "tokens" else None
        if mask is not None and mask.numel() != num_rows:
            raise ValueError(f"the mask of {self.key} is {tuple(mask.shape)} for {num_rows} tokens: set mask_key.")
        return None if mask is None else mask.flatten()


def _takes_two(loss: Callable[..., Tensor]) -> bool:
    function = loss.forward if isinstance(loss, nn.Module) else loss
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in inspect.signature(function).parameters.values() if p.kind in kinds and p.default is p.empty]
    if len(needed) not in (1, 2):
        raise ValueError(f"a loss takes (features) or (features, targets), but {loss!r} needs {len(needed)} arguments.")
    return len(needed) == 2
