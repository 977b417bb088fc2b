"""What is learned late, shown more often."""

from lightning_feat.callbacks.simplicity_bias.upsampler import SimplicityBiasUpsampler

__all__ = ["SimplicityBiasUpsampler"]
