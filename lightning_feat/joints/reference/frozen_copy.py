"""A frozen copy of a network or a part of it, as it was at the start, and the taps on it."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_feat.joints.features.taps import find_layer
from lightning_feat.joints.reference.copying import independent_copy
from lightning_feat.joints.reference.hearing import AskedTap


class FrozenCopy:
    """The copy and the taps on it. Copies of a module that is being trained share it: nobody changes it."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.net: nn.Module | None = None
        self.trunk = ""
        self.weights: dict[str, Tensor] | None = None  # of the start, while there is no copy
        self.taps: list[AskedTap] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenCopy":
        return self

    def make(self, module: nn.Module, trunk: str, path: str | None) -> None:
        """Copy the trunk, where that is not done; load the start that is known, if any; bring it to the device."""
        if self.net is None:
            if self.weights is not None and self.trunk != trunk:
                raise ValueError(
                    f"the checkpoint has a reference of {self.trunk or 'the whole module'!r}, but the layers lie in "
                    f"{trunk or 'the whole module'!r}: resume with the layers that the run began with, or set trunk."
                )
            original = find_layer(module, trunk) if trunk else module
            net = independent_copy(original, trunk)
            weights = self.weights if path is None else _read_weights(path, trunk, net)
            if weights is not None:
                net.load_state_dict(weights)
            self.net, self.trunk, self.weights = net.requires_grad_(False).eval(), trunk, None
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        # Once and not each step: what is moved later than this, the user moves himself.
        self.net.to(device)

    def borrow(self, other: "FrozenCopy", trunk: str) -> None:
        """One copy for two callbacks, unless this one's start is another."""
        if self.net is None and other.net is not None and other.trunk == trunk:
            theirs = other.net.state_dict()
            mine = theirs if self.weights is None else self.weights
            if mine.keys() == theirs.keys() and all(torch.equal(mine[n].cpu(), w.cpu()) for n, w in theirs.items()):
                self.net, self.trunk, self.weights = other.net, trunk, None

    def hear(self, taps: list[AskedTap]) -> None:
        """Put these taps on the copy, in place of earlier ones."""
        for tap in self.taps:
            tap.remove()
        self.taps = taps
        if self.net is not None:
            for tap in taps:
                tap.attach(self.net)

    def to_host(self) -> None:
        """Let go of the copy; its weights are kept, in host memory."""
        for tap in self.taps:
            tap.remove()
        if self.net is not None:
            self.weights = {name: value.cpu() for name, value in self.net.state_dict().items()}
            self.net, self.taps = None, []


def _read_weights(path: str, trunk: str, net: nn.Module) -> dict[str, Tensor]:
    """The weights of ``net``, the trunk, in a file that has them by their names in the module or in the trunk."""
    stored = torch.load(path, map_location="cpu", weights_only=True)
    stored = stored.get("state_dict", stored)
    wanted = net.state_dict()
    prefix = f"{trunk}." if trunk and all(f"{trunk}.{name}" in stored for name in wanted) else ""
    missing = [name for name in wanted if f"{prefix}{name}" not in stored]
    if missing:
        raise ValueError(
            f"{path} has no weights {missing[0]!r} and {len(missing) - 1} more of {trunk or 'the module'}: give a "
            "state dict of it, or a trunk that the file knows."
        )
    return {name: stored[f"{prefix}{name}"] for name in wanted}
