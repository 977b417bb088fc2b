"""Put another head in the place of the classifier of any LightningModule, in time for everything that looks at its
parameters.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_feat.joints.features.heads import find_classifier, find_heads, remember_found, replace_layer
from lightning_feat.joints.features.taps import find_layer
from lightning_feat.joints.module.head_places import Around, Place, place_for
from lightning_feat.joints.module.wraps import overrides

_REPLACED = "_feat_replaced"  # on a new head, until optimizers are configured: the parameters it stands for
_OPTIONS = "_feat_options"  # on a new head: what it was built with
_LOADING = "_feat_loading"  # on a head: what it does when a checkpoint has a linear classifier
_TOLD = "_feat_told"  # on a new head: whether it was said how to load its checkpoints
HEADS_KEY = "lightning_feat_heads"  # in a checkpoint: the heads that were put in, by their names


def named_or_found(module: nn.Module, layer: str | None, argument: str = "layer") -> tuple[str, nn.Module]:
    """The layer of this dotted name, or the classifier that ``find_classifier`` finds, with its name; of a head that
    was put in with something around it, the head.
    """
    if layer is None:
        return find_classifier(module, argument)
    part = find_layer(module, layer)
    return (f"{layer}.head", part.head) if isinstance(part, Around) else (layer, part)


def heads_of(module: nn.Module, layers: str | Sequence[str] | None) -> list[tuple[str, nn.Module]]:
    """The layers of these dotted names, or what ``find_heads`` finds, with their names; of a head that was put in with
    something around it, the head.
    """
    if layers is not None:
        return [named_or_found(module, name) for name in ([layers] if isinstance(layers, str) else layers)]
    try:
        return find_heads(module)
    except ValueError as error:
        if "several" in str(error):
            raise ValueError(
                f"{error} Where the model averages the logits of several, name them all, in a list."
            ) from None
        raise


def joined(layer: str | Sequence[str] | None) -> str:
    """The heads that are asked for in words, for the key of a callback."""
    return layer if isinstance(layer, str) else ", ".join(layer or ["classifier"])


def checked_names(layer: str | list[str] | None) -> None:
    """Raise a ``ValueError`` for a list of heads that is empty, or names one twice."""
    if isinstance(layer, list) and (not layer or len(set(layer)) < len(layer)):
        raise ValueError(f"layer={layer}: name each head once, and at least one.")


class HeadSwap:
    """Replaces the classifier, once, as soon as it exists: by ``swap_early``, or as the link around
    ``configure_model``.

    Early, so that a module that the user shards in ``configure_model`` has its head sharded too, and that averaging
    callbacks copy the new head; but not where the user builds layers later, one of which could be the classifier that
    is meant.

    Args:
        layer: dotted name of the classifier, or of several heads that the model averages; None finds it, or them.
        kind: the class of the new head; a classifier of this class stays, and must be what the options ask for.
        build: the new head for the ``nn.Linear`` that it replaces, or for what has the sizes and the weight of one. A
            function that can be pickled, not a lambda.
        options: what it builds with, by the names of the arguments of ``owner``; attributes of the head of the same
            names are compared with them.
        owner: who asks, for errors.
        fresh: whether a checkpoint with an ``nn.Linear`` in its place may load, and leave the head as it is.
    """

    def __init__(
        self,
        layer: str | Sequence[str] | None,
        kind: type[nn.Module],
        build: Callable[[Any], nn.Module],
        options: Mapping[str, Any],
        owner: type,
        fresh: bool,
    ) -> None:
        self.layer, self.kind, self.build, self.options, self.owner = layer, kind, build, dict(options), owner.__name__
        defaults = inspect.signature(owner).parameters
        self.stated = {name: value for name, value in options.items() if value != defaults[name].default}
        self.loading = _OtherCheckpoint(self.owner, fresh)

    def __call__(self, module: LightningModule, call: Callable[..., Any]) -> None:
        call()
        self.swap(module)

    def swap_early(self, module: LightningModule) -> None:
        """Replace the classifier if it is there for certain."""
        if any(overrides(module, hook) for hook in ("setup", "configure_model")):
            names = {name for name, _ in module.named_modules()}
            asked = [self.layer] if isinstance(self.layer, str) else self.layer
            if asked is None or not names.issuperset(asked):
                return
        self.swap(module)

    def swap_for(self, module: nn.Module, names: Collection[str]) -> None:
        """Replace the classifier if weights of these names, as a state dict has them, are those of a new head."""
        try:
            heads = heads_of(module, self.layer)
        except ValueError:  # built later, or not there: whoever trains the module will hear of it
            return
        for name, old in heads:
            in_its_place = {known for known in names if known.startswith(f"{name}.")}
            if not isinstance(old, self.kind) and in_its_place and f"{name}.weight" not in in_its_place:
                self.swap(module)
                return

    def swap(self, module: nn.Module) -> None:
        """Replace the classifier unless that has been done."""
        heads = heads_of(module, self.layer)
        there = [(name, head) for name, head in heads if isinstance(head, self.kind)]
        for name, head in there:
            self._refuse_other_options(name, head)
            self._load_by(head)
        old = [(name, head) for name, head in heads if not isinstance(head, self.kind)]
        kind = self.kind.__name__
        places = [place_for(kind, self.owner, module, name, head) for name, head in old]  # before one is replaced
        if len({place.out_features for place in places}) > 1:
            sizes = ", ".join(f"{name} ({place.out_features})" for (name, _), place in zip(old, places, strict=True))
            raise ValueError(
                f"heads of other numbers of classes are not averaged: {sizes}. Name one (argument `layer`)."
            )
        if len(old) > 1:
            rank_zero_info(
                f"{self.owner} replaces {len(old)} heads, whose logits the model is to average: "
                f"{', '.join(name for name, _ in old)}."
            )
        for (_, head), place in zip(old, places, strict=True):
            self._put_in(module, head, place)

    def _put_in(self, module: nn.Module, old: nn.Module, place: Place) -> None:
        head = self.build(place)
        if not any(p.requires_grad for p in old.parameters()):  # a frozen classifier stays frozen
            head.requires_grad_(False)
        head.__dict__[_OPTIONS] = self.options
        self._load_by(head)
        if self.layer is None:  # searched again, in its absence the layer before it might be taken
            remember_found(head)
        replace_layer(module, old, place.around(head).train(old.training))
        head.__dict__[_REPLACED] = tuple(p for p in old.parameters() if place.replaces(p))

    def _load_by(self, head: nn.Module) -> None:
        there: _OtherCheckpoint | None = head.__dict__.get(_LOADING)
        if there is None:
            head.__dict__[_LOADING] = self.loading
            head.register_load_state_dict_pre_hook(self.loading)
        else:  # of an earlier callback, or a copy of it
            there.owner, there.fresh = self.loading.owner, self.loading.fresh

    def _refuse_other_options(self, name: str, head: nn.Module) -> None:
        """One that was put in has all options of the callback; one that is the module's own, those that are stated."""
        built: dict[str, Any] | None = head.__dict__.get(_OPTIONS)
        asked = self.stated if built is None else self.options
        there = {option: getattr(head, option, None) for option in asked} if built is None else built
        for option, value in asked.items():
            if not _agree(there[option], value):
                raise ValueError(
                    f"the classifier {name} is a {type(head).__name__} already, with {option}={_plain(there[option])}, "
                    f"and {self.owner} asks for {option}={value!r}: make a new module for other options, or ask for "
                    "those it has."
                )


