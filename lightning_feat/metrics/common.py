"""Metrics whose state is sums in float64, exact over batches and processes.

Shapes: N samples, D features, C classes.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import Module
from torchmetrics import Metric

from lightning_feat.functional.common.class_sums import (
    ClassSums,
    accumulation_device,
    add_class_sums_,
    check_values,
    empty_class_sums,
    to_float64,
)
from lightning_feat.functional.common.directions import FLOAT32_ROUNDING, rounding_of
from lightning_feat.functional.common.looks import values_are_at_hand
from lightning_feat.joints.arguments import checked


def all_reduce_sum(state: Tensor, group: Any = None) -> list[Tensor]:
    """A ``dist_sync_fn`` for states that are sums: receives one copy of the state, not one from every process."""
    total = state.clone()
    torch.distributed.all_reduce(total, group=group)
    return [total]


def at_least_one(**numbers: Any) -> list[int]:
    """The numbers as plain ints, also those of NumPy; a ``ValueError`` for anything else, or below one."""
    found = []
    for name, number in numbers.items():
        try:
            found.append(operator.index(number))
        except TypeError:
            raise ValueError(f"{name}={number!r} must be a whole number") from None
    if min(found) < 1:
        raise ValueError(f"{' and '.join(f'{name}={number}' for name, number in numbers.items())}: must be at least 1")
    return found


class SumsMetric(Metric):
    """What is common to metrics of float64 sums.

    Casts do not reach the sums: neither ``half``, ``set_dtype``, nor those of a module that holds the metric, as a
    precision plugin makes. They follow to any device that has float64, and stay on the CPU beside one that has not.
    """

    is_differentiable = False  # what should train the features takes the functions, which are
    higher_is_better: bool | None = None
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"dist_sync_fn": all_reduce_sum, **kwargs})

    def _add_sum(self, name: str, *shape: int) -> None:
        self.add_state(name, default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[..., Tensor], exclude_state: Any = "") -> Module:
        device = fn(torch.zeros(1)).device
        return self if accumulation_device(device) != device else super()._apply(_without_cast(fn), exclude_state)

    def _make_writable(self) -> None:
        """Replace states that a ``reset`` within inference mode has made: outside it they could not be added to."""
        if not torch.is_inference_mode_enabled():
            for name in self._defaults:
                if getattr(self, name).is_inference():
                    setattr(self, name, getattr(self, name).clone())

    def merge_state(self, incoming_state: "dict[str, Any] | Metric") -> None:
        """Add the sums of another metric of this kind, or a dictionary of its states.

        Raises:
            ValueError: if its states have other names or shapes.
        """
        states: Any = incoming_state.metric_state if isinstance(incoming_state, type(self)) else incoming_state
        mine, theirs = _shapes(self.metric_state), _shapes(states)
        if isinstance(states, dict) and mine != theirs:  # what is no state at all torchmetrics refuses
            raise ValueError(f"the states to merge are {theirs}, those here {mine}: give both metrics the same options")
        super().merge_state(incoming_state)
        self._computed = None  # torchmetrics would go on giving the value from before
        self._update_count += incoming_state.update_count if isinstance(incoming_state, Metric) else 1

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot ``val``, results of ``compute`` or ``forward``, or what ``compute`` gives now; needs matplotlib.

        Args:
            val: one result, or several for a line over steps.
            ax: axes to draw into; None makes some.

        Returns:
            Figure and axes.
        """
        return self._plot(val, ax)


def _shapes(states: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in states.items()} if isinstance(states, dict) else {}


