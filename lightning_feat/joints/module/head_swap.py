"""Put another head in the place of the classifier of any LightningModule, in time for everything that looks at its
parameters.
"""

from collections.abc import Callable, Collection
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from lightning_feat.joints.features.heads import find_classifier, remember_found, replace_layer
from lightning_feat.joints.features.taps import find_layer
from lightning_feat.joints.module.wraps import overrides

_REPLACED = "_feat_replaced"  # on a new head, until optimizers are configured: the parameters it stands for


def named_or_found(module: nn.Module, layer: str | None, argument: str = "layer") -> tuple[str, nn.Module]:
    """The layer of this dotted name, or the classifier that ``find_classifier`` finds, with its name."""
    return find_classifier(module, argument) if layer is None else (layer, find_layer(module, layer))


class HeadSwap:
    """Replaces the classifier, once, as soon as it exists: by ``swap_early``, or as the link around
    ``configure_model``.

    Early, so that a module that the user shards in ``configure_model`` has its head sharded too, and that averaging
    callbacks copy the new head; but not where the user builds layers later, one of which could be the classifier that
    is meant.

    Args:
        layer: dotted name of the classifier; None finds it.
        kind: the class of the new head; a classifier of this class is left alone.
        build: the new head for the ``nn.Linear`` that it replaces. A function that can be pickled, not a lambda.
        owner: who asks, for errors.
        fresh: whether a checkpoint with an ``nn.Linear`` in its place may load, and leave the head as it is.
    """

    def __init__(
        self, layer: str | None, kind: type[nn.Module], build: Callable[[nn.Linear], nn.Module], owner: str, fresh: bool
    ) -> None:
        self.layer, self.kind, self.build, self.owner = layer, kind, build, owner
        self.loading = _LinearCheckpoint(owner, fresh)

    def __call__(self, module: LightningModule, call: Callable[..., Any]) -> None:
        call()
        self.swap(module)

    def swap_early(self, module: LightningModule) -> None:
        """Replace the classifier if it is there for certain."""
        if any(overrides(module, hook) for hook in ("setup", "configure_model")):
            names = {name for name, _ in module.named_modules()}
            if self.layer is None or self.layer not in names:
                return
        self.swap(module)

    def swap_for(self, module: nn.Module, names: Collection[str]) -> None:
        """Replace the classifier if weights of these names, as a state dict has them, are those of a new head."""
        try:
            name, old = named_or_found(module, self.layer)
        except ValueError:  # built later, or not there: whoever trains the module will hear of it
            return
        in_its_place = {known for known in names if known.startswith(f"{name}.")}
        if not isinstance(old, self.kind) and in_its_place and f"{name}.weight" not in in_its_place:
            self.swap(module)

    def swap(self, module: nn.Module) -> None:
        """Replace the classifier unless that has been done."""
        name, old = named_or_found(module, self.layer)
        if isinstance(old, self.kind):
            return
        if not isinstance(old, nn.Linear):
            raise ValueError(
                f"the classifier {name} is a {type(old).__name__}, not an nn.Linear, so {self.owner} cannot replace "
                "it: name the Linear that makes the logits (argument `layer`), or build the module with a "
                f"{self.kind.__name__}."
            )
        if hasattr(old.weight, "placements"):
            raise ValueError(
                f"the classifier {name} is sharded already: create it in __init__ and name it (argument `layer`), so "
                "that it can be replaced before configure_model shards the module."
            )
        head = self.build(old)
        if not old.weight.requires_grad:  # a frozen classifier stays frozen
            head.requires_grad_(False)
        head.register_load_state_dict_pre_hook(self.loading)
        if self.layer is None:  # searched again, in its absence the layer before it might be taken
            remember_found(head)
        replace_layer(module, old, head.train(old.training))
        head.__dict__[_REPLACED] = tuple(old.parameters())


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


class _LinearCheckpoint:
    """What a head that was put in does when a checkpoint has an ``nn.Linear`` in its place; a pre-hook of loading."""

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
        if own.keys() <= state_dict.keys() or f"{prefix}weight" not in state_dict:
            return
        if not self.fresh:
            errors.append(
                f"the checkpoint has a linear classifier at {prefix.rstrip('.')}, where this module has a "
                f"{type(head).__name__}: set {self.owner}(fresh_head=True) to load all but the head, or leave it out."
            )
        for name in ("weight", "bias"):
            state_dict.pop(f"{prefix}{name}", None)
        state_dict.update(own)
