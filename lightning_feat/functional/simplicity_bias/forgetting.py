"""When each example is learned, and how often it is forgotten again.

Shapes: N examples, T looks at each.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_feat.functional.common.shapes import check_shapes


class LearningTimes(NamedTuple):
    """Of each example; looks count from 1, and 0 stands for never."""

    forgetting: Tensor  # (N,) int64, how often it was right and at the next look wrong
    first_learned: Tensor  # (N,) int64, the first look at which it was right
    always_learned: Tensor  # (N,) int64, the first look from which on it was right every time
    last_right: Tensor  # (N,) bool, whether it was right at the last look


def learning_times(right: Tensor) -> LearningTimes:
    """Forgetting scores and the times of learning, from whether each example was right at each look.

    An example that was never right has no forgetting events; who counts the unforgettable ones must leave it out, by
    ``first_learned``. Source: Toneva, Sordoni, des Combes, Trischler, Bengio, Gordon, "An empirical study of example
    forgetting during deep neural network learning", ICLR 2019, arXiv 1812.05159, who look at each example when it is
    trained on.

    Args:
        right: ``(T, N)`` bool, in the order of the looks.

    Example:
        >>> right = torch.tensor([[False, True, False], [True, False, False], [True, True, False]])
        >>> times = learning_times(right)
        >>> times.forgetting.tolist(), times.first_learned.tolist(), times.always_learned.tolist()
        ([0, 1, 0], [2, 1, 0], [2, 3, 0])
    """
    check_shapes(right=(right, "TN", bool))
    times = no_looks(right.shape[1], right.device)
    for look, now in enumerate(right, start=1):
        times = with_look(times, now, look)
    return times


def no_looks(num_examples: int, device: torch.device | str | None = None) -> LearningTimes:
    """What ``with_look`` begins with."""
    zeros = torch.zeros(num_examples, dtype=torch.long, device=device)
    return LearningTimes(zeros, zeros.clone(), zeros.clone(), zeros.bool())


def with_look(times: LearningTimes, right: Tensor, look: int, seen: Tensor | None = None) -> LearningTimes:
    """The times after one more look.

    Args:
        times: of the looks before.
        right: ``(N,)`` bool, which examples are right now.
        look: its number, larger than those before; epochs may be left out.
        seen: ``(N,)`` bool, which examples were looked at; None for all. The others stay as they were.

    Raises:
        ValueError: if shapes do not fit, or ``look`` is below 1.
    """
    check_shapes(
        right=(right, "N", bool),
        seen=(seen, "N", bool),
        forgetting=(times.forgetting, "N", int),
        first_learned=(times.first_learned, "N", int),
        always_learned=(times.always_learned, "N", int),
        last_right=(times.last_right, "N", bool),
    )
    if look < 1:
        raise ValueError(f"look={look}: looks are counted from 1, as 0 stands for never.")
    seen = torch.ones_like(right) if seen is None else seen
    forgot = seen & times.last_right & ~right
    learned = seen & right
    always = torch.where(forgot, 0, times.always_learned)
    return LearningTimes(
        times.forgetting + forgot,
        torch.where(learned & (times.first_learned == 0), look, times.first_learned),
        torch.where(learned & (always == 0), look, always),
        torch.where(seen, right, times.last_right),
    )
