"""What adds up over batches and over processes, around the functions of ``functional``."""

from lightning_feat.metrics.grassmann import OrthonormalityError, SubspaceAngle, SubspaceDistance
from lightning_feat.metrics.neural_collapse import ClassDistanceNormalizedVariance, NeuralCollapse
from lightning_feat.metrics.spectrum import EffectiveRank, RankMe, SpectrumDecay, WassersteinUniformity
from lightning_feat.metrics.transfer import ClassSeparation, WithinClassVariability

__all__ = [
    "ClassDistanceNormalizedVariance",
    "ClassSeparation",
    "EffectiveRank",
    "NeuralCollapse",
    "OrthonormalityError",
    "RankMe",
    "SpectrumDecay",
    "SubspaceAngle",
    "SubspaceDistance",
    "WassersteinUniformity",
    "WithinClassVariability",
]
