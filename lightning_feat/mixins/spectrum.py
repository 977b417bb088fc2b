from collections.abc import Sequence
from typing import ClassVar

from lightning.pytorch import Callback

from lightning_feat.callbacks import SpectrumMonitor, UniformityRegularizer
from lightning_feat.mixins.callbacks import DEFAULTS, CallbacksMixin, Options


class SpectrumMixin(CallbacksMixin):
    """For a LightningModule whose features are watched for the directions that they use, or spread over the sphere.

    Attributes:
        spectrum_monitor: keywords of ``callbacks.SpectrumMonitor``; None for none.
        uniformity_regularizer: of ``callbacks.UniformityRegularizer``; None, the default, for none.
    """

    brings: ClassVar[Sequence[type[Callback]]] = (SpectrumMonitor, UniformityRegularizer)
    spectrum_monitor: Options = DEFAULTS
    uniformity_regularizer: Options = None
