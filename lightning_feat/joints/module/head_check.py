"""Check in the first training step that a layer is the classifier: that it makes what the loss gets, and alone."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_feat.joints.features.heads import is_compiled
from lightning_feat.joints.features.last_layers import LastLayers, LossCall
from lightning_feat.joints.module.wraps import add_link, remove_link

_KEY = "head_check"
_OF_CLASSES = ("cross_entropy", "nll_loss", "multi_margin_loss")
_ROUNDING = 1e-2  # of half precision, in a row of targets that sums to one


class Asks(NamedTuple):
    """What a callback wants to know of its head."""

    owner: str  # the callback, for errors
    head: str  # dotted name
    argument: str = "layer"  # by which its user names another
    only_reads: bool = False  # a monitor: it warns
    classes: bool = True  # whether it must be a head of classes, one of which is right
    signed: bool = True  # whether its logits can be negative
    named: bool = False  # whether its user named it, as one head of several, say

    def say(self, what: str) -> None:
        """Raise it, or warn of it."""
        if not self.only_reads:
            raise ValueError(what)
        warnings.warn(f"{self.owner}: {what}", stacklevel=2)


def check_head(module: LightningModule, asks: Asks) -> None:
    """Let the next training step check a head. What contradicts is a ``ValueError`` there, for a monitor a warning."""
    add_link(module, "training_step", f"{_KEY}:{asks.owner}:{asks.head}", _Check(asks))


def forget_check(module: LightningModule, owner: str) -> None:
    """Take away the checks of this callback that did not come to pass."""
    for key in [*_keys(module)]:
        if key.startswith(f"{_KEY}:{owner}:"):
            remove_link(module, "training_step", key)


def _keys(module: LightningModule) -> list[str]:
    wrap = module.__dict__.get("_feat_wraps", {}).get("training_step")
    return [] if wrap is None else list(wrap.links)


class _Check:
    def __init__(self, asks: Asks) -> None:
        self.asks, self.done = asks, False

    def __call__(self, module: LightningModule, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.done or _has_compiled_code(module):  # which is not followed
            return call(*args, **kwargs)
        self.done = True
        forget_check(module, self.asks.owner)
        with LastLayers(module, self.asks.head).following() as follower:
            out = call(*args, **kwargs)
        loss = out.get("loss") if isinstance(out, dict) else out
        said = _contradiction(self.asks, follower.calls, follower.of(loss) if isinstance(loss, Tensor) else frozenset())
        if said:
            self.asks.say(said)
        return out


def _has_compiled_code(module: LightningModule) -> bool:
    return any(
        is_compiled(part) or any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(part).values())
        for part in module.modules()
    )


def _contradiction(asks: Asks, calls: list[LossCall], of_loss: frozenset[str]) -> str | None:
    """What the step showed against this head; None where it showed nothing against it."""
    seen = [call for call in calls if call.layers]
    of_classes = [call for call in seen if call.function in _OF_CLASSES]
    mine = [call for call in seen if all(_within(name, asks.head) for name in call.layers)]
    if mine:
        return _not_of_classes(asks, mine[0]) if asks.classes and not any(call in of_classes for call in mine) else None
    shared = [call for call in seen if any(_within(name, asks.head) for name in call.layers)]
    if shared:
        others = sorted(name for name in shared[0].layers if not _within(name, asks.head))
        return (
            f"the logits are made by {asks.head} together with {', '.join(others[:4])}: {asks.owner} can stand for one "
            "head alone. Let the model use one, or put the layers together."
        )
    last = sorted(frozenset().union(*(call.layers for call in of_classes or seen)))
    if not last or ((asks.named or not of_classes) and any(_within(name, asks.head) for name in of_loss)):
        return None  # a loss of another kind is made of this head: nothing is known against it
    return (
        f"{asks.head} is not the layer that makes the logits: {', '.join(last[:4])} ran after it, or in its place, on "
        f"the way to the loss. Name the one that does (argument `{asks.argument}`)."
    )


def _not_of_classes(asks: Asks, call: LossCall) -> str | None:
    kind, target = None, call.target.detach() if isinstance(call.target, Tensor) else torch.zeros(0)
    if target.is_floating_point() and target.ndim == 2 and target.shape[1] > 1:
        if bool(((target.float().sum(1) - 1).abs() > _ROUNDING).any()):  # one-hot or soft labels sum to one
            kind = f"the targets of {call.function} are several at once, or none, or no classes"
    elif target.is_floating_point() and target.numel():
        kind = f"the targets of {call.function} are numbers, no classes"
    if kind is None and call.function.startswith("binary_cross_entropy") and not asks.signed:
        kind = f"the loss is {call.function}, which needs logits below zero to say no, and this head has none"
    if kind is None:
        return None
    return f"{asks.head} is no head that tells classes apart, one of which is right: {kind}. Leave {asks.owner} out."


def _within(name: str, head: str) -> bool:
    return name == head or name.startswith(f"{head}.")
