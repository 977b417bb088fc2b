"""What a constructor is given, checked by its annotations: the one place for it. Standard library alone.

A sweep brings numbers of numpy, a script a tuple or a path, a slip a string where a list is meant. What can only mean
one thing is taken as that and becomes a plain Python value, so that it can be saved, sent to a worker and loaded by
``weights_only``; the rest is an error that names argument, value and what to give.
"""

import collections.abc
import dataclasses
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

Init = TypeVar("Init", bound=Callable[..., None])
_REFUSED = object()
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    type(None): "None",
}
_PLURAL = {int: "whole numbers", float: "numbers", bool: "True or False", str: "strings"}


def checked(init: Init) -> Init:
    """Decorate an ``__init__``: its arguments are checked by their annotations, and made plain, before it runs.

    ``ValueError`` is raised for one that does not fit. Not for a module whose ``__init__`` calls
    ``save_hyperparameters``, which looks at the frames between; see ``baselines.classifier``.

    Example:
        >>> class Every:
        ...     @checked
        ...     def __init__(self, n: int = 1, layers: list[str] | None = None) -> None:
        ...         self.n, self.layers = n, layers
        >>> Every(2.0, "fc").layers
        ['fc']
        >>> Every("two")
        Traceback (most recent call last):
            ...
        ValueError: Every: n='two': give a whole number.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError:
            init(self, *args, **kwargs)  # Python says what is missing or unknown
            raise
        bound.arguments.update(checked_values(init, bound.arguments, type(self).__name__))
        init(*bound.args, **bound.kwargs)

    wrapper._checks_arguments = True  # type: ignore[attr-defined]
    return cast(Init, wrapper)


def check_fields(instance: Any) -> None:
    """The same for the fields of a dataclass, in its ``__post_init__``."""
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value = _checked(field.name, getattr(instance, field.name), hints[field.name], type(instance).__name__)
        object.__setattr__(instance, field.name, value)  # it may be frozen


def checked_values(init: Callable[..., Any], arguments: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Those of the ``arguments`` that ``init`` annotates, as they should be. Raises ``ValueError`` for one that does
    not fit.
    """
    variable = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    named = {name for name, parameter in inspect.signature(init).parameters.items() if parameter.kind not in variable}
    hints = typing.get_type_hints(init)
    return {
        name: _checked(name, value, hints[name], owner)
        for name, value in arguments.items()
        if name in hints and name in named
    }


def plain(value: Any) -> Any:
    """A number, bool or string of another library, or of an enumeration, as Python's own; anything else as it is."""
    if isinstance(value, (str, bool, int, float)) and type(value) in (str, bool, int, float):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # of numpy, or a tensor
        return value.item()
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    return value


def _checked(name: str, value: Any, hint: Any, owner: str) -> Any:
    fitted = _fitted(value, hint)
    if fitted is _REFUSED:
        raise ValueError(f"{owner}: {name}={_shown(value)}: {_wanted(hint)}.")
    return fitted


def _fitted(value: Any, hint: Any) -> Any:
    options = _options(hint)
    for candidate in (value, plain(value)):
        for option in options:
            if _is_exactly(candidate, option):
                return candidate
    for option in options:
        fitted = _converted(plain(value), option)
        if fitted is not _REFUSED:
            return fitted
    return _REFUSED


