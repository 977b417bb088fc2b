"""What all baselines share: arguments that are checked and recorded, and an optimizer for those who name none."""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from types import FrameType, MethodType
from typing import Any

from lightning import LightningModule

from lightning_feat.joints.arguments import checked_values


class Baseline(LightningModule):
    """A module whose recorded arguments are checked by their annotations, and plain."""

    def save_hyperparameters(self, *args: Any, frame: FrameType | None = None, **kwargs: Any) -> None:
        """As Lightning's; what it records is checked. For an ``__init__`` that would be wrapped by
        ``arguments.checked`` Lightning would not see the arguments of a subclass.
        """
        current = inspect.currentframe()
        frame = frame or (current.f_back if current is not None else None)
        super().save_hyperparameters(*args, frame=frame, **kwargs)
        caller = None if frame is None else frame.f_locals.get("__class__")
        for owner in type(self).__mro__:
            if init := vars(owner).get("__init__"):
                self._hparams.update(checked_values(init, self._hparams, type(self).__name__))
            if owner is caller:
                break  # what stands further up was given by this one
        self._hparams_initial = copy.deepcopy(self._hparams)  # what loggers get


class Default:
    """A ``configure_optimizers`` that counts as Lightning's own until the module is in a Trainer, and refuses to be
    replaced by a whole optimizer where one of its options was given, which would then have no effect.

    ``LightningCLI`` warns before it replaces a ``configure_optimizers`` that somebody wrote, which a default is not;
    it asks before there is a Trainer. The Trainer wants to see one, and asks later. What is set on the instance comes
    first, as for any method; nothing else is kept there, so that copies, pickles and checkpoints carry nothing.

    Args:
        method: makes the optimizer.
        options: names of the arguments of ``__init__`` that it alone reads; None as their value stands for not given.
    """

    def __init__(self, method: Callable[[Any], Any], options: tuple[str, ...]) -> None:
        self.method, self.options, self.__doc__ = method, options, method.__doc__

    def __get__(self, module: LightningModule | None, owner: type[LightningModule]) -> Callable[..., Any]:
        if module is None:
            return self.method
        if "configure_optimizers" in vars(module):
            given: Callable[..., Any] = vars(module)["configure_optimizers"]
            return given
        if module._trainer is not None:
            return MethodType(self.method, module)
        unseen = partial(self.method, module)
        unseen.__wrapped__ = LightningModule.configure_optimizers  # type: ignore[attr-defined]  # what is_overridden reads
        return unseen

    def __set__(self, module: LightningModule, given: Callable[..., Any]) -> None:
        ready = getattr(getattr(given, "__func__", None), "keywords", {}).get("optimizer")
        lost = [f"{name}={module.hparams[name]}" for name in self.options if module.hparams.get(name) is not None]
        if ready is not None and lost:  # LightningCLI has built it already
            name = lost[0].partition("=")[0]
            raise ValueError(
                f"{', '.join(lost)}: this belongs to the default optimizer of {type(module).__name__}, and has no "
                f"effect beside the {type(ready).__name__} that is configured. On the command line give "
                f"--optimizer.{name} in place of --model.{name}, and leave the latter out (or null)."
            )
        vars(module)["configure_optimizers"] = given

    def __delete__(self, module: LightningModule) -> None:
        del vars(module)["configure_optimizers"]


def default_optimizer(*options: str) -> Callable[[Callable[[Any], Any]], Default]:
    """Decorate the ``configure_optimizers`` of a baseline, see ``Default``."""
    return partial(Default, options=options)
