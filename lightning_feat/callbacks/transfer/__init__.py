"""How well features serve for other tasks."""

from lightning_feat.callbacks.transfer.few_shot import FewShotMonitor
from lightning_feat.callbacks.transfer.linear_probe import LinearProbe
from lightning_feat.callbacks.transfer.nearest_mean_probe import NearestMeanProbe
from lightning_feat.callbacks.transfer.neighbour_probe import NeighbourProbe
from lightning_feat.callbacks.transfer.svm_probe import LinearSVMProbe

__all__ = ["FewShotMonitor", "LinearProbe", "LinearSVMProbe", "NearestMeanProbe", "NeighbourProbe"]
