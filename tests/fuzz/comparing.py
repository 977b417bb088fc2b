"""What a function gives, as a flat list, and whether two such lists agree."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


def leaves(value: Any) -> list[Any]:
    return _pytree.tree_leaves(value)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def copied(value: Any) -> Any:
    """A copy with the same layouts."""
    return _pytree.tree_map(_copy, value)


def _copy(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    twin = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype)
    twin.copy_(leaf.detach())
    return twin.requires_grad_(leaf.requires_grad)


def same_bits(first: Any, second: Any) -> bool:
    """Equal, element for element, NaN with NaN."""
    one, two = leaves(first), leaves(second)
    return len(one) == len(two) and all(
        torch.equal(a.detach().nan_to_num(12345.0), b.detach().nan_to_num(12345.0))
        and torch.equal(a.isnan(), b.isnan())
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else a == b or (a != a and b != b)
        for a, b in zip(one, two, strict=True)
    )


def assert_close(found: Any, expected: Any, tolerance: float, degrees: list[float] | None = None, scale: float = 1.0):
    """Each entry of ``found`` is that of ``expected`` times ``scale`` to its degree, relative to the largest entry.

    What has no unit may also be off by 1e-12: zero is then rounding.

    Entries whose expected value does not fit the dtype that was found are left out.
    """
    one, two = leaves(found), leaves(expected)
    assert len(one) == len(two)
    for place, (a, b) in enumerate(zip(one, two, strict=True)):
        if not isinstance(a, Tensor):
            if not isinstance(a, float):
                assert a == b
                continue
            a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
        if not a.is_floating_point():
            assert torch.equal(a, torch.as_tensor(b).to(a.dtype)), f"entry {place}: {a} and not {b}"
            continue
        factor = scale ** (degrees[place] if degrees else 0)
        a, b, info = a.detach(), torch.as_tensor(b).detach().double() * factor, torch.finfo(a.dtype)
        assert a.shape == b.shape, f"entry {place} has shape {tuple(a.shape)} and not {tuple(b.shape)}"
        fits = b.isnan() | b.isinf() | ((b.abs() < info.max / 16) & ((b.abs() > 16 * info.tiny) | (b == 0)))
        finite = b[b.isfinite()].abs()
        floor = 1e-12 if degrees is not None and degrees[place] == 0 else 0.0
        size = float(finite.max()) if finite.numel() else 0.0
        fits &= ~((b == 0) & (size < 16 * info.tiny))
        torch.testing.assert_close(
            a.double()[fits],
            b[fits],
            rtol=tolerance,
            atol=tolerance * size + floor,
            equal_nan=True,
            msg=lambda text, place=place, a=a, b=b: f"entry {place}: {a}\nand not {b}\n{text}",
        )
