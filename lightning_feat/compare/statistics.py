"""Intervals for differences between arms. Plain numbers in, plain numbers out; distributions are SciPy's.

Several arms against one base: each interval is made at level 1 - alpha / k for k arms (Bonferroni), so that all k hold
together with probability 1 - alpha at least, however the arms hang together. Dunnett's intervals, in
``scipy.stats.dunnett``, would be a few per cent shorter, but take the arms' runs for independent, of one variance: runs
that share seeds are not.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

# Standard deviation of the effect size under the alternative that the confidence sequence mixes over. It holds for any;
# with 2 the sequence is near its shortest for 5 to 15 seeds.
EFFECT_SIZE_SD = 2.0
POWER = 0.8
MOST_SEEDS = 10_000


class Interval(NamedTuple):
    """Where the difference of the means is, at the level that was asked for."""

    low: float
    high: float

    @property
    def width(self) -> float:
        """Distance of the two ends."""
        return self.high - self.low

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is told."""
        return self.low > 0 or self.high < 0


def mean_of(values: Sequence[float]) -> float:
    """Arithmetic mean, without rounding in the sum."""
    return math.fsum(values) / len(values)


def spread_of(values: Sequence[float]) -> float:
    """Standard deviation with ``N - 1``; nan for one value, and zero where the values differ by rounding alone."""
    if len(values) < 2:
        return math.nan
    mean = mean_of(values)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return 0.0 if spread <= 8 * 2.2e-16 * max(abs(value) for value in values) else spread


def spread_of_differences(arm: Sequence[float], base: Sequence[float]) -> float:
    """``spread_of`` the differences, where rounding is judged by the size of the values that were subtracted."""
    spread = spread_of([a - b for a, b in zip(arm, base, strict=True)])
    largest = max(map(abs, [*arm, *base]), default=0.0)
    return 0.0 if spread <= 8 * 2.2e-16 * largest else spread


def paired_interval(differences: Sequence[float], level: float = 0.95, comparisons: int = 1) -> Interval | None:
    """Student's interval for the mean of paired differences, at ``1 - (1 - level) / comparisons``.

    Holds if the differences are independent draws of a normal distribution, whatever its variance. ``None`` for fewer
    than two, or where all are the same: there is no spread to judge by.
    """
    from scipy.stats import t

    n, spread = len(differences), spread_of(differences)
    if n < 2 or spread == 0:
        return None
    half = float(t.ppf(1 - (1 - level) / comparisons / 2, n - 1)) * spread / math.sqrt(n)
    mean = mean_of(differences)
    return Interval(mean - half, mean + half)


def unpaired_interval(
    arm: Sequence[float], base: Sequence[float], level: float = 0.95, comparisons: int = 1
) -> Interval | None:
    """Welch's interval for the difference of two means of independent runs, for runs whose seeds are not known."""
    from scipy.stats import ttest_ind

    if min(len(arm), len(base)) < 2 or spread_of(arm) == spread_of(base) == 0:
        return None
    result = ttest_ind(arm, base, equal_var=False).confidence_interval(1 - (1 - level) / comparisons)
    return Interval(float(result.low), float(result.high))


def sequence_interval(differences: Sequence[float], level: float = 0.95, comparisons: int = 1) -> Interval | None:
    """Interval that holds at all numbers of seeds at once, so that one may look after each and stop when one likes.

    The confidence sequence that inverts the t test with a normal mixture: for each mean, the likelihood ratio of the
    differences scaled by their spread, mixed over effect sizes ``N(0, EFFECT_SIZE_SD ** 2)``, is a martingale of mean
    one, and passes ``1 / alpha`` with probability alpha at most (Ville), whenever one stops. Holds exactly under the
    assumption of ``paired_interval``: independent normal differences of unknown variance. ``None`` while it has no
    ends, which is so for the first few seeds.

    Source: Wang and Ramdas, "Anytime-valid t-tests and confidence sequences for Gaussian means with unknown variance",
    2023; the same ratio in Perez-Ortiz, Lardy, de Heide and Gruenwald, "E-statistics, group invariance and
    anytime-valid testing", 2024.
    """
    n, spread = len(differences), spread_of(differences)
    if n < 2 or spread == 0:
        return None
    alpha = (1 - level) / comparisons
    ratio = 1 + n * EFFECT_SIZE_SD**2
    # The likelihood ratio is ratio ** -0.5 * ((1 + x) / (1 + x / ratio)) ** (n / 2) with x = t ** 2 / (n - 1).
    bound = (math.sqrt(ratio) / alpha) ** (2 / n)
    if bound >= ratio:
        return None
    half = math.sqrt((bound - 1) / (1 - bound / ratio) * (n - 1)) * spread / math.sqrt(n)
    mean = mean_of(differences)
    return Interval(mean - half, mean + half)


def seeds_to_tell(mean: float, spread: float, level: float = 0.95, comparisons: int = 1) -> int | None:
    """How many seeds tell a difference of this mean and spread from zero with probability ``POWER``, by the paired
    interval; ``None`` if more than ``MOST_SEEDS``, or without a spread.
    """
    if not spread > 0 or mean == 0:
        return None
    low, high = 2, MOST_SEEDS
    if _power(abs(mean) / spread, high, level, comparisons) < POWER:
        return None
    while low < high:
        middle = (low + high) // 2
        if _power(abs(mean) / spread, middle, level, comparisons) >= POWER:
            high = middle
        else:
            low = middle + 1
    return low


def _power(effect_size: float, n: int, level: float, comparisons: int) -> float:
    """Probability that the paired interval of ``n`` seeds excludes zero."""
    from scipy.stats import nct, norm, t

    critical = float(t.ppf(1 - (1 - level) / comparisons / 2, n - 1))
    shift = effect_size * math.sqrt(n)
    if shift > 30:  # where SciPy's noncentral t loses its digits: the tail of the spread alone matters
        return float(norm.cdf((shift - critical) / math.sqrt(1 + critical**2 / (2 * (n - 1)))))
    upper, lower = nct.sf(critical, n - 1, shift), nct.cdf(-critical, n - 1, shift)
    return float(upper) + (0.0 if math.isnan(lower) else float(lower))
