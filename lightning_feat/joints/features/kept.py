"""What a forward, or the reading of a weight, may write, kept and put back."""

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LARGE = 2**28  # bytes of a tensor above which its copy waits in the memory of the host
_MACHINERY = frozenset(nn.Module().__dict__) | {"_feat_wraps", "_trainer", "_fabric", "_forward_hooks"}
_PLAIN = (Tensor, bool, int, float, complex, str, bytes, type(None), list, dict, set, deque, tuple)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_DEPTH = 6  # a subset of a data set with a list of transforms that keep one each has 4
_MOST_ENTRIES = 64  # of a list of transforms, not of paths


def remember(module: nn.Module, parameters: bool = False) -> Callable[[], bool]:
    """What a forward may write into ``module``, as a function that puts it back and says whether a parameter had
    changed. Objects of other kinds keep what they hold; ``parameters`` are looked at where asked for.
    """
    seen: set[int] = set()
    parts = [(_Kept(part._buffers, seen), _Kept(part.__dict__, seen, _MACHINERY)) for part in module.modules()]
    weights = _Kept({str(i): p for i, p in enumerate(module.parameters())} if parameters else {}, seen)
    generators = remember_generators(module)

    def put_back() -> bool:
        generators()
        with torch.no_grad():
            for buffers, attributes in parts:
                buffers.put_back()
                attributes.put_back()
            return weights.put_back()

    return put_back


def remember_generators(*owners: Any) -> Callable[[], None]:
    """Where the generators of random numbers stand that these objects, or what they hold, keep for themselves (numpy's
    ``default_rng(seed)`` in a data set or a module, say), as a function that puts them back.
    """
    found: dict[int, _State] = {}
    seen: set[int] = set()
    layer = [value for owner in owners for value in (_attributes(owner) if isinstance(owner, nn.Module) else [owner])]
    for _ in range(_DEPTH):
        held: list[Any] = []
        for value in layer:
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, _GENERATORS):
                found[id(value)] = _State(value)
            else:
                held += _held_by(value)
        layer = held

    def put_back() -> None:
        for state in found.values():
            state.put_back()

    return put_back


def _attributes(module: nn.Module) -> list[Any]:
    return [value for part in module.modules() for name, value in vars(part).items() if name not in _MACHINERY]


def _held_by(value: Any) -> list[Any]:
    if isinstance(value, (Tensor, np.ndarray, type, nn.Module)):
        return []
    if isinstance(value, (list, tuple, dict)):
        entries = value.values() if isinstance(value, dict) else value
        return [*entries] if len(value) <= _MOST_ENTRIES else []
    attributes: Any = getattr(value, "__dict__", {})
    return [*attributes.values()]


class _Kept:
    """The entries of a dictionary as they are now: which objects, and what these hold."""

    def __init__(self, entries: Any, seen: set[int], leave: frozenset[str] = frozenset()) -> None:
        self.entries, self.leave = entries, leave
        kept = ((name, value) for name, value in entries.items() if name not in leave and not _is_wrap(value))
        self.values = {name: (value, _content(value, seen)) for name, value in kept}

    def put_back(self) -> bool:
        """Whether the content of a tensor, or another object, had to be."""
        changed = False
        for name, (value, content) in self.values.items():
            now = self.entries.get(name, self)
            if now is not value and not _is_wrap(now):
                self.entries[name], changed = value, True
            changed = (content is not None and content.put_back()) or changed
        for name in [*self.entries]:
            if name not in self.values and name not in self.leave and isinstance(self.entries[name], _PLAIN):
                del self.entries[name]
                changed = True
        return changed


def _is_wrap(value: Any) -> bool:
    """Whether it is a wrapped method: links come and go by themselves, also inside a pass."""
    return bool(getattr(value, "_feat_wrapper", False))


class _Numbers:
    """The numbers in a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version
        data = tensor.detach()
        self.copy = data.to("cpu", copy=True) if data.nbytes > _LARGE else data.clone()

    def put_back(self) -> bool:
        # Whatever the version says: BatchNorm writes its statistics without counting. Nor does this count.
        self.tensor.data.copy_(self.copy)
        return self.tensor._version != self.version


class _Entries:
    """What a list, a set or a queue holds."""

    def __init__(self, container: Any, seen: set[int]) -> None:
        self.container, self.entries = container, [*container]
        self.contents = [content for entry in self.entries if (content := _content(entry, seen)) is not None]

    def put_back(self) -> bool:
        changed = len(self.container) != len(self.entries) or any(
            a is not b for a, b in zip(self.container, self.entries, strict=True)
        )
        if changed:
            self.container.clear()
            add = self.container.update if isinstance(self.container, set) else self.container.extend
            add(self.entries)
        inside = [content.put_back() for content in self.contents]  # all of them
        return changed or any(inside)


class _State:
    """Where a generator of random numbers stands that someone keeps for himself."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        self.state: Any
        if isinstance(generator, np.random.Generator):
            self.state = generator.bit_generator.state
        else:
            self.state = generator.getstate() if isinstance(generator, random.Random) else generator.get_state()

    def put_back(self) -> None:
        if isinstance(self.generator, np.random.Generator):
            self.generator.bit_generator.state = self.state
        elif isinstance(self.generator, random.Random):
            self.generator.setstate(self.state)
        else:
            self.generator.set_state(self.state)


def _content(value: Any, seen: set[int]) -> "_Numbers | _Entries | _Kept | None":
    if id(value) in seen:
        return None  # shared, or a circle: kept once
    if isinstance(value, Tensor):
        seen.add(id(value))
        movable = not value.is_meta and not value.is_inference() and value.layout == torch.strided
        return _Numbers(value) if movable else None
    if type(value) in (list, set, deque):
        seen.add(id(value))
        return _Entries(value, seen)
    if isinstance(value, dict):
        seen.add(id(value))
        return _Kept(value, seen)
    return None
