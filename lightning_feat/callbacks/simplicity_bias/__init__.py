"""What is learned late, shown more often; and flat minima, looked for."""

from lightning_feat.callbacks.simplicity_bias.sharpness import SharpnessAwareMinimization
from lightning_feat.callbacks.simplicity_bias.upsampler import SimplicityBiasUpsampler

__all__ = ["SharpnessAwareMinimization", "SimplicityBiasUpsampler"]
