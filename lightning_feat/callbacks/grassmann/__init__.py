"""Classes as subspaces."""

from lightning_feat.callbacks.grassmann.head import GrassmannHead
from lightning_feat.callbacks.grassmann.monitor import GrassmannMonitor

__all__ = ["GrassmannHead", "GrassmannMonitor"]
