"""Other logits of a classifier while a callback wants them: rows of other lengths, and another prior."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn

from lightning_feat.functional.neural_collapse import prior_shift, realigned_lengths
from lightning_feat.joints.data.processes import full_tensor
from lightning_feat.joints.features.candidates import head_sizes
from lightning_feat.joints.features.heads import find_classifier, forget_compiled_code
from lightning_feat.joints.features.taps import find_layer
from lightning_feat.joints.features.weights import read_weight

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LogitChange:
    """What is done to the logits of one classifier."""

    def __init__(
        self,
        module: nn.Module,
        classifier: str | None,
        power: float,
        lengths: Any,
        frequencies: Any,
        train_frequencies: Sequence[float] | None,
    ) -> None:
        if classifier is None:
            self.name, self.layer = find_classifier(module, "classifier")
        else:
            self.name, self.layer = classifier, find_layer(module, classifier)
        if not isinstance(self.layer, _LINEAR):
            raise ValueError(
                f"{self.name} is a {type(self.layer).__name__}, whose logits are not products with rows of a length of "
                "their own: realign a Linear."
            )
        if getattr(type(self.layer), "forward", None) not in [kind.forward for kind in _LINEAR]:
            raise ValueError(
                f"{self.name} is a {type(self.layer).__name__}, with a forward of its own, whose logits need not be "
                "products with its rows: realign a Linear."
            )
        self._read()
        self._power, num_classes = power, head_sizes(self.layer)[1] or len(self._weight)
        self._lengths = _for_loaders("lengths", lengths, num_classes)
        self._frequencies = _for_loaders("frequencies", frequencies, num_classes)
        self._trained = None
        if train_frequencies is not None:
            (self._trained,) = _for_loaders("train_frequencies", train_frequencies, num_classes)
        self._handle: Any = None
        # Not asked of a weight in each batch, which may be computed when it is asked.
        self._axis = -1 if isinstance(self.layer, nn.Linear) else -1 - len(self.layer.kernel_size)
        given = {len(rows) for rows in (self._lengths, self._frequencies) if len(rows) > 1}
        if len(given) > 1:
            raise ValueError(
                f"lengths are given for {len(self._lengths)} loaders, but frequencies for {len(self._frequencies)}: "
                "give one list for each loader, or a single one for all."
            )
        self._loaders = max(given, default=1)
        self._made: list[tuple[Tensor, Tensor]] = []
        self._make()
        self.ran = self.told = self._turned = False

    def of(self, loader: int) -> tuple[Tensor, Tensor]:
        """Factors and shifts ``(C,)`` for the batches of this loader."""
        lengths, frequencies = _entry(self._lengths, loader), _entry(self._frequencies, loader)
        factor_C = realigned_lengths(self._weight, self._power, lengths)
        shift_C = torch.zeros_like(factor_C)
        if frequencies is not None and self._trained is not None:
            shift_C = prior_shift(frequencies, self._trained).to(factor_C.device)
        return factor_C, shift_C

    def check_loaders(self, loaders: CombinedLoader | None) -> None:
        """Raise a ``ValueError`` where these loaders cannot have the lists that are given."""
        if self._loaders == 1 or loaders is None:
            return
        number = len(loaders.flattened)
        if number > self._loaders:
            raise ValueError(
                f"ClassNormRealignment: there is a loader number {self._loaders}, but lengths or frequencies are given "
                f"for {self._loaders}: give one list for each loader, or a single one for all."
            )
        if number > 1 and loaders._mode != "sequential":
            raise ValueError(
                f"ClassNormRealignment: lengths or frequencies are given for {self._loaders} loaders, but a "
                f"CombinedLoader of mode {loaders._mode!r} puts the batches of all together: take 'sequential'."
            )

    def choose(self, loader: int) -> None:
        """The batches that follow are of this loader."""
        if not self._turned:  # averaging callbacks put other weights in after the start
            self._turned = True
            self._read()
            self._make()
        self._now = self._made[loader if self._loaders > 1 else 0]

    def _read(self) -> None:
        bias = read_weight(self.layer, "bias")
        self._weight: Tensor = full_tensor(read_weight(self.layer)).flatten(1)
        self._bias: Tensor | None = None if bias is None else full_tensor(bias)

    def _make(self) -> None:
        """Factors and shifts for each loader."""
        self._made = []
        for loader in range(self._loaders):
            factor_C, shift_C = self.of(loader)
            self._made.append((factor_C.to(self._weight.device), shift_C.to(self._weight.device)))
        self._now = self._made[0]

    def install(self, module: nn.Module) -> None:
        self._handle = self.layer.register_forward_hook(self._hook)
        forget_compiled_code(module)

    def remove(self) -> None:
        self._handle.remove()

    def _hook(self, layer: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.ran = True
        shape = [1] * logits.ndim
        shape[self._axis] = -1
        wide = torch.promote_types(logits.dtype, torch.float32)
        factor, shift = (of.to(logits.device, wide).reshape(shape) for of in self._now)
        # In the precision in which it was added.
        plain = 0.0 if self._bias is None else self._bias.to(logits.device, logits.dtype).to(wide).reshape(shape)
        return ((logits.to(wide) - plain) * factor + plain + shift).to(logits.dtype)


def _for_loaders(name: str, given: Any, num_classes: int) -> list[Tensor]:
    """One tensor ``(C,)`` for each loader, or one for all; none where nothing is given."""
    if given is None:
        return []
    given = (
        given.tolist()
        if hasattr(given, "tolist")
        else [row.tolist() if hasattr(row, "tolist") else row for row in given]
    )
    rows = given if len(given) and isinstance(given[0], Sequence) else [given]
    if any(len(row) != num_classes for row in rows):
        raise ValueError(
            f"{name}: {[len(row) for row in rows]} numbers, but the classifier has {num_classes} classes: give one for "
            "each class."
        )
    found = [torch.tensor([*row], dtype=torch.float64) for row in rows]
    if not all(bool(row.isfinite().all()) for row in found):
        raise ValueError(f"{name}={rows}: give finite numbers.")
    return found


def _entry(rows: list[Tensor], loader: int) -> Tensor | None:
    return rows[loader if len(rows) > 1 else 0] if rows else None
