"""Run a network in the middle of a fit so that nothing of it is left: neither in the module nor in what was logged."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_feat.joints.module.wraps import add_link, remove_link

_KEY = "pass without a trace"
_LARGE = 2**28  # bytes of a tensor above which its copy waits in the memory of the host
_MACHINERY = frozenset(nn.Module().__dict__) | {"_feat_wraps", "_trainer", "_fabric", "_forward_hooks"}
_PLAIN = (Tensor, bool, int, float, complex, str, bytes, type(None), list, dict, set, deque, tuple)


@contextmanager
def without_trace(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Eval mode and no gradient; at the end all is put back that a forward or a step may write: the random number
    generators, every train or eval flag, buffers, states of metrics, and plain attributes (numbers, tensors, lists,
    dictionaries). What ``self.log`` is given inside is dropped, and loggers hear nothing.

    ``no_grad`` and not ``inference_mode``: tensors made under the latter cannot be updated in place later.
    """
    modes = [(part, part.training) for part in module.modules()]
    stage = trainer.state.stage
    put_back = remember(module)
    try:
        trainer.state.stage = RunningStage.VALIDATING  # a hook of the module that mixes training batches asks for it
        module.eval()
        with isolate_rng(), torch.no_grad(), unheard(trainer, module):
            yield
    finally:
        trainer.state.stage = stage
        for part, training in modes:
            part.training = training
        put_back()


@contextmanager
def unheard(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Nothing inside is logged."""
    loggers: list[Any] = trainer.loggers
    with ExitStack() as stack:
        for part in module.modules():  # a module that holds another logs by that one's method too
            if isinstance(getattr(part, "_current_fx_name", part), (str, type(None))):
                stack.enter_context(silent_log(part))
        if loggers:
            stack.callback(setattr, trainer, "loggers", loggers)
            trainer.loggers = [DummyLogger() for _ in loggers]
        yield


@contextmanager
def silent_log(module: Any) -> Iterator[None]:
    """Inside, ``log`` and ``log_dict`` of this LightningModule do nothing."""
    try:
        for method in ("log", "log_dict"):
            add_link(module, method, _KEY, _nothing)
        yield
    finally:
        for method in ("log", "log_dict"):
            remove_link(module, method, _KEY)


def _nothing(module: LightningModule, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    return None


def remember(module: nn.Module, parameters: bool = False) -> Callable[[], bool]:
    """What a forward may write into ``module``, as a function that puts it back and says whether a parameter had
    changed. Objects of other kinds keep what they hold; ``parameters`` are looked at where asked for.
    """
    seen: set[int] = set()
    parts = [(_Kept(part._buffers, seen), _Kept(part.__dict__, seen, _MACHINERY)) for part in module.modules()]
    weights = _Kept({str(i): p for i, p in enumerate(module.parameters())} if parameters else {}, seen)

    def put_back() -> bool:
        with torch.no_grad():
            for buffers, attributes in parts:
                buffers.put_back()
                attributes.put_back()
            return weights.put_back()

    return put_back


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
