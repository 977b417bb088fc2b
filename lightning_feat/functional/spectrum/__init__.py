"""How many directions features use, and how evenly: spectra, ranks and uniformity."""

from lightning_feat.functional.common.effective_rank import effective_rank
from lightning_feat.functional.spectrum.decay import SpectralDecay, spectral_decay
from lightning_feat.functional.spectrum.moments import (
    MomentSums,
    add_moment_sums_,
    covariance,
    covariance_spectrum,
    empty_moment_sums,
    moment_sums,
)
from lightning_feat.functional.spectrum.ranks import lidar, rankme
from lightning_feat.functional.spectrum.uniformity import (
    alignment,
    channel_energy,
    gaussian_uniformity,
    hyperspherical_energy,
    koleo,
    tolerance,
    wasserstein_uniformity,
    wasserstein_uniformity_of_sums,
)

__all__ = [
    "MomentSums",
    "SpectralDecay",
    "add_moment_sums_",
    "alignment",
    "channel_energy",
    "covariance",
    "covariance_spectrum",
    "effective_rank",
    "empty_moment_sums",
    "gaussian_uniformity",
    "hyperspherical_energy",
    "koleo",
    "lidar",
    "moment_sums",
    "rankme",
    "spectral_decay",
    "tolerance",
    "wasserstein_uniformity",
    "wasserstein_uniformity_of_sums",
]
