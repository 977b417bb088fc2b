"""The inputs of a batch of any usual form, and the same batch with others in their place."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_feat.joints.features.batches import describe

InputKey: TypeAlias = int | str | None

INPUT_NAMES = ("image", "images", "input", "inputs", "x", "pixel_values", "features")


def floating_inputs(batch: Any, input_key: InputKey = None) -> Tensor:
    """The inputs ``(N, ...)`` of a batch, as they are.

    Args:
        batch: what the network gets.
        input_key: a position in a tuple or list, a key of a dict, or an attribute. None takes the batch itself where
            it is a tensor, the first entry of a tuple or list, and of others the one of a usual name
            (``INPUT_NAMES``).

    Raises:
        ValueError: if there are none to be found, several that could be meant, or they are no floating tensor; the
            message shows the batch.
    """
    found = _entry(batch, _key_of(batch, input_key))
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 2:
        raise ValueError(
            f"the inputs are {describe(found)}, in a batch of {describe(batch)}: numbers are drawn or moved between "
            "samples here, for which they must be a floating tensor (N, ...). Set input_key to a position, a key or an "
            "attribute that leads to one."
        )
    return found


def with_inputs(batch: Any, inputs: Tensor, input_key: InputKey = None) -> Any:
    """A batch like this one, of the same form, with other inputs; the batch itself stays."""
    key = _key_of(batch, input_key)
    if key is None:
        return inputs
    if isinstance(batch, Mapping):
        entries = {**batch, key: inputs}
        return entries if type(batch) is dict else type(batch)(entries)  # type: ignore[call-arg]
    if hasattr(batch, "_fields"):
        return batch._replace(**{key if isinstance(key, str) else batch._fields[key]: inputs})
    if isinstance(batch, (tuple, list)):
        entries_ = [*batch]
        entries_[int(key)] = inputs
        return type(batch)(entries_)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return dataclasses.replace(batch, **{str(key): inputs})
    raise ValueError(f"other inputs cannot be put in a batch of {describe(batch)}: make it a dict, tuple or dataclass.")


def every_other(batch: Any, size: int) -> Any:
    """The first sample of each pair in a batch of ``size`` samples that holds pairs one after the other: tensors lose
    every second row; what is none is left as it is.
    """
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: every_other(getattr(batch, f.name), size) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **fields)

    def first_of_pairs(leaf: Any) -> Any:
        return leaf[::2] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size else leaf

    return tree_map(first_of_pairs, batch)


def _key_of(batch: Any, key: InputKey) -> int | str | None:
    if key is not None or isinstance(batch, Tensor):
        return key
    if isinstance(batch, (tuple, list)):
        return 0
    names = [name for name in INPUT_NAMES if (name in batch if isinstance(batch, Mapping) else hasattr(batch, name))]
    if len(names) != 1:
        what = "no inputs" if not names else f"several entries that could be the inputs ({', '.join(names)})"
        raise ValueError(f"found {what} in a batch of {describe(batch)}: set input_key to a key or an attribute.")
    return names[0]


def _entry(batch: Any, key: int | str | None) -> Any:
    if key is None:
        return batch
    try:
        if isinstance(batch, Mapping) or (isinstance(batch, (tuple, list)) and isinstance(key, int)):
            return batch[key]  # type: ignore[index]
        return getattr(batch, str(key))
    except (KeyError, IndexError, AttributeError):
        raise ValueError(f"input_key={key!r} leads nowhere in a batch of {describe(batch)}.") from None
