"""The calls by which a network may be run on a batch, written as one writes them in an error."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_feat.joints.features.batches import TARGET_NAMES, inputs_of
from lightning_feat.joints.module.wraps import overrides

Forward: TypeAlias = Callable[[LightningModule, Any], Any]


def forward_inputs(module: LightningModule, batch: Any) -> Any:
    """The usual forward pass: ``module(inputs)``, with the first entry of a tuple or list, or with the whole batch."""
    return module(inputs_of(batch))


@dataclass(frozen=True)
class LeadingEntries:
    """``module(batch[0], ..., batch[n - 1])``."""

    n: int

    def __call__(self, module: LightningModule, batch: Any) -> Any:
        return module(*batch[: self.n])

    def __str__(self) -> str:
        return f"module({', '.join(f'batch[{i}]' for i in range(self.n))})"


@dataclass(frozen=True)
class UnpackedInputs:
    """``module(*batch[0])``."""

    def __call__(self, module: LightningModule, batch: Any) -> Any:
        return module(*inputs_of(batch))

    def __str__(self) -> str:
        return "module(*batch[0])"


@dataclass(frozen=True)
class NamedEntries:
    """``module(name=batch["name"], ...)``."""

    names: tuple[str, ...]

    def __call__(self, module: LightningModule, batch: Any) -> Any:
        return module(**{name: batch[name] for name in self.names})

    def __str__(self) -> str:
        return f"module({', '.join(f'{name}=...' for name in self.names)})"


@dataclass(frozen=True)
class OneEntry:
    """``module(batch["name"])``."""

    name: Any

    def __call__(self, module: LightningModule, batch: Any) -> Any:
        return module(batch[self.name])

    def __str__(self) -> str:
        return f"module(batch[{self.name!r}])"


@dataclass(frozen=True)
class OwnStep:
    """A step of the module itself, as its class has it: without what callbacks have put around."""

    name: str

    def __call__(self, module: LightningModule, batch: Any) -> Any:
        step = getattr(type(module), self.name)
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [p for p in inspect.signature(step).parameters.values() if p.kind in kinds][2:]
        more = [0 for p in parameters if p.default is p.empty]  # batch_idx and dataloader_idx, whatever their names
        return step(module, batch, *more)

    def __str__(self) -> str:
        return self.name


def name_of(way: Forward) -> str:
    """The call, as one writes it."""
    return "module(inputs)" if way is forward_inputs else str(way)


def usual_calls(module: LightningModule, batch: Any) -> Iterator[Forward]:
    """The usual calls of ``forward`` that fit the form of the batch, the simplest first."""
    if not overrides(module, "forward"):
        return
    yield forward_inputs
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    any_number = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    most = len([p for p in parameters if p.kind in kinds])
    if isinstance(batch, Mapping):
        any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        known = {p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY}
        names = tuple(name for name in batch if isinstance(name, str) and (any_name or name in known))
        if names:
            yield NamedEntries(names)
        for name, entry in batch.items():
            if isinstance(entry, Tensor) and entry.ndim > 1 and name not in TARGET_NAMES:
                yield OneEntry(name)
    elif isinstance(batch, (tuple, list)) and batch:
        if isinstance(batch[0], (tuple, list)) and (any_number or len(batch[0]) <= most):
            yield UnpackedInputs()
        for n in range(2, (len(batch) if any_number else min(most, len(batch))) + 1):
            yield LeadingEntries(n)
