from collections.abc import Sequence
from typing import ClassVar

from lightning.pytorch import Callback

from lightning_feat.callbacks import SharpnessAwareMinimization, SimplicityBiasUpsampler
from lightning_feat.mixins.callbacks import DEFAULTS, CallbacksMixin, Options


class SimplicityBiasMixin(CallbacksMixin):
    """For a LightningModule that shows the examples it learns late more often, or looks for flat minima.

    Attributes:
        simplicity_bias_upsampler: keywords of ``callbacks.SimplicityBiasUpsampler``; None for none.
        sharpness_aware_minimization: of ``callbacks.SharpnessAwareMinimization``; None, the default, for none.
    """

    brings: ClassVar[Sequence[type[Callback]]] = (SimplicityBiasUpsampler, SharpnessAwareMinimization)
    simplicity_bias_upsampler: Options = DEFAULTS
    sharpness_aware_minimization: Options = None
