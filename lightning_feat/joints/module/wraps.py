"""Wrap methods of one LightningModule, reversibly: the only place where a user's module is patched.

A wrap is an instance attribute that shadows the method of the class and calls a chain of *links* around it. A link is
any object with ``__call__(module, call, *args, **kwargs)``, where ``call`` is the method as it was (or the next
link). Links are stored on the module under a key, so that setting up twice (a second ``fit``, ``Tuner.lr_find``, a
crash before ``teardown``) changes nothing.

Why not a closure: ``copy.deepcopy`` (weight averaging) would leave the copy calling the network of the original, and
pickling would fail. Here the original is looked up through ``self`` at call time, links are objects that are copied
with the module, and the wrapping function carries the name of the method, by which a bound method is pickled.
"""

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, Protocol

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

_KEY = "_feat_wraps"


class Link(Protocol):
    """What stands around a method."""

    def __call__(self, module: LightningModule, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call ``call(*args, **kwargs)``, or not, and return what the method shall return."""


class _Wrap:
    """The links around one method, and the instance attribute that the wrap displaced (a compiled step, say)."""

    def __init__(self, displaced: Any) -> None:
        self.displaced = displaced
        self.links: dict[str, Link] = {}


def add_link(module: LightningModule, method: str, key: str, link: Link, innermost: bool = False) -> None:
    """Put ``link`` around ``module.method``, outside the links that are there, or inside all of them; the same ``key``
    replaces the earlier link.
    """
    wraps: dict[str, _Wrap] = module.__dict__.setdefault(_KEY, {})
    if not _is_wrapped(module, method):  # a pickled module comes back with its links, but with the method of its class
        wraps[method] = _Wrap(module.__dict__.get(method))
        module.__dict__[method] = MethodType(_wrapper(type(module), method), module)
    links = wraps[method].links
    wraps[method].links = {key: link, **links} if innermost and key not in links else {**links, key: link}


def get_link(module: LightningModule, method: str, key: str) -> Link | None:
    """The link stored under ``key`` around ``module.method``, or None."""
    wrap = module.__dict__.get(_KEY, {}).get(method)
    return wrap.links.get(key) if wrap is not None and _is_wrapped(module, method) else None


def remove_link(module: LightningModule, method: str, key: str) -> None:
    """Take the link away; with the last one the method is what it was before. Nothing happens if there is none."""
    wraps: dict[str, _Wrap] = module.__dict__.get(_KEY, {})
    wrap = wraps.get(method)
    if wrap is None or wrap.links.pop(key, None) is None or wrap.links:
        return
    del wraps[method]
    if not wraps:
        del module.__dict__[_KEY]
    if getattr(module.__dict__.get(method), "_feat_wrapper", False):
        del module.__dict__[method]
        if wrap.displaced is not None:
            module.__dict__[method] = wrap.displaced


def displaced(module: LightningModule) -> list[Any]:
    """The instance attributes that wraps stand in the place of, such as a compiled step."""
    return [wrap.displaced for wrap in module.__dict__.get(_KEY, {}).values() if wrap.displaced is not None]


def overrides(module: LightningModule, hook: str) -> bool:
    """Whether the class of ``module`` has a ``hook`` of its own; also for modules of ``pytorch_lightning``, whose base
    class is another than that of ``lightning.pytorch``.
    """
    base = next(cls for cls in type(module).__mro__ if cls.__name__ == "LightningModule")
    return is_overridden(hook, module, parent=base)


def _is_wrapped(module: LightningModule, method: str) -> bool:
    has_links = method in module.__dict__.get(_KEY, {})
    return has_links and getattr(module.__dict__.get(method), "_feat_wrapper", False)


def _wrapper(cls: type, method: str) -> Callable[..., Any]:
    original = getattr(cls, method)

    @functools.wraps(original)  # pickle reads the name
    def wrapper(self: LightningModule, *args: Any, **kwargs: Any) -> Any:
        wrap: _Wrap = self.__dict__[_KEY][method]
        call = wrap.displaced or functools.partial(getattr(type(self), method), self)
        for link in wrap.links.values():
            call = functools.partial(link, self, call)
        return call(*args, **kwargs)

    # Lightning reads the signature of training_step. It also follows __wrapped__ to tell whether a hook is
    # overridden, and a wrapped configure_model of the base class would then never be called.
    wrapper.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    del wrapper.__wrapped__  # type: ignore[attr-defined]
    wrapper._feat_wrapper = True  # type: ignore[attr-defined]
    return wrapper
