"""What is learned late, shown more often; flat minima, looked for; and probes of what a network relies on, and when."""

from lightning_feat.callbacks.simplicity_bias.curvature import SharpnessMonitor
from lightning_feat.callbacks.simplicity_bias.distributional import DistributionalSimplicityMonitor
from lightning_feat.callbacks.simplicity_bias.forgetting import ForgettingMonitor
from lightning_feat.callbacks.simplicity_bias.reliance import FeatureRelianceMonitor
from lightning_feat.callbacks.simplicity_bias.sharpness import SharpnessAwareMinimization
from lightning_feat.callbacks.simplicity_bias.upsampler import SimplicityBiasUpsampler

__all__ = [
    "DistributionalSimplicityMonitor",
    "FeatureRelianceMonitor",
    "ForgettingMonitor",
    "SharpnessAwareMinimization",
    "SharpnessMonitor",
    "SimplicityBiasUpsampler",
]
