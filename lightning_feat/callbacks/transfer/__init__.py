"""How well features serve for other tasks."""

from lightning_feat.callbacks.transfer.few_shot import FewShotMonitor
from lightning_feat.callbacks.transfer.linear_probe import LinearProbe

__all__ = ["FewShotMonitor", "LinearProbe"]