def _options(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return [option for part in get_args(hint) for option in _options(part)]
    return [hint]


def _is_exactly(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if hint in (str, int, bool):
        return type(value) is hint
    if hint is float:
        return type(value) is float and not math.isnan(value)
    if hint is None or hint is type(None):
        return value is None
    if origin in _COLLECTIONS or hint in _COLLECTIONS or origin in _MAPPINGS or hint in _MAPPINGS:
        return False  # their entries are looked at
    if origin is collections.abc.Callable or hint is collections.abc.Callable or hint is Callable:
        return callable(value) and not inspect.isclass(value)
    kind = origin or hint
    if inspect.isclass(kind) and not getattr(kind, "_is_protocol", False) and kind is not type:
        # Also by name: the classes of pytorch_lightning are others than those of lightning.pytorch.
        return isinstance(value, kind) or any(cls.__name__ == kind.__name__ for cls in type(value).__mro__)
    return True  # a protocol, a variable type: nothing to hold it against


def _converted(value: Any, hint: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and number and not math.isnan(value):
        return float(value)
    if hint is int and number and float(value).is_integer():
        return int(value)
    if hint is bool and number and value in (0, 1):
        return bool(value)
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    kind = get_origin(hint) or hint
    if kind in _COLLECTIONS:
        return _collection(value, kind, get_args(hint))
    if kind in _MAPPINGS and isinstance(value, Mapping):
        return _mapping(value, get_args(hint))
    if inspect.isclass(value) and kind is collections.abc.Callable:
        return value  # a class is called like a function, but anything else that fits comes first
    return _REFUSED


def _collection(value: Any, kind: Any, entries: tuple[Any, ...]) -> Any:
    if isinstance(value, str):
        # A string is a sequence of letters, which nobody means.
        value = [value] if entries[:1] == (str,) else None
    elif hasattr(value, "tolist") and not isinstance(value, Sequence):  # of numpy, or a tensor
        value = value.tolist()
    if isinstance(value, (Mapping, Set, bytes)) or not isinstance(value, (Sequence, collections.abc.ValuesView)):
        return _REFUSED
    if kind is tuple and (len(entries) != 2 or entries[1] is not ...):
        if entries and len(entries) != len(value):
            return _REFUSED
        hints = entries or (Any,) * len(value)
    else:
        hints = (entries[0] if entries else Any,) * len(value)
    if hints and hints[0] in (int, str) and all(type(entry) is hint for entry, hint in zip(value, hints, strict=True)):
        fitted = [*value]  # a plan has a number for each of a million examples
    else:
        fitted = [_fitted(entry, hint) for entry, hint in zip(value, hints, strict=True)]
    if any(entry is _REFUSED for entry in fitted):
        return _REFUSED
    unchanged = all(new is old for new, old in zip(fitted, value, strict=True))
    if unchanged and isinstance(value, kind):
        return value
    return tuple(fitted) if kind is tuple or (kind is not list and isinstance(value, tuple)) else fitted


def _mapping(value: Mapping[Any, Any], entries: tuple[Any, ...]) -> Any:
    key_hint, entry_hint = entries or (Any, Any)
    fitted = {_fitted(key, key_hint): _fitted(entry, entry_hint) for key, entry in value.items()}
    if _REFUSED in fitted or any(entry is _REFUSED for entry in fitted.values()):
        return _REFUSED
    return value if type(value) is dict and all(fitted[key] is value[key] for key in value if key in fitted) else fitted


def _shown(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:57]}..."


def _wanted(hint: Any) -> str:
    options = _options(hint)
    choices = [repr(choice) for option in options if get_origin(option) is Literal for choice in get_args(option)]
    others = list(dict.fromkeys(_word(option) for option in options if get_origin(option) is not Literal))
    verb = "choose" if choices and set(others) <= {"None"} else "give"
    return f"{verb} {_listed([*(others if verb == 'give' else []), *choices, *(others if verb == 'choose' else [])])}"


def _word(hint: Any) -> str:
    if hint in _WORDS:
        return _WORDS[hint]
    kind, entries = get_origin(hint) or hint, get_args(hint)
    if kind in _COLLECTIONS:
        inner = " or ".join(_plural(option) for option in _options(entries[0])) if entries else ""
        return f"a list of {inner}" if inner else "a list"
    if kind in _MAPPINGS:
        return "a dict"
    if kind is collections.abc.Callable:
        return "a function"
    name = getattr(kind, "__name__", str(kind))
    return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"


def _plural(hint: Any) -> str:
    word = _PLURAL.get(hint, _word(hint))
    return f"lists{word.removeprefix('a list')}" if word.startswith("a list") else word.removeprefix("a ")


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


_COLLECTIONS = (list, tuple, Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPPINGS = (dict, Mapping)
