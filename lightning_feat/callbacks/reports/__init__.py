"""Curves and tables of a run."""

from lightning_feat.callbacks.reports.curves import CurvePlotter, Panel
from lightning_feat.callbacks.reports.features import FeatureReport
from lightning_feat.callbacks.reports.history import MetricHistory
from lightning_feat.callbacks.reports.summary import SummaryTable

__all__ = ["CurvePlotter", "FeatureReport", "MetricHistory", "Panel", "SummaryTable"]
