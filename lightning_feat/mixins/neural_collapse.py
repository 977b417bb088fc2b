from collections.abc import Sequence
from typing import ClassVar

from lightning.pytorch import Callback

from lightning_feat.callbacks import (
    ClassNormRealignment,
    DotRegressionRegularizer,
    MixupGeometryMonitor,
    NeuralCollapseMonitor,
    NeuralCollapseRegularizer,
    RegressionCollapseMonitor,
    SimplexETFHead,
)
from lightning_feat.mixins.callbacks import DEFAULTS, CallbacksMixin, Options


class NeuralCollapseMixin(CallbacksMixin):
    """For a LightningModule that watches how far its features have collapsed, or holds collapse back.

    Attributes:
        neural_collapse_monitor: keywords of ``callbacks.NeuralCollapseMonitor``; None for none.
        neural_collapse_regularizer: of ``callbacks.NeuralCollapseRegularizer``; and the next three of the callbacks of
            their names. None, the default, for none.
        mixup_geometry_monitor: see above.
        regression_collapse_monitor: see above.
        class_norm_realignment: see above.
    """

    brings: ClassVar[Sequence[type[Callback]]] = (
        NeuralCollapseMonitor,
        NeuralCollapseRegularizer,
        MixupGeometryMonitor,
        RegressionCollapseMonitor,
        ClassNormRealignment,
    )
    neural_collapse_monitor: Options = DEFAULTS
    neural_collapse_regularizer: Options = None
    mixup_geometry_monitor: Options = None
    regression_collapse_monitor: Options = None
    class_norm_realignment: Options = None


class SimplexETFMixin(CallbacksMixin):
    """For a LightningModule whose classifier is a fixed simplex, towards which its features are trained.

    Attributes:
        simplex_etf_head: keywords of ``callbacks.SimplexETFHead``; None for a head that the module has already.
        dot_regression_regularizer: of ``callbacks.DotRegressionRegularizer``; None, the default, leaves the loss as it
            is.
    """

    brings: ClassVar[Sequence[type[Callback]]] = (SimplexETFHead, DotRegressionRegularizer)
    simplex_etf_head: Options = DEFAULTS
    dot_regression_regularizer: Options = None
