"""Plain LightningModules, for the recipes to train. They know nothing of the rest of this library."""

from lightning_feat.baselines.clip import SmallClip
from lightning_feat.baselines.clip_classifier import ClipClassifier
from lightning_feat.baselines.clip_pretraining import SmallClipPretraining
from lightning_feat.baselines.cubic_cnn import CubicCNN
from lightning_feat.baselines.mlp_classifier import MLPClassifier
from lightning_feat.baselines.timm_classifier import TimmClassifier
from lightning_feat.baselines.unconstrained_features import UnconstrainedFeatures

__all__ = [
    "ClipClassifier",
    "CubicCNN",
    "MLPClassifier",
    "SmallClip",
    "SmallClipPretraining",
    "TimmClassifier",
    "UnconstrainedFeatures",
]
