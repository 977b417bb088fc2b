"""When in a training the outputs tell what was learned from what was not: the knee of the training curve."""

import math
from collections.abc import Sequence


def separating_epoch(
    errors: Sequence[float],
    max_epochs: int,
    share: float = 0.25,
    window: int | None = None,
    fall: float = 0.1,
    start: float | None = None,
) -> int | None:
    r"""The number of epochs after which a training curve has first slowed down, None if it has not.

    With :math:`m_t` the lowest value up to epoch t and w the window,

    .. math:: d_t = m_{\max(t-w, 0)} - m_t, \qquad t^* = \min \{ t : d_t < \text{share} \cdot \max_{s \le t} d_s \}

    among the epochs at which the lowest value so far is at least ``fall`` below the highest. None of the first w epochs
    can be the knee, and whether a later one is depends on what came before it alone.

    Give it the mean training **loss** where there is one. An error rate knows only the sign of a margin: from small
    weights it falls, and flattens, while all outputs are still as small as at the start and the groups overlap; the
    loss falls when outputs grow, and with them the distance that a clustering needs.

    Source of the idea: Nguyen, Haddad, Gan, Mirzasoleiman, NeurIPS 2024, arXiv 2404.17768, who look at the training
    error and take the epoch where its decrease begins to slow down, about 5 to 10 % of all. The rule is ours: a quarter
    of the fastest decrease; a window, since one noisy epoch looks like a knee; the lowest value so far, which noise
    does not raise; the fall that is asked for, so that neither a plateau before learning nor a curve that never falls
    has a knee; the loss in place of the error; and no bounds. Where learning begins late, a bound at 10 % ends before
    it. The window delays the knee a little. What to do where there is none is for the caller to say.

    A curve that falls in the first epoch and no more has a knee only with ``start``: without it, nothing fell.

    Args:
        errors: training loss or error, not negative, one for each epoch in order; what is not finite is passed over.
        max_epochs: number of epochs planned, for the window.
        share: of the fastest decrease, below which it counts as slow.
        window: epochs that a decrease is taken over; None takes 2 % of ``max_epochs``, and two at least.
        fall: least fall from the highest to the lowest value, as a share of the former.
        start: the value before training, such as ``log(num_classes)`` of a loss or ``1 - 1 / num_classes`` of an error.

    Raises:
        ValueError: if ``share`` or ``fall`` is not between 0 and 1, or ``max_epochs`` or the window below 1.

    Example:
        >>> losses = [2.30, 2.25, 2.1, 1.6, 0.9, 0.5, 0.4, 0.38, 0.37, 0.36]
        >>> separating_epoch(losses, max_epochs=50)
        8
    """
    if not 0 < share < 1 or not 0 <= fall < 1:
        raise ValueError(f"{share=} must be in (0, 1) and {fall=} in [0, 1): both are shares.")
    if max_epochs < 1 or (window is not None and window < 1):
        raise ValueError(f"{max_epochs=} and {window=}: each is at least 1.")
    window = max(2, round(0.02 * max_epochs)) if window is None else window
    lowest: list[float] = [] if start is None else [start]
    highest, fastest = -math.inf if start is None else start, 0.0
    for epoch, error in enumerate(errors, 1):
        if not math.isfinite(error):
            continue
        highest = max(highest, error)
        lowest.append(min(error, lowest[-1]) if lowest else error)
        decrease = lowest[max(len(lowest) - 1 - window, 0)] - lowest[-1]
        fastest = max(fastest, decrease)
        if highest - lowest[-1] >= fall * highest and decrease < share * fastest:
            return epoch
    return None


def knee_reached(
    errors: Sequence[float],
    max_epochs: int,
    share: float = 0.25,
    window: int | None = None,
    fall: float = 0.1,
    start: float | None = None,
) -> bool:
    """Whether the knee of a training curve is behind it, at the end of the last epoch given or before.

    To ask at the end of each epoch, with all values so far; once true it stays true. The rule and the arguments are
    those of :func:`separating_epoch`.

    Example:
        >>> losses = [2.30, 2.25, 2.1, 1.6, 0.9, 0.5, 0.4, 0.38]
        >>> knee_reached(losses[:7], max_epochs=50), knee_reached(losses, max_epochs=50)
        (False, True)
    """
    return separating_epoch(errors, max_epochs, share, window, fall, start) is not None


def next_log_step(step: int, per_decade: int = 5) -> int:
    """The first of the steps evenly spaced in the logarithm that comes after ``step``: 1, 2, 3, 4, 6, 10, 16, ...

    Args:
        step: whole number, zero or more.
        per_decade: how many in each power of ten; where that is finer than whole numbers, each step once.

    Raises:
        ValueError: if ``step`` is negative or ``per_decade`` below 1.

    Example:
        >>> steps = [0]
        >>> for _ in range(10):
        ...     steps.append(next_log_step(steps[-1], per_decade=3))
        >>> steps
        [0, 1, 2, 5, 10, 22, 46, 100, 215, 464, 1000]
    """
    if step < 0 or per_decade < 1:
        raise ValueError(f"{step=} must not be negative, and {per_decade=} at least 1.")
    k = 0 if step == 0 else max(0, math.floor(per_decade * math.log10(step)) - 1)
    while (found := round(10 ** (k / per_decade))) <= step:
        k += 1
    return found
