from collections.abc import Sequence
from typing import ClassVar

from lightning.pytorch import Callback

from lightning_feat.callbacks import (
    DistributionalSimplicityMonitor,
    FeatureRelianceMonitor,
    ForgettingMonitor,
    SharpnessAwareMinimization,
    SharpnessMonitor,
    SimplicityBiasUpsampler,
)
from lightning_feat.mixins.callbacks import DEFAULTS, CallbacksMixin, Options


class SimplicityBiasMixin(CallbacksMixin):
    """For a LightningModule that shows the examples it learns late more often, looks for flat minima, or is probed.

    Attributes:
        simplicity_bias_upsampler: keywords of ``callbacks.SimplicityBiasUpsampler``; None for none.
        sharpness_aware_minimization: of ``callbacks.SharpnessAwareMinimization``; None, the default, for none.
        distributional_simplicity_monitor: of ``callbacks.DistributionalSimplicityMonitor``, likewise.
        feature_reliance_monitor: of ``callbacks.FeatureRelianceMonitor``, likewise.
        forgetting_monitor: of ``callbacks.ForgettingMonitor``, likewise.
        sharpness_monitor: of ``callbacks.SharpnessMonitor``, likewise.
    """

    brings: ClassVar[Sequence[type[Callback]]] = (
        SimplicityBiasUpsampler,
        SharpnessAwareMinimization,
        DistributionalSimplicityMonitor,
        FeatureRelianceMonitor,
        ForgettingMonitor,
        SharpnessMonitor,
    )
    simplicity_bias_upsampler: Options = DEFAULTS
    sharpness_aware_minimization: Options = None
    distributional_simplicity_monitor: Options = None
    feature_reliance_monitor: Options = None
    forgetting_monitor: Options = None
    sharpness_monitor: Options = None
