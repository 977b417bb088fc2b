"""Hooks that change the tokens or the features of a tower, reversibly; ``clip_towers`` knows where they go.

A hook is an object that hangs on its layer and holds what it calls, so that a copy or a pickle of the model takes it
along (see ``wraps`` for why not a closure). :func:`remove_hooks` takes it away from those too.

Shapes: N samples, T tokens, D width.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_feat.joints.features.heads import forget_compiled_code

Call: TypeAlias = Callable[[Tensor], Tensor | None]


class Order:
    """Which axis of a tensor between the blocks counts samples: given, or learned from the first pass that tells."""

    def __init__(self, batch_first: bool | None) -> None:
        self.batch_first = batch_first
        self._entered: tuple[int, ...] | None = None

    def enter(self, tokens_NTD: Tensor) -> None:
        """Note the sizes of what the blocks will get."""
        if self.batch_first is None:
            self._entered = tuple(tokens_NTD.shape[:2])

    def is_batch_first(self, tokens: Tensor) -> bool:
        """Whether ``tokens`` is ``(N, T, D)``, and not ``(T, N, D)``."""
        if self.batch_first is None:
            here, entered = tuple(tokens.shape[:2]), self._entered
            if entered is None or entered[0] == entered[1] or here not in (entered, entered[::-1]):
                raise ValueError(
                    f"a block got tokens {tuple(tokens.shape)}, and the embeddings gave (samples, tokens)={entered}: "
                    "whether samples come first cannot be told. Say batch_first=True or False to find_clip_towers."
                )
            self.batch_first = here == entered  # kept: a block recomputed in backward may follow another forward
        return self.batch_first


class Hook:
    """Calls ``call(tensor)`` on what goes into or comes out of a layer; None leaves it as it is."""

    def __init__(self, call: Call, order: Order | None = None, enters: bool = False) -> None:
        self.call, self.order, self.enters = call, order, enters
        self.active = True

    def on_input(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            changed = self._changed(args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)
        name = next((name for name, value in kwargs.items() if isinstance(value, Tensor) and value.ndim == 3), None)
        if name is None:
            raise ValueError(f"{type(layer).__name__} was called without a tensor of tokens (N, T, D).")
        changed = self._changed(kwargs[name])
        return None if changed is None else (args, {**kwargs, name: changed})

    def on_output(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, (tuple, list)):  # (tokens, attention) or (pooled, tokens)
            changed = self._changed(output[0])
            return None if changed is None else type(output)((changed, *output[1:]))
        return self._changed(output)

    def _changed(self, tensor: Tensor) -> Tensor | None:
        changed = None
        if self.active:
            if self.order is None or self.enters or self.order.is_batch_first(tensor):
                changed = self.call(tensor)
            else:
                changed = self.call(tensor.transpose(0, 1))
                changed = None if changed is None else changed.transpose(0, 1)
        if self.order is not None and self.enters:
            self.order.enter(tensor if changed is None else changed)
        return changed


class HookHandle:
    """A hook that is in place. ``active = False`` makes it do nothing for a while."""

    def __init__(self, model: nn.Module, hook: Hook, remove: Callable[[], None]) -> None:
        self._model, self._hook, self._remove = model, hook, remove
        forget_compiled_code(model)

    @property
    def active(self) -> bool:
        return self._hook.active

    @active.setter
    def active(self, value: bool) -> None:
        self._hook.active = value

    def remove(self) -> None:
        """Take the hook away. Without effect the second time."""
        self._remove()
        forget_compiled_code(self._model)


class Handles:
    """Several handles as one."""

    def __init__(self, handles: list[HookHandle]) -> None:
        self._handles = handles

    @property
    def active(self) -> bool:
        return self._handles[0].active

    @active.setter
    def active(self, value: bool) -> None:
        for handle in self._handles:
            handle.active = value

    def remove(self) -> None:
        """Take all of them away. Without effect the second time."""
        for handle in self._handles:
            handle.remove()


class IdsHook(Hook):
    """Gives the ids of whole texts ``(N, L)`` their new places, and so what comes along, as an attention mask."""

    def __init__(self, placing: Any) -> None:
        super().__init__(_nothing)
        self.placing = placing

    def on_input(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = next((value for value in (*args, *kwargs.values()) if _is_ids(value)), None)
        if not self.active or ids is None:
            return None
        placed = self.placing.place(ids)

        def moved(value: Any) -> Any:
            if value is ids:
                return placed.ids
            if isinstance(value, Tensor) and value.shape == ids.shape:
                return self.placing.mask(placed, value)
            return value

        kept = {name: value if name == "position_ids" else moved(value) for name, value in kwargs.items()}
        return tuple(moved(value) for value in args), kept


class TurnHook(Hook):
    """Rotary positions for the tokens that prompts add to a block: none, as of a class token.

    timm gives a block its ``rope`` for the patches, as sines and cosines ``(..., patches, 2 d)``.
    """

    def __init__(self, num_prefix: int) -> None:
        super().__init__(_nothing)
        self.num_prefix = num_prefix

    def on_input(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rope = kwargs.get("rope")
        if not self.active or not args or rope is None:
            return None
        missing = args[0].shape[1] - self.num_prefix - rope.shape[-2]
        if missing <= 0:
            return None
        sin, cos = rope[..., :1, :].chunk(2, -1)
        still = torch.cat([torch.zeros_like(sin), torch.ones_like(cos)], dim=-1)
        still = still.expand(*still.shape[:-2], missing, still.shape[-1])
        return args, {**kwargs, "rope": torch.cat([rope, still], dim=-2)}


def _nothing(tokens: Tensor) -> None:
    return None


def _is_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.dtype in (torch.int64, torch.int32)


def hook_ids(root: nn.Module, entrance: nn.Module | None, placing: Any, by_encode_text: bool) -> HookHandle | None:
    """Put ``placing`` where the ids of whole texts enter; None where that is not known."""
    if entrance is None:
        return None
    hook = IdsHook(placing)
    if not by_encode_text:
        return hook_input(root, entrance, hook)
    if not isinstance(entrance.__dict__.get("encode_text"), (EncodeText, type(None))):
        return None
    return hook_encode_text(root, entrance, hook)


def hook_input(model: nn.Module, layer: nn.Module, hook: Hook) -> HookHandle:
    """Put ``hook`` before ``layer``, a part of ``model``."""
    return HookHandle(model, hook, layer.register_forward_pre_hook(hook.on_input, with_kwargs=True).remove)


def hook_output(model: nn.Module, layer: nn.Module, hook: Hook) -> HookHandle:
    """Put ``hook`` after ``layer``, a part of ``model``."""
    return HookHandle(model, hook, layer.register_forward_hook(hook.on_output).remove)


class EncodeText:
    """Stands for ``model.encode_text`` where no layer gives the text features: the projection is a bare matrix there.

    An attribute of the instance, which shadows the method of its class, and goes with the last of its hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.hooks: list[Hook] = []

    def __call__(self, text: Tensor, normalize: bool = False) -> Tensor:
        cls: Any = type(self.model)
        for hook in self.hooks:
            if isinstance(hook, IdsHook):
                entered = hook.on_input(self.model, (text,), {})
                text = text if entered is None else entered[0][0]
        features: Tensor = cls.encode_text(
            self.model, text
        )  # OpenAI's knows no `normalize`, and open_clip's has it False
        for hook in self.hooks:
            changed = None if isinstance(hook, IdsHook) else hook.on_output(self.model, (), features)
            features = features if changed is None else changed
        return functional.normalize(features, dim=-1) if normalize else features


