"""One page about the features of a network: what they look like, and what that means."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_feat.report.writing import FeaturePage, feature_report

__all__ = ["FeaturePage", "feature_report"]


def __getattr__(name: str) -> Any:
    if name not in __all__:  # else at first use: the command line refuses a mistake before torch is imported
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import lightning_feat.report.writing as made

    return getattr(made, name)
