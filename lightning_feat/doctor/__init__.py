"""Tries a run before it is started, and says in plain sentences what is wrong with it, or will be."""

from lightning_feat.doctor.examination import doctor
from lightning_feat.doctor.finding import Finding, as_text

__all__ = ["Finding", "as_text", "doctor"]
