from lightning_feat.callbacks.spectrum.monitor import SpectrumMonitor
from lightning_feat.callbacks.spectrum.regularizer import UniformityRegularizer

__all__ = ["SpectrumMonitor", "UniformityRegularizer"]
