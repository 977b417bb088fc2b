"""What is taken from an optimizer before its step, and what is kept from it while the step lasts."""

import weakref
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_feat.layers.grassmann import local_part

Held: TypeAlias = tuple[nn.Parameter, dict[str, Any]]  # a basis, and the group that trains it


class Gradients:
    """What the gradients of the bases were before the optimizer moved anything, or changed them."""

    def __init__(self, copies: bool) -> None:
        self.copies = copies  # or else only whether there was one
        self._room: dict[nn.Parameter, Tensor] = {}  # used again in each step
        self._taken: dict[nn.Parameter, weakref.ref[Tensor]] = {}

    def take(self, bases: Sequence[nn.Parameter], anew: bool) -> None:
        """Take them; not ``anew``: only of those that have another gradient than the one that was taken."""
        for basis in bases:
            gradient = basis.grad
            if gradient is None:
                self._taken.pop(basis, None)
                continue
            before = self._taken.get(basis)
            if not anew and before is not None and before() is gradient:
                continue
            self._taken[basis] = weakref.ref(gradient)
            if self.copies:
                local = local_part(gradient)
                room = self._room.get(basis)
                if room is None or (room.shape, room.dtype, room.device) != (local.shape, local.dtype, local.device):
                    room = self._room[basis] = torch.empty_like(local, memory_format=torch.contiguous_format)
                room.copy_(local)

    def has(self, basis: nn.Parameter) -> bool:
        return basis in self._taken

    def of(self, basis: nn.Parameter) -> Tensor:
        return self._room[basis]

    def forget(self) -> None:
        self._taken.clear()


class WithoutDecay:
    """Puts bases into a parameter group without weight decay, for one step: whether an optimizer adds its decay to the
    gradient, to the weights or elsewhere, it reads it from the group.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._changed: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]] = []

    def take_out(self, held: Sequence[Held]) -> None:
        """A second time changes nothing."""
        if self._changed:
            return
        bases = {basis for basis, _ in held}
        for group in list(self.optimizer.param_groups):
            others = [p for p in group["params"] if p not in bases]
            if len(others) == len(group["params"]) or not group.get("weight_decay"):
                continue
            before = {name: group[name] for name in ("params", "weight_decay")}
            apart = None
            if others:
                apart = {**group, "params": [p for p in group["params"] if p in bases], "weight_decay": 0.0}
                group["params"] = others
                self.optimizer.param_groups.append(apart)
            else:
                group["weight_decay"] = 0.0
            self._changed.append((group, before, apart))

    def put_back(self) -> None:
        """Undo ``take_out``. Nothing happens if there is nothing to undo."""
        for group, before, apart in self._changed:
            group.update(before)
            if apart is not None:
                groups = self.optimizer.param_groups
                groups[:] = [other for other in groups if other is not apart]
        self._changed.clear()
