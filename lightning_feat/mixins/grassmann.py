from collections.abc import Sequence
from typing import ClassVar

from lightning.pytorch import Callback

from lightning_feat.callbacks import GrassmannHead, GrassmannMonitor
from lightning_feat.mixins.callbacks import DEFAULTS, CallbacksMixin, Options


class GrassmannMixin(CallbacksMixin):
    """For a LightningModule whose classifier makes classes subspaces, kept on their manifold by its own optimizer.

    Attributes:
        grassmann_head: keywords of ``callbacks.GrassmannHead``; None for a head that the module has already.
        grassmann_monitor: keywords of ``callbacks.GrassmannMonitor``; None, the default, for none.

    Example:
        >>> from lightning.pytorch import LightningModule
        >>> class Mine(GrassmannMixin, LightningModule):
        ...     grassmann_head = {"subspace_dim": 4}
        >>> [type(callback).__name__ for callback in Mine().configure_callbacks()]
        ['GrassmannHead']
    """

    brings: ClassVar[Sequence[type[Callback]]] = (GrassmannHead, GrassmannMonitor)
    grassmann_head: Options = DEFAULTS
    grassmann_monitor: Options = None
