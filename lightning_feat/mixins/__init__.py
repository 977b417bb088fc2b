"""What the callbacks do, for LightningModules that you write yourself."""

from lightning_feat.mixins.callbacks import CallbacksMixin
from lightning_feat.mixins.feature_shift import FeatureShiftMixin, PromptMixin
from lightning_feat.mixins.grassmann import GrassmannMixin
from lightning_feat.mixins.loss_terms import LossTermsMixin
from lightning_feat.mixins.neural_collapse import NeuralCollapseMixin, SimplexETFMixin
from lightning_feat.mixins.simplicity_bias import SimplicityBiasMixin
from lightning_feat.mixins.spectrum import SpectrumMixin

__all__ = [
    "CallbacksMixin",
    "FeatureShiftMixin",
    "GrassmannMixin",
    "LossTermsMixin",
    "NeuralCollapseMixin",
    "PromptMixin",
    "SimplexETFMixin",
    "SimplicityBiasMixin",
    "SpectrumMixin",
]
