"""Find targets and inputs in a batch of any usual form: tuple, list, dict, dataclass. Two candidates are never chosen
between.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pkgutil import resolve_name
from typing import Any, TypeAlias

import torch
from torch import Tensor

# A string before a function, for jsonargparse: it takes the first that fits, and writes a string that might have been a
# function into a saved configuration as another string. What names a function is found in targets_of.
TargetKey: TypeAlias = int | str | Callable[[Any], Tensor] | None

TARGET_NAMES = ("label", "labels", "target", "targets", "y")
_MAPS = ("mask", "masks")  # of segmentation: a class for each position; not of tokens, which has two axes


def targets_of(batch: Any, target_key: TargetKey = None, argument: str = "target_key") -> Tensor:
    """The targets of a batch, as they are: class indices ``(N,)``, per token ``(N, T)``, or soft labels ``(N, C)``.

    Args:
        batch: what the data loader gives.
        target_key: a position in a tuple or list, a key of a dict, an attribute, or a function of the batch, which
            may be named by its dotted path, as in YAML: ``package.module.function``. None looks for ``label(s)``,
            ``target(s)`` or ``y`` in a dict, the second entry of a tuple or list, an attribute of those names; and else
            for ``mask(s)`` that hold a class index for each position of a map.
        argument: what the user knows the key as, for an error: masks and indices are looked up in the same way.

    Raises:
        ValueError: if there are no targets to be found, or several that could be meant; the message shows the batch.
    """
    key: Any = target_key
    if isinstance(key, str) and "." in key:
        key = _function_named(key) or key
    if callable(key):
        found = key(batch)
    elif key is not None:
        found = _entry(batch, key, argument)
    else:
        found = _guess(batch)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"{'the targets are' if argument == 'target_key' else f'{argument} leads to'} {describe(found)}, not a "
            f"tensor, in a batch of {describe(batch)}: set {argument}."
        )
    return found


@lru_cache
def _function_named(path: str) -> Any:
    """The function with this dotted path; None if there is none."""
    try:
        found = resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if callable(found) else None


def mask_of(batch: Any, mask_key: TargetKey) -> Tensor | None:
    """Which tokens of a batch count, ``(N, T)`` bool; None without a key. The key, and the errors, are as those of
    ``targets_of``.
    """
    if mask_key is None:
        return None
    mask = targets_of(batch, mask_key, "mask_key")
    if mask.ndim != 2:
        raise ValueError(
            f"mask_key={mask_key!r} leads to {describe(mask)}, but a mask (N, T) is needed, of the tokens that count."
        )
    return mask.bool()


def inputs_of(batch: Any) -> Any:
    """What a classifier is called with: the first entry of a tuple or list, else the batch itself."""
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) > 0 else batch


def class_indices(targets: Tensor, num_samples: int, where: str = "the targets", views: bool = True) -> Tensor:
    """Targets as int64 class indices ``(num_samples,)``: per-token targets are flattened, several views repeat their
    targets.

    Args:
        targets: integer class indices ``(N,)`` or ``(N, T)``.
        num_samples: samples that the features have; a multiple of the targets where the layer ran once per view.
        where: begins the message of an error.
        views: whether targets may repeat; not where the samples are tokens, each of which needs one.

    Raises:
        ValueError: if the targets are not integers, or their number does not divide ``num_samples``.
    """
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        hint = _kind_of_rows(targets) or f"{targets.dtype}"
        advice = _SEVERAL if hint == _MULTI_LABEL else _INDICES
        raise ValueError(
            f"{where} are {hint}, but integer class indices are needed (rounding would hide an error): {advice}"
        )
    flat = targets.reshape(-1)
    if flat.numel() == 0 and num_samples == 0:
        return flat.long()
    if flat.numel() == 0 or num_samples % flat.numel() or not (views or flat.numel() == num_samples):
        hint = _kind_of_rows(targets) if len(targets) == num_samples else ""
        advice = (
            "choose a pooling ('tokens' where each token has a target), or a target_key that leads to one target per "
            "sample."
        )
        if hint:
            advice = f"they look like {hint}. {(_SEVERAL if hint == _MULTI_LABEL else _INDICES).capitalize()}"
        raise ValueError(
            f"{where} have shape {tuple(targets.shape)}, which does not fit {num_samples} samples of features: {advice}"
        )
    return flat.long().repeat(num_samples // flat.numel())


_MULTI_LABEL = "labels of several classes at once (multi-label)"
_SEVERAL = (
    "what is measured here needs one class for each sample, so give a target_key that leads to one, such as the "
    "presence of a single label: `lambda batch: batch[1][:, 0].long()`."
)
_INDICES = (
    "give a target_key that leads to class indices, for example a function such as `lambda batch: batch[1].argmax(1)`."
)


def _kind_of_rows(targets: Tensor) -> str:
    """What targets ``(N, C)`` are by their values, in words; nothing where they are not of a kind known."""
    if targets.ndim != 2 or targets.shape[1] < 2 or not targets.numel() or targets.is_complex():
        return ""
    values = targets.double()
    whole = bool(((values == 0) | (values == 1)).all())
    if whole:
        return "one-hot labels" if bool((values.sum(1) == 1).all()) else _MULTI_LABEL
    return "soft labels of shape (N, C)" if targets.is_floating_point() else ""


def _entry(batch: Any, key: int | str, argument: str) -> Any:
    try:
        if isinstance(batch, Mapping):
            return batch[key]
        if isinstance(batch, Sequence) and isinstance(key, int):
            return batch[key]
        return getattr(batch, str(key))
    except (KeyError, IndexError, AttributeError):
        raise ValueError(f"{argument}={key!r} leads nowhere in a batch of {describe(batch)}.") from None


def _guess(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        found = [batch[name] for name in TARGET_NAMES if name in batch]
        found = found or [batch[name] for name in _MAPS if name in batch and _is_map(batch[name])]
    elif isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        nested = len(batch) > 0 and isinstance(batch[0], (tuple, list)) and len(batch[0]) > 1
        found = [] if nested else [*batch[1:2]]  # ((x, y), index): the second entry is no target
    else:
        found = [getattr(batch, name) for name in TARGET_NAMES if hasattr(batch, name)]
        found = found or [getattr(batch, name) for name in _MAPS if _is_map(getattr(batch, name, None))]
    if len(found) != 1:
        what = "no targets" if not found else "several entries that could be the targets"
        raise ValueError(
            f"found {what} in a batch of {describe(batch)}: set target_key to a position, a key, an attribute, or a "
            "function of the batch."
        )
    return found[0]


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 2 and not value.is_floating_point() and value.dtype != torch.bool


_MOST = 8  # entries of a tuple to name


def describe(value: Any, depth: int = 2) -> str:
    """A batch in words, for a message: its form, and the shapes and dtypes of its tensors."""
    if isinstance(value, Tensor):
        return f"Tensor{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if depth == 0 or isinstance(value, str):
        return type(value).__name__
    if isinstance(value, Mapping):
        return "dict(" + ", ".join(f"{key}: {describe(entry, depth - 1)}" for key, entry in value.items()) + ")"
    if isinstance(value, (tuple, list)):
        said = [describe(entry, depth - 1) for entry in value[:_MOST]]
        if len(value) > 2 and len({type(entry) for entry in value}) == 1 and not isinstance(value[0], Tensor):
            return f"{type(value).__name__} of {len(value)} {said[0]}"  # strings, say: one for each sample
        more = [f"{len(value) - _MOST} more"] if len(value) > _MOST else []
        return f"{type(value).__name__}({', '.join([*said, *more])})"
    fields = {key: entry for key, entry in getattr(value, "__dict__", {}).items() if not key.startswith("_")}
    named = ", ".join(f"{key}: {describe(entry, depth - 1)}" for key, entry in fields.items())
    return f"{type(value).__name__}({named})" if named else type(value).__name__
