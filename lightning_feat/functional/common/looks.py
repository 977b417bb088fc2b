"""Whether a check may look at values: on an accelerator a look waits until all that was queued has run."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_forbidden: ContextVar[bool] = ContextVar("no look at values", default=False)


@contextmanager
def without_looking() -> Iterator[None]:
    """Inside, no check looks at values, not even on a CPU, where that is free: a training step is the same on both."""
    token = _forbidden.set(True)
    try:
        yield
    finally:
        _forbidden.reset(token)


def looks_are_forbidden() -> bool:
    """Whether this is inside ``without_looking``."""
    return _forbidden.get()


def values_are_at_hand(values: Tensor) -> bool:
    """Whether looking at these values stops nothing, and is allowed."""
    return values.device.type == "cpu" and not _forbidden.get()
