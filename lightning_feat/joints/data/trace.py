"""Run a network in the middle of a fit so that nothing of it is left: neither in the module nor in what was logged."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_feat.joints.features.kept import remember
from lightning_feat.joints.module.wraps import add_link, remove_link

_KEY = "pass without a trace"


@contextmanager
def without_trace(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Eval mode and no gradient; at the end all is put back that a forward or a step may write: the random number
    generators, every train or eval flag, buffers, states of metrics, and plain attributes (numbers, tensors, lists,
    dictionaries). What ``self.log`` is given inside is dropped, and loggers hear nothing.

    ``no_grad`` and not ``inference_mode``: tensors made under the latter cannot be updated in place later.
    """
    modes = [(part, part.training) for part in module.modules()]
    stage = trainer.state.stage
    put_back = remember(module)
    try:
        trainer.state.stage = RunningStage.VALIDATING  # a hook of the module that mixes training batches asks for it
        module.eval()
        with isolate_rng(), torch.no_grad(), unheard(trainer, module):
            yield
    finally:
        trainer.state.stage = stage
        for part, training in modes:
            part.training = training
        put_back()


@contextmanager
def unheard(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Nothing inside is logged."""
    loggers: list[Any] = trainer.loggers
    with ExitStack() as stack:
        for part in module.modules():  # a module that holds another logs by that one's method too
            if isinstance(getattr(part, "_current_fx_name", part), (str, type(None))):
                stack.enter_context(silent_log(part))
        if loggers:
            stack.callback(setattr, trainer, "loggers", loggers)
            trainer.loggers = [DummyLogger() for _ in loggers]
        yield


@contextmanager
def silent_log(module: Any) -> Iterator[None]:
    """Inside, ``log`` and ``log_dict`` of this LightningModule do nothing."""
    try:
        for method in ("log", "log_dict"):
            add_link(module, method, _KEY, _nothing)
        yield
    finally:
        for method in ("log", "log_dict"):
            remove_link(module, method, _KEY)


def _nothing(module: LightningModule, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    return None