def hook_encode_text(root: nn.Module, model: nn.Module, hook: Hook) -> HookHandle:
    """Put ``hook`` on what ``model.encode_text`` gives, before that is normalised."""
    wrapped = model.__dict__.get("encode_text")
    if not isinstance(wrapped, EncodeText):
        if wrapped is not None:
            raise ValueError(f"{type(model).__name__}.encode_text is already replaced on this instance, by {wrapped}.")
        wrapped = model.__dict__["encode_text"] = EncodeText(model)
    entry = wrapped
    entry.hooks.append(hook)

    def remove() -> None:
        if hook in entry.hooks:
            entry.hooks.remove(hook)
            if not entry.hooks:
                del model.__dict__["encode_text"]

    return HookHandle(root, hook, remove)


def remove_hooks(model: nn.Module) -> None:
    """Take every hook of ours off ``model`` and its parts, though it be a copy, to which no handle leads."""
    for part in model.modules():
        for key, registered, _ in [*_installed(part)]:
            del registered[key]
            for flags in (part._forward_pre_hooks_with_kwargs, part._forward_hooks_with_kwargs):
                flags.pop(key, None)
        if isinstance(part.__dict__.get("encode_text"), EncodeText):
            del part.__dict__["encode_text"]
    forget_compiled_code(model)


def calls_on(layer: nn.Module) -> list[Call]:
    """What the hooks of ours on this one layer call."""
    wrapped = layer.__dict__.get("encode_text")
    return [hook.call for _, _, hook in _installed(layer)] + (
        [hook.call for hook in wrapped.hooks] if isinstance(wrapped, EncodeText) else []
    )


def installed_on(layer: nn.Module) -> list[Hook]:
    """The hooks of ours on this one layer."""
    return [hook for _, _, hook in _installed(layer)]


def _installed(layer: nn.Module) -> Iterator[tuple[int, dict[int, Any], Hook]]:
    registers: tuple[Any, Any] = (layer._forward_pre_hooks, layer._forward_hooks)
    for registered in registers:
        for key, function in registered.items():
            owner = getattr(function, "__self__", None)
            if isinstance(owner, Hook):
                yield key, registered, owner
