"""What kinds of classifiers a new head can stand for, and what stays around it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


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
        before = dict(old.named_children())
        before.pop("parametrizations", None)
        if before and not _runs_before(before, old):
            return f"a {type(old).__name__}, with layers of its own beside its weight"
        return Place(old.in_features, old.out_features, old.weight, before)
    if isinstance(old, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        whole = (old.groups, {*old.kernel_size}, {*old.stride}) == (1, {1}, {1}) and not any(
            pad != 0 for pad in old.padding if not isinstance(old.padding, str)
        )
        if not whole:
            return f"a {type(old).__name__} that mixes positions (kernel {tuple(old.kernel_size)})"
        return Place(old.in_channels, old.out_channels, old.weight, {}, over_positions=True)
    return f"a {type(old).__name__}, not an nn.Linear"


def _runs_before(before: dict[str, nn.Module], old: nn.Linear) -> bool:
    """Whether ``old`` is its layers, in their order, and then its weight."""
    if old.weight.is_meta:
        return type(old).__name__ == "NormLinear"
    modes = [(part, part.training) for part in old.modules()]
    probe = torch.linspace(-1, 2, 3 * old.in_features, device=old.weight.device, dtype=old.weight.dtype)
    x = probe.reshape(3, old.in_features)
    try:
        old.eval()
        with torch.no_grad():
            given, by_hand = old(x), x
            for part in before.values():
                by_hand = part(by_hand)
            return torch.equal(given, functional.linear(by_hand, old.weight, old.bias))
    except (RuntimeError, TypeError, ValueError):
        return False
    finally:
        for part, training in modes:
            part.training = training
