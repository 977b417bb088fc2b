from collections.abc import Sequence
from typing import ClassVar

from lightning.pytorch import Callback

from lightning_feat.callbacks import FeatureShiftMonitor, FeatureShiftRegularizer, PromptLearner
from lightning_feat.mixins.callbacks import DEFAULTS, CallbacksMixin, Options


class FeatureShiftMixin(CallbacksMixin):
    """For a LightningModule that watches how far its features move from those it started with, or holds them there.

    Attributes:
        feature_shift_monitor: keywords of ``callbacks.FeatureShiftMonitor``; None for none.
        feature_shift_regularizer: of ``callbacks.FeatureShiftRegularizer``; None, the default, for none.
    """

    brings: ClassVar[Sequence[type[Callback]]] = (FeatureShiftMonitor, FeatureShiftRegularizer)
    feature_shift_monitor: Options = DEFAULTS
    feature_shift_regularizer: Options = None


class PromptMixin(CallbacksMixin):
    """For a LightningModule around a CLIP that learns prompts in the place of its weights.

    The prompts are part of a checkpoint, apart from the weights of the module, and come into the network under a
    Trainer: ``trainer.test(module, ckpt_path=...)``, and ``fit``, ``validate`` and ``predict`` likewise.

    Attributes:
        prompt_learner: keywords of ``callbacks.PromptLearner``.
    """

    brings: ClassVar[Sequence[type[Callback]]] = (PromptLearner,)
    prompt_learner: Options = DEFAULTS