def tell_use(exception: BaseException, owner: str, *kinds: type[nn.Module]) -> None:
    """Add to an error of a step that used a new head as it used the old one, by its weight say, what is the matter."""
    used = isinstance(exception, (AttributeError, TypeError)) and any(k.__name__ in str(exception) for k in kinds)
    if used and hasattr(exception, "add_note"):  # from Python 3.11 on
        exception.add_note(
            f"{owner} has put a {' or '.join(k.__name__ for k in kinds)} in the place of the classifier, which is "
            "called with features alone, and has no weight of its own: call the layer, or leave the callback out."
        )


def note_head(checkpoint: dict[str, Any], label: str, head: nn.Module, module: nn.Module) -> None:
    """Write down, in a checkpoint, which head stands where, so that it can be loaded without the callback; and say how,
    once, as ``load_from_checkpoint`` of the class of ``module`` cannot.
    """
    options = head.__dict__.get(_OPTIONS)
    if options is None:
        return
    checkpoint.setdefault(HEADS_KEY, {})[label] = {"kind": type(head).__name__, "options": dict(options)}
    if not head.__dict__.get(_TOLD):
        head.__dict__[_TOLD] = True
        cls = type(module).__name__
        rank_zero_info(
            f"The checkpoints of this run hold a {type(head).__name__} at {label}, which {cls}.load_from_checkpoint "
            f"does not know: lightning_feat.callbacks.load_with_head({cls}, path) loads them."
        )


