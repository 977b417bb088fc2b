"""Check in the first training step that a layer is the classifier: that it makes what the loss gets, and alone."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule

from lightning_feat.joints.features.candidates import head_sizes, within
from lightning_feat.joints.features.heads import find_classifier, is_compiled
from lightning_feat.joints.features.last_layers import OF_CLASSES, LastLayers, LossCall
from lightning_feat.joints.features.taps import FeatureTap, find_layer
from lightning_feat.joints.module.head_outputs import HeadOutputs
from lightning_feat.joints.module.head_targets import kind_in_batch, kind_of_targets, lacks_logarithms
from lightning_feat.joints.module.wraps import add_link, displaced, remove_link

_KEY = "head_check"


class Asks(NamedTuple):
    """What a callback wants to know of its head."""

    owner: str  # the callback, for errors
    heads: tuple[str, ...] = ()  # dotted names; several only where they are to be averaged; none: the one that is found
    argument: str = "layer"  # by which its user names another
    only_reads: bool = False  # a monitor: it warns
    replaces: bool = False  # it has put in a head of classes, one of which is right; else it reads what the head gets
    signed: bool = True  # whether its logits can be negative
    named: bool = False  # whether its user named it, as one head of several, say
    of_output: bool = False  # it reads what the layer puts out, which its user may have taken for what it gets

    @property
    def head(self) -> str:
        """The heads in words."""
        return " and ".join(self.heads)

    def within(self, name: str) -> bool:
        """Whether this layer is a head, or in one."""
        return within(name, self.heads)

    def mine(self, call: LossCall) -> bool:
        """Whether the heads, and no other layers, made what this loss got."""
        return bool(call.layers) and all(self.within(name) for name in call.layers)

    def say(self, what: str, certain: bool = True) -> None:
        """Raise it, or warn of it: a monitor, and where it may be as the user wants it."""
        if not self.only_reads and (certain or self.replaces):
            raise ValueError(what)
        warnings.warn(f"{self.owner}: {what}", stacklevel=2)


def check_head(module: LightningModule, asks: Asks) -> None:
    """Let the next training step check a head. What contradicts is a ``ValueError`` there; for a monitor, and
    where it is not certain, a warning.
    """
    # Innermost: what other callbacks compute around the step, such as terms of the loss, is not the module's.
    add_link(module, "training_step", f"{_KEY}:{asks.owner}:{asks.head}", _Check(asks), innermost=True)


def check_found(module: LightningModule, owner: str, taps: Iterable[FeatureTap], only_reads: bool = False) -> None:
    """``check_head`` of the classifier, if one of ``taps`` reads it as no layer was named; and of a layer that was
    named alone, without a word of ``read``, whether the output that is read are the logits.
    """
    taps = list(taps)
    if len(taps) == 1 and taps[0].layer is not None and not taps[0].says_read:
        check_head(module, Asks(owner, (taps[0].layer,), only_reads=True, of_output=True))
    finding = [tap for tap in taps if tap.layer is None and tap.classifier is None]
    if finding:
        check_head(module, Asks(owner, argument=finding[0].asks, only_reads=only_reads))


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
        asks = self.asks if self.asks.heads else self.asks._replace(heads=(find_classifier(module)[0],))
        with LastLayers(module, asks.heads).following() as follower, HeadOutputs(module, asks.heads) as outputs:
            out = call(*args, **kwargs)
        if asks.of_output:
            _tell_logits(asks, follower.calls)
            return out
        loss = out.get("loss") if isinstance(out, dict) else out
        seen = _Seen(follower.calls, follower.backwards | follower.of(loss), follower.passed | follower.past_of(loss))
        said = _contradiction(asks, seen, outputs)
        if said:
            asks.say(said, certain=_is_certain(asks, seen))
        elif asks.replaces and not any(asks.mine(call) for call in seen.calls):  # a loss written by hand
            batch = args[0] if args else kwargs.get("batch")
            if kind := kind_in_batch(batch, head_sizes(find_layer(module, asks.heads[0]))[1]):
                raise ValueError(_NO_CLASSES.format(asks.head, kind, asks.owner))
        _tell_counts(module, asks, seen.calls)
        return out


class _Seen(NamedTuple):
    """What a training step showed."""

    calls: list[LossCall]
    of_loss: frozenset[str]  # the last layers before what the step went backward from
    past: frozenset[str]  # the heads that this has passed, last or not


def _has_compiled_code(module: LightningModule) -> bool:
    attributes = [value for part in module.modules() for value in vars(part).values()]
    compiled = any(hasattr(value, "_torchdynamo_orig_callable") for value in [*attributes, *displaced(module)])
    return compiled or any(is_compiled(part) for part in module.modules())


def _is_certain(asks: Asks, seen: _Seen) -> bool:
    """Whether what the head put out went on through other layers alone. Else it may have a loss of another kind, or one
    in later batches, or be one of two that are added.
    """
    if any(asks.within(name) for name in seen.of_loss.union(*(call.layers for call in seen.calls))):
        return False
    return any(asks.within(name) for name in seen.past.union(*(call.past for call in seen.calls if call.trains)))


def _contradiction(asks: Asks, showed: _Seen, outputs: HeadOutputs) -> str | None:
    """What the step showed against this head; None where it showed nothing against it."""
    calls, of_loss = showed.calls, showed.of_loss
    seen = [call for call in calls if call.layers]
    of_classes = [call for call in seen if call.function in OF_CLASSES]
    mine = [call for call in seen if asks.mine(call)]
    if mine:
        if len(asks.heads) > 1 and not outputs.are_averaged_in(mine):
            return (
                f"the logits are made of {asks.head} otherwise than by their mean, and {asks.owner} can stand for "
                "heads that are averaged alone: let the model use one of them, or average them."
            )
        return _not_of_classes(asks, mine) if asks.replaces else None
    shared = [call for call in seen if any(asks.within(name) for name in call.layers)]
    if shared:
        return _shared(asks, shared[0])
    seen, of_classes = ([call for call in some if call.trains] for some in (seen, of_classes))
    if any(call.trains and not call.layers and call.function in OF_CLASSES for call in calls):
        return None  # these logits were not followed: a function of one's own, or layers from elsewhere, made them
    last = sorted(frozenset().union(*(call.layers for call in of_classes or seen)))
    if not seen and any(asks.within(name) for name in showed.past):
        last = sorted(of_loss)  # of a loss written by hand
    if not last or ((asks.named or not of_classes) and any(asks.within(name) for name in of_loss)):
        return None  # a loss of another kind is made of this head: nothing is known against it
    return (
        f"{asks.head} is not the layer that makes the logits: {', '.join(last[:4])} ran after it, or in its place, on "
        f"the way to the loss. Name the one that does (argument `{asks.argument}`)."
    )


def _shared(asks: Asks, call: LossCall) -> str | None:
    others = ", ".join(sorted(name for name in call.layers if not asks.within(name))[:4])
    if asks.replaces:
        return (
            f"the logits are made by {asks.head} together with {others}: {asks.owner} can stand for one head alone, or "
            f"for several that are averaged. Name all of these (argument `{asks.argument}`, a list), let the model use "
            "one, or put the layers together."
        )
    if asks.named:
        return None  # one of several, and the user knows which
    return (
        f"the logits are made by {asks.head} together with {others}, and {asks.owner} takes the features of the first "
        f"alone: name the layer that is meant (argument `{asks.argument}`)."
    )


_NO_CLASSES = "{} is no head that tells classes apart, one of which is right: {}. Leave {} out."


def _not_of_classes(asks: Asks, mine: list[LossCall]) -> str | None:
    of_classes = [call for call in mine if call.function in OF_CLASSES]
    if any(lacks_logarithms(call) for call in of_classes):
        return (
            f"nll_loss gets what {asks.head} puts out, which are no logarithms of shares: the layer that {asks.owner} "
            "replaced made them. Use cross_entropy, or log_softmax before nll_loss."
        )
    if of_classes:
        return None
    call = mine[0]
    kind = kind_of_targets(call)
    if kind is None and call.function.startswith("binary_cross_entropy") and not asks.signed:
        kind = f"the loss is {call.function}, which needs logits below zero to say no, and this head has none"
    return None if kind is None else _NO_CLASSES.format(asks.head, kind, asks.owner)


def _tell_logits(asks: Asks, calls: list[LossCall]) -> None:
    if any(call.function in OF_CLASSES and asks.mine(call) for call in calls):
        asks.say(
            f"the output of {asks.head} is read, as nothing else is said, and these are the logits: set read='input' "
            "for the features before them, or read='output' if the logits are meant."
        )


def _tell_counts(module: LightningModule, asks: Asks, calls: list[LossCall]) -> None:
    """Warn where a loss of classes tells others apart than the outputs of the head."""
    made = head_sizes(find_layer(module, asks.heads[0]))[1]
    for call in (call for call in calls if asks.mine(call)):
        classes = call.num_classes
        if made is not None and classes not in (made, None):
            warnings.warn(
                f"{asks.owner}: {asks.head} has {made} outputs, and {call.function} gets logits of {classes} classes. "
                "It takes each output for a class: right where the loss leaves some out, and wrong where it makes "
                "one of several.",
                stacklevel=2,
            )
            return
