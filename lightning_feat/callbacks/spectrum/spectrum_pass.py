from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import normalize

from lightning_feat.functional.common.class_sums import to_float64
from lightning_feat.functional.common.lengths import tamed
from lightning_feat.functional.common.lots import lowest_lots
from lightning_feat.functional.spectrum import (
    MomentSums,
    add_moment_sums_,
    channel_energy,
    covariance_spectrum,
    effective_rank,
    empty_moment_sums,
    gaussian_uniformity,
    koleo,
    spectral_decay,
    tolerance,
    wasserstein_uniformity_of_sums,
)
from lightning_feat.functional.transfer import direction_sums
from lightning_feat.joints.data.processes import gather_samples
from lightning_feat.joints.data.shared_pass import Again
from lightning_feat.joints.features.batches import class_indices, mask_of, targets_of
from lightning_feat.joints.features.taps import FeatureTap

if TYPE_CHECKING:
    from lightning_feat.callbacks.spectrum.monitor import SpectrumMonitor

_NO_CLASS = -100


class LayerSpectrum:
    """What a pass has made of one layer.

    Attributes:
        moments: of the features of all processes, after the pass.
        directions: of the features divided by their lengths.
        sample: ``(n, D)`` of them, drawn by the seed, and the class indices of these.
        lost: rows that were not finite and are left out, of ``seen``.
    """

    def __init__(self, wants_directions: bool, most: int, seed: int) -> None:
        self.moments: MomentSums | None = None
        self.directions: MomentSums | None = None
        self.sample, self.classes = torch.zeros(0, 1), torch.zeros(0, dtype=torch.long)
        self.lost, self.seen = 0, 0
        self._wants_directions, self._most, self._seed = wants_directions, most, seed
        self._places = torch.zeros(0, dtype=torch.long)

    def add(self, features: Tensor, classes: Tensor | None, places: Tensor) -> None:
        """Add rows ``(N, D)``, with class indices ``(N,)`` or none, and which rows of the whole data they are."""
        finite = features.isfinite().all(1)
        self.seen += len(features)
        self.lost += int((~finite).sum())
        h, places = features[finite], places.to(features.device)[finite]
        t = torch.full_like(places, _NO_CLASS) if classes is None else classes.to(h.device)[finite]
        wide = to_float64(h)
        if self.moments is None:
            self.moments = empty_moment_sums(h.shape[1], wide.device)
            self.directions = empty_moment_sums(h.shape[1], wide.device) if self._wants_directions else None
            self.sample, self.classes, self._places = h[:0], t[:0], places[:0]
        add_moment_sums_(self.moments, wide)
        if self.directions is not None:
            add_moment_sums_(self.directions, normalize(tamed(wide)[0], dim=1))
        if self._most:
            self._keep(torch.cat([self.sample, h]), torch.cat([self.classes, t]), torch.cat([self._places, places]))

    def join(self, trainer: Trainer, device: torch.device) -> None:
        """Put together what the processes have, on all of them."""
        if trainer.world_size == 1:
            return
        own = torch.tensor(0 if self.moments is None else len(self.moments.sums), device=device)
        width = int(trainer.strategy.reduce(own, reduce_op="max"))
        if width and self.moments is None:  # a process without samples
            self.moments = empty_moment_sums(width, device)
            self.directions = empty_moment_sums(width, device) if self._wants_directions else None
            self.sample = torch.zeros(0, width, device=device)
            self.classes = self._places = torch.zeros(0, dtype=torch.long, device=device)
        add: Callable[[Tensor], Any] = lambda value: trainer.strategy.reduce(value, reduce_op="sum")  # noqa: E731
        if self.moments is not None:
            self.moments = MomentSums(*(add(value) for value in self.moments))
        if self.directions is not None:
            self.directions = MomentSums(*(add(value) for value in self.directions))
        counts = add(torch.tensor([self.lost, self.seen], device=device))
        self.lost, self.seen = (int(count) for count in counts)
        if self._most and width:
            self._keep(*gather_samples(self.sample, self.classes, self._places))

    def _keep(self, features: Tensor, classes: Tensor, places: Tensor) -> None:
        kept = lowest_lots(places, self._most, self._seed)
        self.sample, self.classes, self._places = features[kept], classes[kept], places[kept]


