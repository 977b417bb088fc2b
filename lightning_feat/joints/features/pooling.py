"""Features of any usual shape as one vector for each sample."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Pooling: TypeAlias = Literal["mean", "max", "first", "last", "flatten", "tokens", "channels_last_mean"]


def pool(
    features: Tensor,
    pooling: Pooling | None,
    where: str = "the layer",
    mask: Tensor | None = None,
    choice: bool = True,
) -> Tensor:
    """Features of any usual shape as ``(N, D)``.

    ``(N, D)`` stays, and so does ``(N, C, 1, 1)`` but for its last two axes. Otherwise, of ``(N, T, D)`` tokens or
    ``(N, C, H, W)`` maps: ``mean`` or ``max`` over tokens or positions; ``first`` token; ``last`` token that
    counts; ``flatten`` all of a sample into one vector; ``tokens``: each token or position becomes a sample of its own,
    in order, ``(N * T, D)``; ``channels_last_mean`` for maps ``(N, H, W, C)``. Means of half-precision features are
    float32.

    Args:
        features: what the layer gives.
        pooling: see above; None where it gives ``(N, D)``.
        where: begins the message of an error.
        mask: ``(N, T)``, bool or 0 and 1: the tokens that ``mean``, ``max`` and ``last`` take, padding left out.
            Of a sample without any the result is zero.
        choice: whether a pooling can be chosen there, for an error.

    Raises:
        ValueError: if a pooling is needed and none is given, the one given does not fit the shape, or the mask does
            not.
    """
    check_pooling(features, pooling, where, choice)
    if features.ndim == 2:
        return features
    if features.ndim == 4 and features.shape[2:] == (1, 1):
        return features.flatten(1)
    if pooling == "flatten":
        return features.flatten(1)
    if pooling == "first":
        return features[:, 0]
    samples_first = features.ndim == 3 or pooling == "channels_last_mean"
    tokens_NTD = features.flatten(1, -2) if samples_first else features.flatten(2).transpose(1, 2)
    if pooling == "tokens":
        return tokens_NTD.flatten(0, 1)
    if mask is not None:
        return _pool_masked(tokens_NTD, pooling, mask, where)
    if pooling == "last":
        return tokens_NTD[:, -1]
    if pooling == "max":
        return tokens_NTD.amax(1)
    # Summed and kept in float32: bfloat16 has eight bits, and a mean of many is finer than each of them.
    half = tokens_NTD.dtype in (torch.float16, torch.bfloat16)
    return tokens_NTD.mean(1, dtype=torch.float32 if half else tokens_NTD.dtype)


def check_pooling(features: Tensor, pooling: Pooling | None, where: str = "the layer", choice: bool = True) -> None:
    """Raise the ``ValueError`` of ``pool`` where a pooling is missing, or does not fit the shape."""
    if features.ndim == 2 or (features.ndim == 4 and features.shape[2:] == (1, 1)):
        return
    if pooling is None or features.ndim not in (3, 4) or (pooling in ("first", "last")) > (features.ndim == 3):
        fitting = {
            3: "'mean', 'max', 'first', 'last', 'flatten' or 'tokens'",
            4: "'mean', 'max', 'flatten', 'tokens' or 'channels_last_mean'",
        }
        advice = "name another layer."
        if choice and features.ndim in fitting:
            advice = f"set pooling to {fitting[features.ndim]}."
        given = f" with pooling={pooling!r}" if choice else ""
        raise ValueError(
            f"{where} gives features of shape {tuple(features.shape)}{given}, but (N, D) is needed: {advice}"
        )


def _pool_masked(tokens_NTD: Tensor, pooling: Pooling | None, mask: Tensor, where: str) -> Tensor:
    if mask.shape != tokens_NTD.shape[:2]:
        raise ValueError(
            f"{where} gives {tuple(tokens_NTD.shape[:2])} tokens, but the mask is {tuple(mask.shape)}: set mask_key to "
            "what says of each token of that layer whether it counts."
        )
    kept_NT1 = mask.to(tokens_NTD.device, torch.bool)[..., None]
    if pooling == "last":
        position_T = torch.arange(1, tokens_NTD.shape[1] + 1, device=tokens_NTD.device)
        last_N = (position_T * kept_NT1[..., 0]).amax(1) - 1  # padding stands on either side
        taken_ND = tokens_NTD[torch.arange(len(last_N), device=last_N.device), last_N.clamp(min=0)]
        return taken_ND.masked_fill(last_N[:, None] < 0, 0)
    if pooling == "max":
        largest_ND = tokens_NTD.masked_fill(~kept_NT1, -torch.inf).amax(1)
        return largest_ND.masked_fill(~kept_NT1.any(1), 0)
    half = tokens_NTD.dtype in (torch.float16, torch.bfloat16)
    total_ND = tokens_NTD.masked_fill(~kept_NT1, 0).sum(1, dtype=torch.float32 if half else tokens_NTD.dtype)
    return total_ND / kept_NT1.sum(1).clamp(min=1)