def _without_cast(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def moved(value: Tensor) -> Tensor:
        result = fn(value)
        return result if result.dtype == value.dtype else value.to(result.device)

    return moved


class ClassSumsMetric(SumsMetric):
    """Sums per class, added in place so that a batch costs its own size and not that of the state.

    Args:
        num_classes: number of classes C, counting those without samples.
        num_features: width D of the features.
        **kwargs: those of ``torchmetrics.Metric``. A ``dist_sync_fn`` must suit states that are sums.
    """

    # Before the names of the sums, apart from those of other classes: a MetricCollection takes two metrics for one
    # where names and values are equal, and values may be equal by chance.
    _prefix = ""
    nonfinite: Tensor
    outside: Tensor
    roundings: Tensor

    @checked
    def __init__(self, num_classes: int, num_features: int, **kwargs: Any) -> None:
        num_classes, num_features = at_least_one(num_classes=num_classes, num_features=num_features)
        super().__init__(**kwargs)
        self.num_classes, self.num_features = num_classes, num_features
        self._looked = False  # at the targets of a batch
        for name, zeros in empty_class_sums(num_classes, num_features)._asdict().items():
            self._add_sum(self._prefix + name, *zeros.shape)
        for name in ("nonfinite", "outside", "roundings"):
            self._add_sum(name)

    def _usable(
        self, features: Tensor, targets: Tensor, repeated: Tensor | None, first: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The batch in float64 with what must not count set to zero, and weights of one or zero (None: all count).

        On an accelerator only the very first batch looks for targets out of range; later ones are left out, counted,
        and reported by ``compute``.
        """
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(
                f"num_features={self.num_features} but features are {tuple(features.shape)}: they must be (N, D); "
                f"set num_features to the width of the layer, and pool or flatten feature maps first."
            )
        if repeated is not None and repeated.shape != features.shape[:1]:
            raise ValueError(f"repeated must be ({len(features)},), one for each sample, got {tuple(repeated.shape)}")
        features = to_float64(features.detach())
        targets, at_hand = targets.to(features.device), values_are_at_hand(features)
        bad_N = ~vector_norm(features, dim=1).isfinite()  # ten times as fast as features.isfinite().all(1)
        left_out_N = bad_N
        if repeated is not None:
            repeated_N = repeated.to(features.device, torch.bool)
            bad_N, left_out_N = bad_N & ~repeated_N, bad_N | repeated_N
        self.nonfinite += bad_N.sum()
        if targets.ndim == 1 and not targets.is_floating_point():
            if at_hand or first:
                check_values(targets, self.num_classes)
            else:
                outside_N = (targets < 0) | (targets >= self.num_classes)
                self.outside += (outside_N & ~left_out_N).sum()
                targets, left_out_N = targets.masked_fill(outside_N, 0), left_out_N | outside_N
        elif first and not at_hand and targets.shape[1:] == (self.num_classes,):
            check_values(targets, self.num_classes)
        if at_hand and not left_out_N.any():
            return features, targets, None
        return features.masked_fill(left_out_N[:, None], 0), targets, (~left_out_N).double()

    def update(self, features: Tensor, targets: Tensor, repeated: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            features: ``(N, D)``, any floating dtype. Samples that are not finite are left out and counted.
            targets: ``(N,)`` class indices in ``[0, num_classes)``, or ``(N, C)`` floating soft targets.
            repeated: ``(N,)`` mask of samples that a distributed sampler repeats to even out the processes, left out
                here; :func:`~lightning_feat.functional.common.class_sums.repeated_by_sampler` makes it.

        Raises:
            ValueError: if shapes do not fit, or a class index is out of range (on an accelerator: at the very first
                batch, else from ``compute``, so that no batch waits for the device).
        """
        self._make_writable()
        rounding = rounding_of(features.dtype)
        features, targets, weights = self._usable(features, targets, repeated, first=not self._looked)
        self._looked = True
        self._add(features, targets, weights)
        self.roundings += rounding**2 * (len(features) if weights is None else weights.sum())

    def _add(self, features: Tensor, targets: Tensor, weights: Tensor | None) -> None:
        add_class_sums_(self._totals(), features, targets, weights)

    def _totals(self) -> ClassSums:
        return ClassSums(*(getattr(self, self._prefix + name) for name in ClassSums._fields))

    def _rounding(self) -> float:
        """Relative rounding of the features that were seen, in the root mean square over the samples."""
        samples = float(self._totals().counts.sum())
        return (float(self.roundings) / samples) ** 0.5 if samples else FLOAT32_ROUNDING

    def _check_outside(self) -> None:
        if self.outside > 0:
            raise ValueError(
                f"{int(self.outside)} targets lay outside [0, {self.num_classes}): set num_classes to the number of "
                f"classes, and leave out samples that carry a marker for 'no label'."
            )
