"""What kinds of classifiers a new head can stand for, and what stays around it."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy

_NOT_BUILT = "a {} that has no weight before it has run (run the module once in __init__)"


class Around(nn.Module):
    """What stays around a new head where the old one was more than a ``Linear``."""

    head: nn.Module
    over_positions = False


class _After(Around):
    """A head behind the layers that a ``Linear`` of its own class brought along: the norm of timm's ``NormLinear``."""

    def __init__(self, before: dict[str, nn.Module], head: nn.Module) -> None:
        super().__init__()
        for name, part in before.items():
            self.add_module(name, part)
        self.before, self.head = list(before), head

    def forward(self, features: Tensor) -> Tensor:
        for name in self.before:
            features = self.get_submodule(name)(features)
        logits: Tensor = self.head(features)
        return logits


class _OverPositions(Around):
    """A head in the place of a convolution of one position: maps ``(N, D, ...)`` become logits ``(N, C, ...)``, and the
    head gets features ``(N * positions, D)``.
    """

    over_positions = True

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, maps: Tensor) -> Tensor:
        last = maps.movedim(1, -1)
        logits: Tensor = self.head(last.flatten(0, -2))
        return logits.unflatten(0, last.shape[:-1]).movedim(-1, 1)


class Place(NamedTuple):
    """What a new head must know of the old one."""

    in_features: int
    out_features: int
    weight: Tensor
    before: dict[str, nn.Module]
    over_positions: bool = False

    def around(self, head: nn.Module) -> nn.Module:
        """The new head, with what stays around it."""
        if self.over_positions:
            return _OverPositions(head)
        return _After(self.before, head) if self.before else head

    def replaces(self, parameter: nn.Parameter) -> bool:
        """Whether this parameter of the old head goes with it."""
        return not any(parameter is kept for part in self.before.values() for kept in part.parameters())


def place_of(old: nn.Module) -> Place | str:
    """The place of a classifier, or in words what it is, where no head can stand for it."""
    adapted = getattr(old, "base_layer", None)
    if isinstance(adapted, nn.Linear):  # LoRA: what it adds goes with the layer
        return place_of(adapted)
    if isinstance(old, nn.Linear):
        return _place_of_linear(old)
    if isinstance(old, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if is_lazy(old.weight):
            return _NOT_BUILT.format(type(old).__name__)
        whole = (old.groups, {*old.kernel_size}, {*old.stride}) == (1, {1}, {1}) and not any(
            pad != 0 for pad in old.padding if not isinstance(old.padding, str)
        )
        if not whole:
            return f"a {type(old).__name__} that mixes positions (kernel {tuple(old.kernel_size)})"
        return Place(old.in_channels, old.out_channels, old.weight, {}, over_positions=True)
    return f"a {type(old).__name__}, not an nn.Linear"


def place_for(kind: str, owner: str, module: nn.Module, name: str, old: nn.Module) -> Place:
    """The place that a classifier of ``module`` leaves to a head of this kind.

    Raises:
        ValueError: if no such head can stand for it.
    """
    place = place_of(old)
    if isinstance(place, str):
        raise ValueError(
            f"the classifier {name} is {place}, so {owner} cannot replace it: name the Linear that makes the logits "
            f"(argument `layer`), or build the module with a {kind}."
        )
    if place.out_features < 2:
        raise ValueError(
            f"the classifier {name} has one output, as for a regression or for one class against none: {owner} needs "
            "two classes or more, and a loss such as cross entropy. Leave it out, or give the classifier two outputs."
        )
    if others := _sharing_with(module, old):
        raise ValueError(
            f"the classifier {name} shares its weight with {', '.join(others[:4])}, and {owner} would untie them: give "
            "the classifier a weight of its own first."
        )
    if hasattr(place.weight, "placements"):
        raise ValueError(
            f"the classifier {name} is sharded already: create it in __init__ and name it (argument `layer`), so that "
            "it can be replaced before configure_model shards the module."
        )
    return place


def _sharing_with(module: nn.Module, old: nn.Module) -> list[str]:
    """The parameters below ``module``, outside of ``old``, that are parameters of ``old`` too."""
    inside, shared = {id(part) for part in old.modules()}, {id(p) for p in old.parameters()}
    return [
        f"{name}.{own}".lstrip(".")
        for name, part in module.named_modules()
        if id(part) not in inside
        for own, parameter in part._parameters.items()
        if parameter is not None and id(parameter) in shared
    ]


def _place_of_linear(old: nn.Linear) -> Place | str:
    kind = type(old).__name__
    if is_lazy(old.weight):
        return _NOT_BUILT.format(kind)
    taken = [
        p for p in inspect.signature(old.forward).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(taken) > 1:
        return f"a {kind}, whose forward takes ({', '.join(p.name for p in taken)}), where a new head takes features"
    before = dict(old.named_children())
    before.pop("parametrizations", None)
    own = bool(before) or type(old).forward is not nn.Linear.forward
    runs = _run_both(old, before) if own and not old.weight.is_meta else None
    if runs is not None and not isinstance(runs[0], Tensor):
        return f"a {kind} that puts out a {type(runs[0]).__name__}, where a new head puts out logits"
    same = kind == "NormLinear" if old.weight.is_meta else runs is not None and torch.equal(*runs)
    if before and not same:
        return f"a {kind}, with layers of its own beside its weight"
    return Place(old.in_features, old.out_features, old.weight, before)


def _run_both(old: nn.Linear, before: dict[str, nn.Module]) -> tuple[Any, Tensor] | None:
    """What ``old`` puts out, and what its layers, in order, and then its weight do; None where it does not run."""
    modes = [(part, part.training) for part in old.modules()]
    probe = torch.linspace(-1, 2, 3 * old.in_features, device=old.weight.device, dtype=old.weight.dtype)
    x = probe.reshape(3, old.in_features)
    generator = torch.get_rng_state()
    try:
        old.eval()
        with torch.no_grad():
            given, by_hand = old.forward(x), x  # without hooks, which are others'
            for part in before.values():
                by_hand = part(by_hand)
            return given, functional.linear(by_hand, old.weight, old.bias)
    except (RuntimeError, TypeError, ValueError):
        return None
    finally:
        torch.set_rng_state(generator)
        for part, training in modes:
            part.training = training
