"""Arguments that do not fit together, told at once: broadcasting would give many of them a number."""

from typing import Any

import torch
from torch import Tensor


def check_shapes(**arguments: Any) -> None:
    """Raise a ``ValueError`` unless each tensor has the dimensions that its letters name, a letter always of one size.

    Args:
        arguments: by name, a tensor, or None, and its letters: ``features=(features, "ND")``; ``"*D"`` lets any
            dimensions come before. A third entry asks for whole numbers (``int``) or for a mask (``bool``).

    Example:
        >>> check_shapes(features=(torch.ones(5, 3), "ND"), means=(torch.ones(2, 3), "CD"))
        >>> check_shapes(features=(torch.ones(5, 3), "ND"), means=(torch.ones(3, 2), "CD"))
        Traceback (most recent call last):
            ...
        ValueError: means must be (C, D) with D = 3, got (3, 2).
    """
    sizes: dict[str, int] = {}
    leading: dict[str, tuple[int, ...]] = {}
    for name, (tensor, letters, *kind) in arguments.items():
        if tensor is None:
            continue
        named = letters.lstrip("*")
        shape = tuple(tensor.shape)
        fits = len(shape) == len(named) or len(shape) > len(named) < len(letters)
        own = shape[len(shape) - len(named) :]
        if not fits or any(sizes.get(letter, size) != size for letter, size in zip(named, own, strict=True)):
            _refuse(name, letters, named, sizes, shape)
        for letter, size in zip(named, own, strict=True):
            if sizes.setdefault(letter, size) != size:  # one letter twice: a square matrix
                _refuse(name, letters, named, {}, shape)
        if named != letters:
            leading[name] = shape[: len(shape) - len(named)]
        if kind and not _is_of(tensor, kind[0]):
            wanted = "whole numbers" if kind[0] is int else "a mask of bools"
            raise ValueError(f"{name} must be {wanted}, got {tensor.dtype}.")
    if len(leading) > 1:
        _check_broadcast(leading)


def _refuse(name: str, letters: str, named: str, sizes: dict[str, int], shape: tuple[int, ...]) -> None:
    dimensions = ", ".join(["..."] * letters.startswith("*") + list(named)) + ("," if len(letters) == 1 else "")
    known = " and ".join(f"{letter} = {sizes[letter]}" for letter in dict.fromkeys(named) if letter in sizes)
    raise ValueError(f"{name} must be ({dimensions}){' with ' + known if known else ''}, got {shape}.")


def _check_broadcast(leading: dict[str, tuple[int, ...]]) -> None:
    try:
        torch.broadcast_shapes(*leading.values())
    except RuntimeError:
        shown = ", ".join(f"{shape} of {name}" for name, shape in leading.items())
        raise ValueError(f"the dimensions before the last do not fit together: {shown}.") from None


def _is_of(tensor: Tensor, kind: type) -> bool:
    whole = not tensor.is_floating_point() and not tensor.is_complex()
    return whole and (kind is bool) == (tensor.dtype == torch.bool)
