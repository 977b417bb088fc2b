"""Copies of a user's network that are run beside it, and have nothing of it.

``copy.deepcopy`` takes functions as they are. One that stands on a layer in the place of its ``forward``, or hooked
to it, may hold the layer, or another that is trained: the copy would then run a part of the network itself.
"""

import copy
import dis
import functools
from collections.abc import Callable
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from lightning_feat.joints.features.taps import Ear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_COLLECTING = ("append", "extend", "update", "__setitem__", "setattr")  # none of them a method of tensors


def independent_copy(network: nn.Module, name: str) -> nn.Module:
    """A deep copy that shares no state with ``network``, functions on its layers and what these hold included.

    Hooks that put out nothing, such as those that collect features, are left out: they would hear the copy as well.
    What was compiled is not compiled in the copy.

    Args:
        network: an ``nn.Module``, or the wrapper of a compiled one.
        name: of the network, for errors.

    Raises:
        ValueError: if a function on a layer holds something that cannot be copied.
    """
    network = getattr(network, "_orig_mod", network)
    hooks = [hook for part in network.modules() for kind in _HOOKS for hook in vars(part)[kind].values()]
    memo: dict[int, Any] = {id(hook): _hears_nothing for hook in hooks if _only_hears(hook)}
    for value in [value for part in network.modules() for value in vars(part).values()]:
        if isinstance(value, Tensor) and not value.is_leaf:  # features that a layer keeps, weights that a hook computes
            memo[id(value)] = value.detach().clone()
    copied = copy.deepcopy(network, memo)
    try:
        for part in list(network.modules()):
            twin = memo[id(part)]
            for attribute, value in vars(part).items():
                if _is_function(value):
                    twin.__dict__[attribute] = _copied(value, memo)
            for kind in _HOOKS:
                for key, hook in vars(part)[kind].items():
                    if _is_function(hook) and id(hook) not in memo:
                        vars(twin)[kind][key] = _copied(hook, memo)
    except Exception as error:
        raise ValueError(
            f"{name or 'the module'} has a forward or a hook that was set on one of its layers and cannot be copied "
            f"({type(error).__name__}: {error}), so that a frozen copy would run the network itself: make it a method "
            "of the layer's class, or give a trunk without it (argument `trunk`)."
        ) from error
    return copied


def _hears_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in the place of a hook in a copy."""


def _is_function(value: Any) -> bool:
    return isinstance(value, FunctionType) or hasattr(value, "_torchdynamo_orig_callable")


def _copied(function: Any, memo: dict[int, Any]) -> Any:
    """A function with copies of what it holds: in its closure, its defaults, and the global names it uses."""
    if id(function) in memo:
        return memo[id(function)]
    compiled = getattr(function, "_torchdynamo_orig_callable", None)
    if compiled is not None:
        found = _held(compiled, memo)
        memo[id(function)] = found
        return found
    if not isinstance(function, FunctionType) or (function.__closure__ is None and _is_of_torch(function)):
        return function
    cells = tuple(CellType() for _ in function.__closure__ or ())
    # The names that hold a network or what it collects; not those of modules, classes and functions without such.
    used = {name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__}
    kept = {name: value for name, value in used.items() if _is_state(value)}
    names = {**function.__globals__, **{name: _held(value, memo) for name, value in kept.items()}} if kept else None
    twin = FunctionType(
        function.__code__,
        function.__globals__ if names is None else names,
        function.__name__,
        _held(function.__defaults__, memo),
        cells,
    )
    memo[id(function)] = twin  # before its closure, which may hold itself
    for new, old in zip(cells, function.__closure__ or (), strict=True):
        if old != CellType():  # a name that is not bound yet
            new.cell_contents = _held(old.cell_contents, memo)
    twin.__kwdefaults__ = _held(function.__kwdefaults__, memo)
    twin.__dict__.update({key: value for key, value in vars(function).items() if key != "__wrapped__"})
    return twin


def _held(value: Any, memo: dict[int, Any]) -> Any:
    if _is_function(value):
        return _copied(value, memo)
    if isinstance(value, MethodType):
        return MethodType(_held(value.__func__, memo), _held(value.__self__, memo))
    if isinstance(value, functools.partial):
        keywords = {key: _held(entry, memo) for key, entry in value.keywords.items()}
        return functools.partial(_held(value.func, memo), *(_held(entry, memo) for entry in value.args), **keywords)
    if isinstance(value, ModuleType):
        return value
    return copy.deepcopy(value, memo)


def _is_state(value: Any) -> bool:
    """Of what a global name stands for: whether a copy must have its own."""
    if isinstance(value, (nn.Module, Tensor, MethodType, functools.partial, list, dict, set)):
        return True
    return _is_function(value) and _holds_a_network(value)


def _holds_a_network(function: Any, depth: int = 0) -> bool:
    function = getattr(function, "_torchdynamo_orig_callable", function)
    if isinstance(function, MethodType):
        return isinstance(function.__self__, nn.Module)
    if not isinstance(function, FunctionType) or depth > 3:
        return False
    if function.__closure__ is None and _is_of_torch(function):
        return False
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    named = [function.__globals__.get(name) for name in _names(function.__code__)]
    held = [*cells, *named, *(function.__defaults__ or ())]
    return any(isinstance(value, (nn.Module, Tensor)) or _holds_a_network(value, depth + 1) for value in held)


def _names(code: Any) -> list[str]:
    inner = [name for const in code.co_consts if hasattr(const, "co_names") for name in _names(const)]
    return [*code.co_names, *inner]


def _only_hears(hook: Any) -> bool:
    """Whether a forward hook can change nothing: by its code it returns None, or what collecting returns."""
    if isinstance(hook, functools.partial):
        return _only_hears(hook.func)
    if isinstance(hook, BuiltinMethodType):
        return True
    if isinstance(getattr(hook, "__self__", None), Ear):
        return True
    code = _code_of(hook)
    return code is not None and _returns_nothing(code)


def _code_of(hook: Callable[..., Any]) -> Any:
    function = hook if isinstance(hook, (FunctionType, MethodType)) else type(hook).__call__
    function = getattr(function, "__func__", function)
    return None if _is_of_torch(function) else getattr(function, "__code__", None)


def _is_of_torch(function: Any) -> bool:  # where spectral_norm and pruning compute a weight in a hook, say
    return (getattr(function, "__module__", None) or "").partition(".")[0] == "torch"


def _returns_nothing(code: Any) -> bool:
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "RESUME", "PRECALL", "NOP")]
    collects = any(step.argval in _COLLECTING for step in steps if step.opname.startswith("LOAD_"))
    for before, step in zip([None, *steps], steps, strict=False):
        if step.opname == "RETURN_CONST" and step.argval is not None:
            return False
        if step.opname == "RETURN_VALUE" and before is not None:
            returns_none = before.opname == "LOAD_CONST" and before.argval is None
            if not returns_none and not (collects and before.opname.startswith("CALL")):
                return False
    return True
