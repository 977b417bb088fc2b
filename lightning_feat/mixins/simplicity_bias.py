from collections.abc import Sequence
from typing import ClassVar

from lightning.pytorch import Callback

from lightning_feat.callbacks import SimplicityBiasUpsampler
from lightning_feat.mixins.callbacks import DEFAULTS, CallbacksMixin, Options


class SimplicityBiasMixin(CallbacksMixin):
    """For a LightningModule that shows the examples it learns late more often.

    Attributes:
        simplicity_bias_upsampler: keywords of ``callbacks.SimplicityBiasUpsampler``.
    """

    brings: ClassVar[Sequence[type[Callback]]] = (SimplicityBiasUpsampler,)
    simplicity_bias_upsampler: Options = DEFAULTS
