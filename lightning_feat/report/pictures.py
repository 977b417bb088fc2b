"""Samples that are pictures, as small pictures: found in a batch, shrunk, and put together on one sheet."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_feat.joints.features.batches import inputs_of
from lightning_feat.report.feature_set import Pictures

_NAMES = ("image", "images", "pixel_values", "img", "x", "inputs", "input")
_MOST_BYTES = 4_500_000  # of the sheet; base64 makes a third more of it


def tile_side(samples: int) -> int:
    """Longer side of a small picture in pixels, so that all of them fit a page."""
    return 64 if samples <= 1500 else 48 if samples <= 5000 else 32


def pictures_of(batch: Any, side: int) -> Tensor | None:
    """``(N, 3, H, W)`` small pictures of the inputs of a batch, in their own range; None where they are no pictures."""
    x = inputs_of(batch)
    if isinstance(batch, Mapping):
        named = [batch[name] for name in _NAMES if name in batch and _are_pictures(batch[name])]
        x = named[0] if named else None
    if isinstance(x, (tuple, list)) and x and _are_pictures(x[0]):
        x = x[0]  # views of one sample, or an image beside something else
    if x is None or not _are_pictures(x):
        return None
    x = x.detach()[:, :3] if x.shape[1] != 2 else x.detach()[:, :1]
    whole = not x.is_floating_point()
    x = x.float()
    scale = side / max(x.shape[2:])
    if scale < 1:
        size = [max(1, round(edge * scale)) for edge in x.shape[2:]]
        x = torch.nn.functional.interpolate(x, size=size, mode="area")
    x = (x / 255 if whole else x).expand(-1, 3, -1, -1)
    return x.to("cpu", torch.bfloat16)  # eight bits, as the screen has; and no range to overflow


def _are_pictures(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.ndim != 4 or value.is_complex() or value.dtype == torch.bool:
        return False
    return value.shape[1] in (1, 2, 3, 4) and min(value.shape[2:]) >= 4


def as_bytes(pictures: Tensor) -> tuple[Tensor, bool]:
    """``(P, H, W, 3)`` uint8 of pictures ``(P, 3, H, W)``, and whether their range had to be stretched to that of a
    screen, each channel between its 0.5 % and 99.5 % quantile: inputs of networks are commonly normalised.
    """
    x = pictures.float().nan_to_num()
    low, high = (float(x.min()), float(x.max())) if x.numel() else (0.0, 1.0)
    stretched = low < 0 or high > 1.001
    if stretched:
        some = x[:: max(1, len(x) // 500)].transpose(0, 1).flatten(1)
        some = some[:, :: max(1, some.shape[1] // 1_000_000)]
        low_3, high_3 = (some.quantile(q, dim=1)[:, None, None] for q in (0.005, 0.995))
        x = (x - low_3) / (high_3 - low_3).clamp(min=1e-6)
    return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous(), stretched


def pictures_given(pictures: Any, size: int) -> Pictures | None:
    """What a user gave as pictures: ``(N, H, W)``, ``(N, 3, H, W)`` or ``(N, H, W, 3)``, of any range.

    Raises:
        ValueError: if the shape is of no kind, or there is not one for each sample.
    """
    if pictures is None:
        return None
    x = pictures.detach().cpu() if isinstance(pictures, Tensor) else torch.as_tensor(pictures)
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim == 4 and x.shape[1] not in (1, 3, 4) and x.shape[3] in (1, 3, 4):
        x = x.permute(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3, 4) or len(x) != size:
        raise ValueError(
            f"pictures have shape {tuple(x.shape)}: give {size} of them, (N, H, W), (N, 3, H, W) or (N, H, W, 3)."
        )
    small = torch.cat([_shrunk(part, tile_side(size)) for part in x.split(512)])
    return Pictures(as_bytes(small)[0], torch.arange(size))


def _shrunk(part: Tensor, side: int) -> Tensor:
    made = pictures_of((part if min(part.shape[2:]) >= 4 else torch.nn.functional.interpolate(part.float(), 4),), side)
    if made is None:
        raise ValueError(f"pictures of shape {tuple(part.shape)} could not be made small: give (N, C, H, W).")
    return made


@dataclass
class Sheet:
    """All small pictures on one, ``columns`` in a row."""

    url: str
    columns: int
    width: int
    height: int
    tiles: int


def sheet_of(pictures: Pictures, most_bytes: int = _MOST_BYTES) -> Sheet | None:
    """The sheet as an address that holds the picture itself; smaller and coarser until it is at most ``most_bytes``.

    None where there are no pictures, or no room for them.
    """
    tiles = pictures.tiles
    if not len(tiles):
        return None
    steps = [(90, 1.0), (75, 1.0), (60, 1.0), (50, 0.75), (40, 0.5), (30, 0.35)]
    large = tiles.numel() > 3 * 2**22  # drawing it takes seconds: not at a quality that would not fit
    for quality, factor in steps[large:]:
        made, columns, height, width = _drawn(tiles, factor, quality)
        if len(made) <= most_bytes:
            url = f"data:image/webp;base64,{base64.b64encode(made).decode()}"
            return Sheet(url, columns, width, height, len(tiles))
    return None


def _drawn(tiles: Tensor, factor: float, quality: int) -> tuple[bytes, int, int, int]:
    from PIL import Image

    if factor < 1:
        size = [max(1, round(edge * factor)) for edge in tiles.shape[1:3]]
        shrunk = torch.nn.functional.interpolate(tiles.permute(0, 3, 1, 2).float(), size=size, mode="area")
        tiles = shrunk.round().byte().permute(0, 2, 3, 1)
    count, height, width, _ = tiles.shape
    columns = max(1, min(count, round((count * height / width) ** 0.5)))
    rows = -(-count // columns)
    filled = torch.zeros(rows * columns, height, width, 3, dtype=torch.uint8)
    filled[:count] = tiles
    sheet = filled.view(rows, columns, height, width, 3).transpose(1, 2).reshape(rows * height, columns * width, 3)
    file = io.BytesIO()
    Image.fromarray(sheet.numpy()).save(
        file, "WEBP", method=2, quality=quality, lossless=count * height * width < 100_000
    )
    return file.getvalue(), columns, height, width