class SpectrumReading:
    """A reading for ``shared_pass``: moments and a sample of each layer.

    Attributes:
        layers: by the label of the tap.
    """

    title = "Spectrum"

    def __init__(self, trainer: Trainer, module: LightningModule, monitor: "SpectrumMonitor") -> None:
        self._trainer, self._module, self._monitor = trainer, module, monitor
        self.taps: Sequence[FeatureTap] = monitor.taps
        directions = "wasserstein_uniformity" in monitor.measures
        most = monitor.max_samples if {*monitor.measures} & {*OF_SAMPLE} else 0
        self.layers = {tap.label: LayerSpectrum(directions, most, monitor.seed) for tap in self.taps}
        self._rows = dict.fromkeys(self.layers, 0)

    def take(self, batch: Any) -> None:
        monitor, world, rank = self._monitor, self._trainer.world_size, self._trainer.global_rank
        mask = mask_of(batch, monitor.mask_key)
        for tap, layer in zip(self.taps, self.layers.values(), strict=True):
            features = tap.take(mask)
            tokens = tap.pooling == "tokens"
            classes = None
            if "tolerance" in monitor.measures:
                where = f"the targets for layer {tap.label}"
                classes = class_indices(targets_of(batch, monitor.target_key), len(features), where, not tokens)
                classes = classes.to(features.device)
                classes = classes.masked_fill(classes == monitor.ignore_index, _NO_CLASS)
            first = self._rows[tap.label]
            self._rows[tap.label] += len(features)
            places = rank + world * torch.arange(first, first + len(features))
            if tokens and mask is not None:
                counts = mask.to(features.device).flatten()
                features, places = features[counts], places[counts.cpu()]
                classes = None if classes is None else classes[counts]
            layer.add(features, classes, places)

    def finish(self, again: Again) -> None:
        for layer in self.layers.values():
            layer.join(self._trainer, self._module.device)


def _of_moments(measure: Callable[[Tensor], Tensor], centered: bool = True) -> Callable[[LayerSpectrum], Tensor]:
    def value(layer: LayerSpectrum) -> Tensor:
        return measure(covariance_spectrum(layer.moments, centered)) if layer.moments is not None else _nan()

    return value


def _nan() -> Tensor:
    return torch.tensor(torch.nan, dtype=torch.float64)


def _of_classes(layer: LayerSpectrum) -> Tensor:
    known = layer.classes >= 0
    if not known.any():
        return _nan()
    _, index = layer.classes[known].unique(return_inverse=True)
    return tolerance(direction_sums(layer.sample[known], index, int(index.max()) + 1))


OF_MOMENTS: dict[str, Callable[[LayerSpectrum], Tensor]] = {
    "effective_rank": _of_moments(lambda spectrum: effective_rank(spectrum.sqrt())),
    "rankme": _of_moments(lambda spectrum: effective_rank(spectrum.sqrt()), centered=False),
    "decay": _of_moments(lambda spectrum: spectral_decay(spectrum).exponent),
    "wasserstein_uniformity": lambda layer: (
        _nan() if layer.directions is None else wasserstein_uniformity_of_sums(layer.directions)
    ),
    "channel_energy": lambda layer: _nan() if layer.moments is None else channel_energy(layer.moments),
}
OF_SAMPLE: dict[str, Callable[[LayerSpectrum], Tensor]] = {
    "gaussian_uniformity": lambda layer: gaussian_uniformity(layer.sample),
    "koleo": lambda layer: koleo(layer.sample),
    "tolerance": _of_classes,
}
