"""Callbacks that a LightningModule brings along, so that every Trainer, checkpoint and notebook of it has them."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from lightning.pytorch import Callback, LightningModule
from torch import nn

from lightning_feat.joints.run.twins import callbacks_of

if TYPE_CHECKING:
    _Base = LightningModule
else:
    _Base = object

_BROUGHT = "_brought_callbacks"  # on a module: what it brings; on a callback: that some module brings it

Options: TypeAlias = Mapping[str, Any] | None
DEFAULTS: Options = MappingProxyType({})  # with the callback's own defaults


class CallbacksMixin(_Base):
    """For a LightningModule that brings callbacks of its own, as if each Trainer had been given them first.

    ``self.bring(...)`` in ``__init__`` takes any callback. The mixins of the families derive from this class and have
    an attribute for each callback of theirs: the keywords of its constructor, or None to leave it out. They are set in
    the class, or by one call of ``self.use(...)`` in ``__init__``, and mixins can be stacked.

    The callbacks are made once for each module and come first in the list of the Trainer, before averaging callbacks,
    which copy the module. Those given to the Trainer stay, also of the same class; two of one class on the same layer
    are refused. A ``configure_callbacks`` of your own adds to them, whether it calls ``super()`` or not. Checkpoints
    are those of the callbacks in a Trainer, and either can resume the other. ``load_state_dict`` and
    ``load_from_checkpoint`` put a head in first where the weights have one.

    Example:
        >>> from lightning.pytorch import LightningModule
        >>> from lightning_feat.callbacks import LinearProbe
        >>> class Mine(CallbacksMixin, LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.bring(LinearProbe(every_n_epochs=10))
        >>> [type(callback).__name__ for callback in Mine().configure_callbacks()]
        ['LinearProbe']
    """

    brings: ClassVar[Sequence[type[Callback]]] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__[_BROUGHT] = _Brought()
        self.register_load_state_dict_pre_hook(_build_heads)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        names = [base.__name__ for base in cls.__mro__]
        if "LightningModule" in names and names.index("LightningModule") < names.index("CallbacksMixin"):
            raise TypeError(
                f"class {cls.__name__}: put the mixins before LightningModule, which else hides their "
                f"configure_callbacks and __init__: class {cls.__name__}(..., LightningModule)."
            )
        own = cls.__dict__.get("configure_callbacks")
        if own is not None:
            cls.configure_callbacks = _with_brought(own)  # type: ignore[method-assign]

    def bring(self, *callbacks: Callback) -> None:
        """Bring these callbacks; for ``__init__``, after ``super().__init__()``. One that is there stays as it is."""
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(f"bring takes callbacks, got {callback!r}: for options of a mixin there is use(...).")
        given = self._brought().given
        given += [callback for callback in callbacks if not _among(callback, given)]

    def use(self, **options: Options) -> None:
        """Set options of the mixins, ``self.use(grassmann_head={"subspace_dim": 4})``; for ``__init__``.

        Raises:
            TypeError: if no mixin of this class has such an option.
            RuntimeError: if the callbacks have been made already.
        """
        known = _options_of(type(self))
        for name in options:
            if name not in known:
                has = f"it has: {', '.join(known)}" if known else "derive it from a mixin that has, or use bring(...)"
                raise TypeError(f"{type(self).__name__} has no option {name!r}; {has}.")
        if self._brought().made is not None:
            raise RuntimeError("the callbacks of this module are in use already: call use(...) in __init__.")
        for name, value in options.items():
            setattr(self, name, value)

    def configure_callbacks(self) -> list[Callback]:
        """What this module brings, in the order of its mixins; under a Trainer also what has to come after it."""
        return _merged(self, super().configure_callbacks)

    def brought_callbacks(self) -> list[Callback]:
        """The callbacks that come with this module, made at the first call."""
        brought = self._brought()
        if brought.made is None:
            options = ((cls, getattr(self, name)) for name, cls in _options_of(type(self)).items())
            brought.made = [cls(**chosen) for cls, chosen in options if chosen is not None]
        callbacks = [*brought.made, *brought.given]
        for callback in callbacks:
            callback.__dict__[_BROUGHT] = True
        return callbacks

    def _brought(self) -> "_Brought":
        if _BROUGHT not in self.__dict__:
            raise RuntimeError(f"{type(self).__name__}: call super().__init__() before bring(...) or use(...).")
        brought: _Brought = self.__dict__[_BROUGHT]
        return brought


class _Brought:
    """The callbacks of one module. A copy of the module, as averaging makes one, makes its own."""

    def __init__(self, given: Sequence[Callback] = ()) -> None:
        self.given: list[Callback] = [*given]
        self.made: list[Callback] | None = None
        self.asking = False

    def __deepcopy__(self, memo: Any) -> "_Brought":
        return _Brought(self.given)


def option_name(cls: type[Callback]) -> str:
    """The option of a mixin for this callback: ``GrassmannHead`` has ``grassmann_head``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()


def _options_of(cls: type) -> dict[str, type[Callback]]:
    bases = (base for base in cls.__mro__ if "brings" in base.__dict__)
    return {option_name(callback): callback for base in bases for callback in base.__dict__["brings"]}


def _with_brought(own: Callable[..., Any]) -> Callable[..., list[Callback]]:
    """A user's own ``configure_callbacks``, with what the mixins bring where it does not call ``super()``."""

    @functools.wraps(own)
    def configure_callbacks(self: CallbacksMixin) -> list[Callback]:
        return _merged(self, functools.partial(own, self))

    return configure_callbacks


def _merged(module: CallbacksMixin, call: Callable[[], Any]) -> list[Callback]:
    """What the module brings, before all else.

    Lightning puts the callbacks of a module behind those of its Trainer, and drops those of the same class. So the
    Trainer's are handed over here, to come behind: all but those that the user's own, given by ``call``, shall replace.
    """
    mine, brought = module.brought_callbacks(), module._brought()
    if brought.asking:  # the super() of a user's own: the outer call looks at the Trainer
        return [*mine, *_listed(call())]
    brought.asking = True
    try:
        others = [callback for callback in _listed(call()) if not _among(callback, mine)]
    finally:
        brought.asking = False
    trainer = module._trainer
    if trainer is None:
        return [*mine, *others]
    kept: list[Callback] = []
    replaced: list[Callback] = []
    for callback in callbacks_of(trainer):
        if _among(callback, [*mine, *others]) or _BROUGHT in callback.__dict__:  # the latter: of an earlier module
            continue
        replaces = any(issubclass(type(other), type(callback)) for other in others)
        (replaced if replaces and type(callback) is not Callback else kept).append(callback)
    trainer.callbacks = replaced  # type: ignore[attr-defined]
    return [*mine, *kept, *others]


def _build_heads(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before weights are loaded: put in the heads that they are the weights of."""
    if isinstance(module, CallbacksMixin):
        for callback in module.brought_callbacks():
            build_for = getattr(callback, "build_for", None)
            if build_for is not None:
                names = (name for name in state_dict if name.startswith(prefix))
                build_for(module, {name.removeprefix(prefix) for name in names})


def _listed(callbacks: Any) -> list[Callback]:
    return [callbacks] if isinstance(callbacks, Callback) else [*(callbacks or ())]


def _among(callback: Callback, callbacks: Iterable[Callback]) -> bool:
    return any(callback is other for other in callbacks)