def refuse_other_options(checkpoint: Mapping[str, Any], label: str, head: nn.Module, owner: str) -> None:
    """Raise a ``ValueError`` if a run resumes with a head that was put in with other options than its checkpoint's,
    which would stay without a word; or, of one that learns what the other holds fixed, end in an optimizer's error.
    """
    asked: dict[str, Any] = dict(head.__dict__.get(_OPTIONS) or {})
    noted: dict[str, Any] = checkpoint.get(HEADS_KEY, {}).get(label, {})
    saved: dict[str, Any] = dict(noted.get("options", {}))
    weights = {name.replace("_orig_mod.", ""): value for name, value in checkpoint.get("state_dict", {}).items()}
    saved["scale"] = weights.get(f"{label}.scale")  # what counts, whoever wrote the checkpoint
    if asked.get("learn_scale", False) or saved.get("learn_scale", False) or saved["scale"] is None:
        del saved["scale"]
    saved.pop("seed", None)  # of what is drawn, as initial weights are: those of the checkpoint go on
    for option in (option for option in asked if option in saved):
        if not _agree(saved[option], asked[option]):
            kind, is_there = noted.get("kind", type(head).__name__), _plain(saved[option])
            raise ValueError(
                f"the checkpoint has a {kind} with {option}={is_there} at {label}, and {owner} asks for "
                f"{option}={asked[option]!r}: set {option}={is_there} to resume the run."
            )


def begin_head_anew(checkpoint: dict[str, Any], label: str, head: nn.Module) -> None:
    """Of a checkpoint with a linear classifier keep nothing that knows its parameters: optimizers and schedules go, and
    fine-tuning callbacks, which write down groups by name, get those of the new head.
    """
    checkpoint["optimizer_states"] = []  # its parameters are others than ours
    checkpoint["lr_schedulers"] = []  # a schedule in its middle beside an optimizer at its first rate
    new = [f"{label}.{name}" for name, p in head.named_parameters() if p.requires_grad]
    states = checkpoint.get("callbacks", {})
    for callback, state in states.items():
        if isinstance(state, dict) and "internal_optimizer_metadata" in state:
            groups_of = {
                index: [{**group, "params": _renamed(group["params"], label, new)} for group in groups]
                for index, groups in state["internal_optimizer_metadata"].items()
            }
            states[callback] = {**state, "internal_optimizer_metadata": groups_of}


def _renamed(names: list[str], label: str, new: list[str]) -> list[str]:
    """The names in a group of an optimizer, those of the new head in the place of the first of the old."""
    first = next((name for name in names if name.startswith(f"{label}.")), None)
    kept = [name for name in names if name == first or not name.startswith(f"{label}.")]
    return [n for name in kept for n in (new if name == first else [name])]


def _agree(there: Any, asked: Any) -> bool:
    if isinstance(asked, bool) or not isinstance(asked, float):
        return bool(there == asked)
    return there is not None and abs(float(there) - asked) <= 1e-6 * max(abs(asked), 1.0)  # a float32 buffer


def _plain(value: Any) -> Any:
    return round(float(value), 6) if hasattr(value, "is_floating_point") else value


def take_places(optimizers: list[Optimizer], head: nn.Module) -> None:
    """Put the parameters of a new head where those of the old one stand, for optimizers made before the swap.

    LightningCLI makes them so, and so does who makes them in ``__init__``. A group of its own would break schedulers.
    """
    replaced: tuple[nn.Parameter, ...] = head.__dict__.pop(_REPLACED, ())
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        parameters = []
        for p in group["params"]:
            if replaced and p is replaced[0]:
                parameters += [new for new in head.parameters() if new.requires_grad]
            elif not any(p is old for old in replaced):
                parameters.append(p)
        group["params"] = parameters


class _OtherCheckpoint:
    """What a head that was put in does when a checkpoint has another kind in its place; a pre-hook of loading."""

    def __init__(self, owner: str, fresh: bool) -> None:
        self.owner, self.fresh = owner, fresh

    def __call__(
        self,
        head: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        own = head.state_dict(prefix=prefix)
        there = next((name for name in _KINDS if f"{prefix}{name}" in state_dict), None)
        if own.keys() <= state_dict.keys() or there is None or f"{prefix}{there}" in own:
            return
        if not self.fresh:
            kind, owner = _KINDS[there]
            errors.append(
                f"the checkpoint has a {kind} at {prefix.rstrip('.')}, where this module has a {type(head).__name__}: "
                f"set {self.owner}(fresh_head=True) to load all but the head, or {owner}."
            )
        for name in [name for name in state_dict if name.startswith(prefix)]:
            del state_dict[name]
        state_dict.update(own)


_KINDS = {  # by a name in the state dict: what it is, and what one would do to have it
    "weight": ("linear classifier", "leave it out"),
    "basis": ("GrassmannLinear", "take GrassmannHead in its place"),
    "prototypes": ("SimplexETF", "take SimplexETFHead in its place"),
}
