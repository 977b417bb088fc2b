"""The start of a run as weights alone."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_feat.joints.features.taps import find_layer
from lightning_feat.joints.reference.hearing import DeafTap


class StartWeights:
    """The weights that a run begins with, for ``functional.feature_shift.l2_sp``.

    Memory: as many bytes as these weights, on the device and in every checkpoint.

    Args:
        layers: dotted names of the submodules whose trained parameters are meant; None for the whole module.
        new_layers: of these, the submodules whose parameters have no start worth keeping, such as a new head.
    """

    def __init__(self, layers: Sequence[str] | None, new_layers: Sequence[str]) -> None:
        self.layers, self.new_layers = layers, list(new_layers)
        self.tap = DeafTap(self)
        self._kept = _KeptWeights()

    def begin(self) -> None:
        """Forget an earlier run."""
        self._kept.start = {}

    def attach(self, module: nn.Module) -> None:
        """Keep the weights, where they are not kept yet."""
        for name in [*(self.layers or []), *self.new_layers]:
            find_layer(module, name)
        weights = self._meant(module)
        if not self._kept.start:
            self._kept.start = {name: weight.detach().clone() for name, weight in weights.items()}
        if missing := [name for name in weights if name not in self._kept.start]:
            raise ValueError(
                f"the checkpoint has no start for {missing[0]} and {len(missing) - 1} more: resume with the layers "
                "that the run began with."
            )
        self._kept.start = {name: self._kept.start[name].to(weight.device) for name, weight in weights.items()}

    def split(self, module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By name, the parameters trained at present: those that have a start, and those that are new."""
        named = {name: weight for name, weight in _parameters_of(module).items() if weight.requires_grad}
        new = {name: weight for name, weight in named.items() if _is_within(name, self.new_layers)}
        return {name: weight for name, weight in named.items() if name in self._kept.start}, new

    def _meant(self, module: nn.Module) -> dict[str, Tensor]:
        """Also those that do not train: some are let go later."""
        weights = {
            name: weight
            for name, weight in _parameters_of(module).items()
            if not _is_within(name, self.new_layers) and (self.layers is None or _is_within(name, self.layers))
        }
        if not weights:
            raise ValueError(f"there is no parameter in {self.layers or 'the module'} to hold: name other layers.")
        return weights

    @property
    def start(self) -> dict[str, Tensor]:
        return self._kept.start

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"weights": self._kept.start} if self._kept.start else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Undo ``state``, before ``attach``."""
        if state:
            self._kept.start = state["weights"]

    def remove(self) -> None:
        """Nothing was put on the module."""


class _KeptWeights:
    """Shared by copies of a module that is being trained."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "_KeptWeights":
        return self


def _parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """By plain name; what callbacks bring along is not the user's."""
    named = {name.replace("_orig_mod.", ""): parameter for name, parameter in module.named_parameters()}
    return {name: parameter for name, parameter in named.items() if not name.startswith("_feat_own.")}


def _is_within(name: str, layers: Sequence[str]) -> bool:
    return any(name.startswith(f"{layer}.") or name == layer for layer in layers)
