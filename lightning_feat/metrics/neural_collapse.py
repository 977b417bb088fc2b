"""Neural collapse of everything seen since ``reset``, exact over batches and processes: the state is sums.

Shapes: N samples, D features, C classes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import Module
from torchmetrics import Metric

from lightning_feat.functional.common.class_sums import (
    CenterSums,
    ClassCenters,
    ClassSums,
    GlobalMean,
    accumulation_device,
    add_class_sums_,
    center_sums,
    check_target_range,
    class_centers,
    empty_class_sums,
    to_float64,
)
from lightning_feat.functional.neural_collapse import (
    CollapsePicture,
    class_distance_normalized_variance,
    collapse_measures,
    collapse_picture,
    within_class_covariance,
    within_class_scatter,
)


def all_reduce_sum(state: Tensor, group: Any = None) -> list[Tensor]:
    """A ``dist_sync_fn`` for states that are sums: receives one copy of the state, not one from every process."""
    total = state.clone()
    torch.distributed.all_reduce(total, group=group)
    return [total]


def _values_are_at_hand(values: Tensor) -> bool:
    """Whether looking at values stops nothing: on an accelerator it waits until all that was queued has run."""
    return values.device.type == "cpu"


class _ClassSumsMetric(Metric):
    """Sums per class, added in place so that a batch costs its own size and not that of the state."""

    is_differentiable = False  # what should train the features takes the functions, which are
    full_state_update = False
    counts: Tensor
    sums: Tensor
    squares: Tensor
    nonfinite: Tensor
    outside: Tensor

    def __init__(self, num_classes: int, num_features: int, **kwargs: Any) -> None:
        if num_classes < 1 or num_features < 1:
            raise ValueError(f"num_classes={num_classes} and num_features={num_features}: both must be at least 1")
        super().__init__(**{"dist_sync_fn": all_reduce_sum, **kwargs})
        self.num_classes, self.num_features = num_classes, num_features
        for name, zeros in empty_class_sums(num_classes, num_features)._asdict().items():
            self.add_state(name, default=zeros, dist_reduce_fx="sum")
        self._add_sum("nonfinite")
        self._add_sum("outside")

    def _add_sum(self, name: str, *shape: int) -> None:
        self.add_state(name, default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[..., Tensor], exclude_state: Any = "") -> Module:
        device = fn(torch.zeros(1)).device
        # A move to a device without float64 (MPS) leaves the sums on the CPU, where `update` brings the features.
        return self if accumulation_device(device) != device else super()._apply(fn, exclude_state)

    def _make_writable(self) -> None:
        """Replace states that a ``reset`` within inference mode has made: outside it they could not be added to."""
        if not torch.is_inference_mode_enabled():
            for name in self._defaults:
                if getattr(self, name).is_inference():
                    setattr(self, name, getattr(self, name).clone())

    def _usable(
        self, features: Tensor, targets: Tensor, repeated: Tensor | None, first: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The batch in float64 with what must not count set to zero, and weights of one or zero (None: all count).

        On an accelerator only the first batch looks for targets out of range; later ones are left out, counted, and
        reported by ``compute``.
        """
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(
                f"num_features={self.num_features} but features are {tuple(features.shape)}: they must be (N, D); "
                f"set num_features to the width of the layer, and pool or flatten feature maps first."
            )
        if repeated is not None and repeated.shape != features.shape[:1]:
            raise ValueError(f"repeated must be ({len(features)},), one for each sample, got {tuple(repeated.shape)}")
        features = to_float64(features.detach())
        targets, at_hand = targets.to(features.device), _values_are_at_hand(features)
        bad_N = ~vector_norm(features, dim=1).isfinite()  # ten times as fast as features.isfinite().all(1)
        left_out_N = bad_N
        if repeated is not None:
            repeated_N = repeated.to(features.device, torch.bool)
            bad_N, left_out_N = bad_N & ~repeated_N, bad_N | repeated_N
        self.nonfinite += bad_N.sum()
        if targets.ndim == 1 and not targets.is_floating_point():
            if at_hand or first:
                check_target_range(targets, self.num_classes)
            else:
                outside_N = (targets < 0) | (targets >= self.num_classes)
                self.outside += (outside_N & ~left_out_N).sum()
                targets, left_out_N = targets.masked_fill(outside_N, 0), left_out_N | outside_N
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
            ValueError: if shapes do not fit, or a class index is out of range (on an accelerator: at the first batch,
                else from ``compute``, so that no batch waits for the device).
        """
        self._make_writable()
        features, targets, weights = self._usable(features, targets, repeated, first=self.update_count <= 1)
        self._add(features, targets, weights)

    def _add(self, features: Tensor, targets: Tensor, weights: Tensor | None) -> None:
        add_class_sums_(self._totals(), features, targets, weights)

    def _totals(self) -> ClassSums:
        return ClassSums(self.counts, self.sums, self.squares)

    def _check_outside(self) -> None:
        if self.outside > 0:
            raise ValueError(
                f"{int(self.outside)} targets lay outside [0, {self.num_classes}): set num_classes to the number of "
                f"classes, and leave out samples that carry a marker for 'no label'."
            )


class ClassDistanceNormalizedVariance(_ClassSumsMetric):
    """CDNV of everything seen since ``reset``, exact over batches and processes; the formula is in ``functional``.

    Keeps sums, not samples: ``8 * C * (D + 2)`` bytes, and as many for what ``reset`` restores.

    Example:
        >>> features = torch.tensor([[0.0], [2.0], [4.0], [6.0]])  # class means 1 and 5, variance 1 around each
        >>> metric = ClassDistanceNormalizedVariance(num_classes=2, num_features=1)
        >>> metric(features, torch.tensor([0, 0, 1, 1]))
        tensor(0.0625, dtype=torch.float64)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """CDNV, the same scalar on every process."""
        self._check_outside()
        return class_distance_normalized_variance(self._totals())


