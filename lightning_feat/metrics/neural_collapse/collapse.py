"""Neural collapse of everything seen since ``reset``, exact over batches and processes: the state is sums.

Shapes: N samples, D features, C classes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn

from lightning_feat.functional.common.class_sums import GlobalMean
from lightning_feat.functional.common.second_pass import CenterSums, ClassCenters, center_sums, class_centers
from lightning_feat.functional.neural_collapse import (
    CollapsePicture,
    class_distance_normalized_variance,
    collapse_measures,
    collapse_picture,
    within_class_covariance,
    within_class_scatter,
)
from lightning_feat.functional.neural_collapse.measures import GROWS_WITH_COLLAPSE
from lightning_feat.joints.arguments import checked
from lightning_feat.metrics.common import ClassSumsMetric
from lightning_feat.metrics.neural_collapse.needs import NEED_RESIDUALS, how_to_know, why_undefined


class ClassDistanceNormalizedVariance(ClassSumsMetric):
    """CDNV of everything seen since ``reset``, exact over batches and processes; the formula is in ``functional``.

    Keeps sums, not samples: ``8 * C * (D + 2)`` bytes, and as many for what ``reset`` restores.

    Args:
        num_classes: number of classes C, counting those without samples.
        num_features: width D of the features.
        **kwargs: those of ``torchmetrics.Metric``. A ``dist_sync_fn`` must suit states that are sums.

    Example:
        >>> features = torch.tensor([[0.0], [2.0], [4.0], [6.0]])  # class means 1 and 5, variance 1 around each
        >>> metric = ClassDistanceNormalizedVariance(num_classes=2, num_features=1)
        >>> metric(features, torch.tensor([0, 0, 1, 1]))
        tensor(0.0625, dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    def compute(self) -> Tensor:
        """CDNV, the same scalar on every process."""
        self._check_outside()
        return class_distance_normalized_variance(self._totals())


class NeuralCollapse(ClassSumsMetric):
    """Measures of :func:`~lightning_feat.functional.neural_collapse.collapse_measures`: all as one dictionary, or one.

    One pass gives NC1 by quotient, CDNV and NC2; with ``second_moment`` also NC1 by pseudo-inverse and VCI; with
    :meth:`set_classifier` also NC0 and NC3. For nearest-mean accuracy, NC4, NC1 by pseudo-inverse without a ``(D, D)``
    matrix, and what is small beside the rounding of sums, run over the same samples again between
    :meth:`start_second_pass` and ``compute``.

    With ``measures="cdnv"`` it is a metric of one number, for ``self.log``, ``MetricTracker`` and the wrappers of
    torchmetrics; several of them, of the same classes and features, share their sums in a ``MetricCollection``, which
    ``self.log_dict`` takes.

    Keeps sums, not samples: ``8 * C * (D + 4)`` bytes, with ``second_moment`` ``8 * D^2`` more; torchmetrics holds as
    many again for ``reset``. At C = 1000, D = 2048 that is 16 MB (twice), with the second moment 50 MB (twice). To
    synchronise, a process receives one copy of the state. A batch of 128 takes 0.08 ms at C = 10, D = 512 and 0.25 ms
    at 1000 x 2048 on one CPU core, with the second moment 1.6 and 43 ms. Call ``update``, not the metric itself: its
    ``forward`` computes all measures at every batch.

    Args:
        num_classes: number of classes C, counting those without samples.
        num_features: width D of the features.
        second_moment: whether to keep the ``(D, D)`` second moment.
        global_mean: what class means are centred by: the mean of the class means, or of all samples.
        within_scatter: whether the second pass keeps the ``(D, D)`` scatter within classes, for :meth:`picture` and a
            VCI without the rounding of the second moment.
        measures: names of the measures to make, None for all; the others cost no time. The name of a single one makes
            ``compute`` give that number alone.
        **kwargs: those of ``torchmetrics.Metric``. A ``dist_sync_fn`` must suit states that are sums.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 0.0], [6.0, 0.0]])
        >>> metric = NeuralCollapse(num_classes=2, num_features=2)
        >>> metric.update(features, torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()["nc1_quotient"]  # spread 1 within the classes, 17 / 4 between them
        tensor(0.2353, dtype=torch.float64)
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor
    moment: Tensor
    scatter: Tensor
    samples: Tensor
    mismatches: Tensor
    hits: Tensor
    projected: Tensor
    residual_squares: Tensor

    @checked
    def __init__(
        self,
        num_classes: int,
        num_features: int,
        second_moment: bool = False,
        global_mean: GlobalMean = "classes",
        within_scatter: bool = False,
        measures: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if global_mean not in ("classes", "samples"):
            raise ValueError(f"global_mean must be 'classes' or 'samples', got {global_mean!r}")
        names = [measures] if isinstance(measures, str) else measures
        if names is not None and not {*names} <= GROWS_WITH_COLLAPSE.keys():
            raise ValueError(f"measures={measures!r}: choose from {', '.join(GROWS_WITH_COLLAPSE)}")
        # The second pass and the classifier change the result without an `update`, so no result is kept.
        super().__init__(num_classes, num_features, **{"compute_with_cache": False, **kwargs})
        self.second_moment, self.global_mean, self.within_scatter = second_moment, global_mean, within_scatter
        self.measures = measures
        for name, kept in (("moment", second_moment), ("scatter", within_scatter)):
            if kept:
                self._add_sum(name, self.num_features, self.num_features)
        for name in ("samples", "mismatches", "hits"):
            self._add_sum(name)
        for name in ("projected", "residual_squares"):
            self._add_sum(name, self.num_classes)
        self._centers: ClassCenters | None = None
        self._classifier: dict[str, Tensor] = {}
        self._said: set[str] = set()

    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]
        """Of a single measure, whether it grows as the network collapses; None for a dictionary of them."""
        return GROWS_WITH_COLLAPSE[self.measures] if isinstance(self.measures, str) else None

    def set_classifier(
        self, weight: Tensor | None = None, bias: Tensor | None = None, basis: Tensor | None = None
    ) -> None:
        """Compare with this classifier from now on: ``weight`` ``(C, D)`` and ``bias`` ``(C,)``, or a Grassmann
        ``basis`` ``(C, k, D)``. Nothing is copied: steps of an optimizer that work in place are seen by ``compute``.
        """
        given = {"weight": weight, "bias": bias, "basis": basis}
        self._classifier = {name: value.detach() for name, value in given.items() if value is not None}

    def _apply(self, fn: Callable[..., Tensor], exclude_state: Any = "") -> Module:
        moved = super()._apply(fn, exclude_state)
        if self._centers is not None:
            self._centers = ClassCenters(*(value.to(self.counts.device) for value in self._centers))
        return moved

    def _refuse_in_second_pass(self, what: str) -> None:
        if self._centers is not None:
            raise RuntimeError(f"the second pass has started: call reset() before {what}")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch of the first pass, and give the measures of this batch alone."""
        self._refuse_in_second_pass("the first pass of the next round")
        return super().forward(*args, **kwargs)

    def update(self, features: Tensor, targets: Tensor, repeated: Tensor | None = None) -> None:
        """Add a batch of the first pass, see :meth:`ClassSumsMetric.update`.

        Raises:
            RuntimeError: after :meth:`start_second_pass`.
        """
        self._refuse_in_second_pass("the first pass of the next round")
        super().update(features, targets, repeated)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the sums of another metric, both before their second pass.

        Raises:
            RuntimeError: where one has begun it: its residuals belong to the class means of its own samples.
            ValueError: if its states have other names or shapes.
        """
        self._refuse_in_second_pass("it is merged with another")
        if isinstance(incoming_state, NeuralCollapse):
            incoming_state._refuse_in_second_pass("it is merged into another")
        super().merge_state(incoming_state)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._centers = None  # they are in no state dict

    def _add(self, features: Tensor, targets: Tensor, weights: Tensor | None) -> None:
        super()._add(features, targets, weights)
        if self.second_moment:
            self.moment.addmm_(features.T, features)  # what does not count is zero by now

    def start_second_pass(self) -> None:
        """Fix the class means of all processes, which must all call this, and start the second pass anew."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            self._check_outside()
            self._centers = class_centers(self._totals(), self.global_mean, self._rounding())
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
            return collapse_picture(self._totals(), within, self.global_mean, rounding=self._rounding())

    def compute(self) -> Any:
        """The same float64 numbers on every process: a dictionary of the measures and ``nonfinite_samples``, the
        number left out; or the one that was asked for.

        Raises:
            RuntimeError: if what was asked for needs a second pass or a classifier that was not given.
        """
        self._check_outside()
        has_residuals = self._centers is not None
        values = collapse_measures(
            self._totals(),
            moment=self.moment if self.second_moment else None,
            residuals=CenterSums(*(getattr(self, name) for name in CenterSums._fields)) if has_residuals else None,
            scatter=self.scatter if self.within_scatter and has_residuals else None,
            global_mean=self.global_mean,
            rounding=self._rounding(),
            measures=[self.measures] if isinstance(self.measures, str) else self.measures,
            **self._classifier,
        )
        if has_residuals and self._has_other_samples():
            values = self._without_residuals(values)
        if why := why_undefined(values, self.counts, self.num_features):
            self._say(f"neural collapse: {why}")
        if not isinstance(self.measures, str):
            return {**values, "nonfinite_samples": self.nonfinite}
        if self.measures not in values:
            sizes = self.num_classes, self.num_features, self.second_moment
            raise RuntimeError(f"{self.measures} is not known yet: {how_to_know(self.measures, *sizes)}")
        return values[self.measures]

    def _has_other_samples(self) -> bool:
        """Whether the second pass had more or fewer samples than the first."""
        total = self.counts.sum()
        whole = bool((self.counts == self.counts.round()).all())
        slack = 0.0 if whole else 2e-2  # a row of soft targets sums to one up to this, see check_values
        return bool((self.samples - total).abs() > slack * total)

    def _without_residuals(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        self._say(
            f"neural collapse: the second pass has had {float(self.samples):g} samples, the first "
            f"{float(self.counts.sum()):g}. What needs it is nan: run it over the same samples."
        )
        spoilt = NEED_RESIDUALS | {"nc1_quotient", "nc1_quotient_balanced", "cdnv", "cdnv_worst_pair"}
        spoilt |= {"vci"} if self.within_scatter else set()
        return {name: torch.full_like(value, torch.nan) if name in spoilt else value for name, value in values.items()}

    def _say(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            rank_zero_warn(sentence)

    def reset(self) -> None:
        """Forget all samples and the centers, and keep the classifier."""
        super().reset()
        self._centers = None
