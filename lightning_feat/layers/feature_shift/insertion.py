"""What layers ask of the towers they are put into, and a hold on the hooks that put them there.

``clip_towers`` has such towers; anything that does the same will do.
"""

from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn


class HookHandle(Protocol):
    """What a hook that is in place can be taken away with, or made to do nothing."""

    active: bool

    def remove(self) -> None: ...


class Tower(Protocol):
    """What is asked of a tower; see ``clip_towers``."""

    width: int
    num_features: int | None

    @property
    def blocks(self) -> Sequence[nn.Module]: ...

    def on_embeddings(
        self, hook: Callable[[Tensor], Tensor], slots: int = 0, words: MutableSequence[int] | None = None
    ) -> HookHandle: ...
    def on_block_input(self, index: int, hook: Callable[[Tensor], Tensor]) -> HookHandle: ...
    def on_features(self, hook: Callable[[Tensor], Tensor]) -> HookHandle: ...
    def hooks(self) -> Sequence[Any]: ...


class TextTower(Tower, Protocol):
    """What is asked of the text tower beside."""

    first_word: int

    def word_embeddings(self, token_ids: Tensor, length: int) -> Tensor: ...


class ImageTower(Tower, Protocol):
    """What is asked of the image tower beside."""

    def after_blocks(self, hook: Callable[[Tensor], Tensor]) -> HookHandle | None: ...


class Towers(Protocol):
    """What is asked of a pair of towers."""

    model: nn.Module

    @property
    def text(self) -> TextTower: ...
    @property
    def image(self) -> ImageTower: ...


class Insertion:
    """Hooks that were put into a model together."""

    def __init__(self) -> None:
        self._handles: list[HookHandle] = []

    def add(self, handle: HookHandle) -> None:
        """Let ``handle`` go and pause with the others."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Take them away: the model is what it was. Without effect the second time."""
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block the model computes as it did without them, for a reference pass."""
        before = [handle.active for handle in self._handles]
        try:
            for handle in self._handles:
                handle.active = False
            yield
        finally:
            for handle, active in zip(self._handles, before, strict=True):
                handle.active = active