class NeuralCollapse(_ClassSumsMetric):
    """Every measure of :func:`~lightning_feat.functional.neural_collapse.collapse_measures`, as one dictionary.

    One pass gives NC1 by quotient, CDNV and NC2; with ``second_moment`` also NC1 by pseudo-inverse and VCI; with
    :meth:`set_classifier` also NC0 and NC3. For nearest-mean accuracy, NC4, and NC1 by pseudo-inverse without a
    ``(D, D)`` matrix, run over the same samples again between :meth:`start_second_pass` and ``compute``.

    Keeps sums, not samples: ``8 * C * (D + 3)`` bytes, with ``second_moment`` ``8 * D^2`` more; torchmetrics holds as
    many again for ``reset``. At C = 1000, D = 2048 that is 16 MB (twice), with the second moment 50 MB (twice). To
    synchronise, a process receives one copy of the state. A batch of 128 takes 0.08 ms at C = 10, D = 512 and 0.25 ms
    at 1000 x 2048 on one CPU core, with the second moment 1.6 and 43 ms. Call ``update``, not the metric itself: its
    ``forward`` computes all measures at every batch.

    Args:
        num_classes: number of classes C, counting those without samples.
        num_features: width D of the features.
        second_moment: whether to keep the ``(D, D)`` second moment.
        global_mean: what class means are centred by: the mean of the class means, or of all samples.
        within_scatter: whether the second pass keeps the ``(D, D)`` scatter within classes, for :meth:`picture`.
        **kwargs: those of ``torchmetrics.Metric``. A ``dist_sync_fn`` must suit states that are sums.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 0.0], [6.0, 0.0]])
        >>> metric = NeuralCollapse(num_classes=2, num_features=2)
        >>> metric.update(features, torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()["nc1_quotient"]  # spread 1 within the classes, 17 / 4 between them
        tensor(0.2353, dtype=torch.float64)
    """

    moment: Tensor
    scatter: Tensor
    samples: Tensor
    mismatches: Tensor
    hits: Tensor
    projected: Tensor

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        second_moment: bool = False,
        global_mean: GlobalMean = "classes",
        within_scatter: bool = False,
        **kwargs: Any,
    ) -> None:
        if global_mean not in ("classes", "samples"):
            raise ValueError(f"global_mean must be 'classes' or 'samples', got {global_mean!r}")
        # The second pass and the classifier change the result without an `update`, so no result is kept.
        super().__init__(num_classes, num_features, **{"compute_with_cache": False, **kwargs})
        self.second_moment, self.global_mean, self.within_scatter = second_moment, global_mean, within_scatter
        for name, kept in (("moment", second_moment), ("scatter", within_scatter)):
            if kept:
                self._add_sum(name, num_features, num_features)
        for name in ("samples", "mismatches", "hits"):
            self._add_sum(name)
        self._add_sum("projected", num_classes)
        self._centers: ClassCenters | None = None
        self._classifier: dict[str, Tensor] = {}

    def set_classifier(
        self, weight: Tensor | None = None, bias: Tensor | None = None, basis: Tensor | None = None
    ) -> None:
        """Compare with this classifier from now on: ``weight`` ``(C, D)`` and ``bias`` ``(C,)``, or a Grassmann
        ``basis`` ``(C, k, D)``. Nothing is copied: steps of an optimizer that work in place are seen by ``compute``.
        """
        given = {"weight": weight, "bias": bias, "basis": basis}
        self._classifier = {name: value.detach() for name, value in given.items() if value is not None}

    def _add(self, features: Tensor, targets: Tensor, weights: Tensor | None) -> None:
        if self._centers is not None:
            raise RuntimeError("the second pass has started: call reset() before the first pass of the next round")
        super()._add(features, targets, weights)
        if self.second_moment:
            self.moment.addmm_(features.T, features)  # what does not count is zero by now

    def start_second_pass(self) -> None:
        """Fix the class means of all processes, which must all call this, and start the second pass anew."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            self._check_outside()
            self._centers = class_centers(self._totals(), self.global_mean)
        for name in (*CenterSums._fields, *(["scatter"] if self.within_scatter else [])):
            setattr(self, name, torch.zeros_like(getattr(self, name)))

    def update_second_pass(
        self, features: Tensor, targets: Tensor, logits: Tensor | None = None, repeated: Tensor | None = None
    ) -> None:
        """Add a batch of the second pass. ``logits`` ``(N, C)``: the true ones; without them there is no NC4.

        Samples are left out as by ``update``; they are counted there.

        Raises:
            RuntimeError: before :meth:`start_second_pass`.
            ValueError: as ``update``.
        """
        if self._centers is None:
            raise RuntimeError("call start_second_pass() first, on all processes: it fixes the class means")
        with torch.no_grad():
            self._make_writable()
            nonfinite = self.nonfinite.clone()
            features, targets, weights = self._usable(features, targets, repeated, first=False)
            self.nonfinite.copy_(nonfinite)
            logits = logits if logits is None else logits.detach().to(features.device)
            for name, value in center_sums(features, targets, logits, self._centers, weights)._asdict().items():
                getattr(self, name).add_(value)
            if self.within_scatter:
                self.scatter += within_class_scatter(features, targets, self._centers, weights)

    def picture(self) -> CollapsePicture:
        """Angles and spectra of all processes, which must all call this. The spectrum within classes is that of a
        second pass with ``within_scatter``, else of the second moment, else None."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            within = None
            if self.within_scatter and self._centers is not None:
                within = self.scatter / self.counts.sum()
            elif self.second_moment:
                within = within_class_covariance(self._totals(), self.moment)
            return collapse_picture(self._totals(), within, self.global_mean)

    def compute(self) -> dict[str, Tensor]:
        """The measures and ``nonfinite_samples``, the number left out; the same float64 scalars on every process."""
        self._check_outside()
        values = collapse_measures(
            self._totals(),
            moment=self.moment if self.second_moment else None,
            residuals=None if self._centers is None else CenterSums(*(getattr(self, n) for n in CenterSums._fields)),
            global_mean=self.global_mean,
            **self._classifier,
        )
        return {**values, "nonfinite_samples": self.nonfinite}

    def reset(self) -> None:
        """Forget all samples and the centers, and keep the classifier."""
        super().reset()
        self._centers = None
