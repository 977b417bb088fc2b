import math

import numpy as np
import pytest
from scipy import integrate, stats

from lightning_feat.compare.effects import Question, effects_of, enough_seeds
from lightning_feat.compare.statistics import (
    EFFECT_SIZE_SD,
    paired_interval,
    seeds_to_tell,
    sequence_interval,
    spread_of,
    unpaired_interval,
)
from tests.compare.helpers import runs

DIFFERENCES = [0.3, -0.1, 0.7, 0.2, 0.55]


def test_the_paired_interval_is_that_of_scipy():
    ours = paired_interval(DIFFERENCES)
    theirs = stats.ttest_1samp(DIFFERENCES, 0).confidence_interval(0.95)
    assert ours == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_several_arms_share_what_one_may_miss():
    ours = paired_interval(DIFFERENCES, 0.95, comparisons=5)
    theirs = stats.ttest_1samp(DIFFERENCES, 0).confidence_interval(0.99)
    assert ours == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_without_seeds_told_the_interval_is_that_of_welch():
    ours = unpaired_interval([1.0, 2.0, 4.0], [1.0, 1.5], 0.9)
    theirs = stats.ttest_ind([1.0, 2.0, 4.0], [1.0, 1.5], equal_var=False).confidence_interval(0.9)
    assert ours == pytest.approx((theirs.low, theirs.high), rel=1e-12)


@pytest.mark.parametrize("make", [paired_interval, sequence_interval])
@pytest.mark.parametrize("differences", [[], [0.3], [0.1, 0.1, 0.1], [0.8 - 0.7, 0.3 - 0.2, 1.1 - 1.0]])
def test_without_a_spread_there_is_no_interval(make, differences):
    assert make(differences) is None


def test_the_sequence_ends_where_the_mixed_likelihood_ratio_is_one_over_alpha():
    """By its definition: noncentral t densities mixed over effect sizes, over the central one."""
    n, alpha = len(DIFFERENCES), 0.05
    interval = sequence_interval(DIFFERENCES, 1 - alpha)
    for end in interval:
        t = (np.mean(DIFFERENCES) - end) / (np.std(DIFFERENCES, ddof=1) / math.sqrt(n))

        def mixed(size, t=t):
            return stats.nct.pdf(t, n - 1, size * math.sqrt(n)) * stats.norm.pdf(size, scale=EFFECT_SIZE_SD)

        above, _ = integrate.quad(mixed, -12, 12, points=[0], limit=200)
        assert above / stats.t.pdf(t, n - 1) == pytest.approx(1 / alpha, rel=1e-5)


def test_the_sequence_is_wider_than_the_interval_of_one_look_and_narrows():
    rng = np.random.default_rng(0)
    sample = rng.normal(size=400).tolist()
    widths = [sequence_interval(sample[:n]).width / paired_interval(sample[:n]).width for n in (5, 20, 100, 400)]
    assert all(1 < width < 3 for width in widths)
    assert sequence_interval(sample).width < 0.5 < sequence_interval(sample[:20]).width


@pytest.mark.parametrize(("size", "needed"), [(0.5, 34), (0.8, 15), (1.0, 10)])
def test_the_seeds_needed_are_those_of_the_tables(size, needed):
    """Of G*Power 3.1 for a paired t test at 5 %, two sides, power 0.8."""
    assert seeds_to_tell(size, 1.0) == seeds_to_tell(-3 * size, 3.0) == needed


def test_seeds_needed_where_the_difference_is_tiny_or_huge():
    assert seeds_to_tell(1e-6, 1.0) is None
    assert seeds_to_tell(0.0, 1.0) is None
    assert seeds_to_tell(1000.0, 1.0) == 2
    assert seeds_to_tell(0.5, 1.0, comparisons=4) > 34


def test_a_spread_of_rounding_is_none():
    assert spread_of([0.1 + 0.2, 0.3]) == 0
    assert math.isnan(spread_of([1.0]))


# Simulated studies: seeds shift all arms alike, the arms differ by a known amount and have spreads of their own.
TRUE = {"one": 0.01, "two": 0.0, "three": -0.02}


def study(rng, seeds, arms=tuple(TRUE)):
    shared = rng.normal(0.5, 0.03, seeds)
    values = {"base": shared + rng.normal(0, 0.01, seeds)}
    for number, arm in enumerate(arms):
        values[arm] = shared + TRUE[arm] + rng.normal(0, 0.005 * (number + 1), seeds)
    return runs("score", **{arm: column.tolist() for arm, column in values.items()})


def share_that_holds(studies, seeds, arms, seed):
    rng = np.random.default_rng(seed)
    question = Question("base", ("score",))
    hold = 0
    for _ in range(studies):
        effects = effects_of(study(rng, seeds, arms), question)
        hold += all(effect.interval.low <= TRUE[effect.arm] <= effect.interval.high for effect in effects)
    return hold / studies


def share_that_holds_at_every_look(studies, seeds, arms, seed):
    """And what the rule for stopping gives: how many intervals hold where it stops."""
    rng = np.random.default_rng(seed)
    question = Question("base", ("score",), looking=True)
    order = list(range(seeds))
    always = at_stop = 0
    for _ in range(studies):
        records = study(rng, seeds, arms)
        held = []
        for n in range(2, seeds + 1):
            effects = effects_of([record for record in records if record.seed < n], question)
            ends = [(effect.interval, TRUE[effect.arm]) for effect in effects]
            held.append(all(interval is None or interval.low <= true <= interval.high for interval, true in ends))
        stop = enough_seeds(records, {"base", *arms}, question, order, 0.02) or seeds
        always += all(held)
        at_stop += held[max(stop, 2) - 2]
    return always / studies, at_stop / studies


def sampling_error(studies, level=0.95):
    """Three standard deviations: a right interval is outside once in 370 tests."""
    return 3 * math.sqrt(level * (1 - level) / studies)


def test_intervals_hold_what_they_promise():
    assert abs(share_that_holds(200, 5, ("one",), 1) - 0.95) <= sampling_error(200)
    assert share_that_holds(200, 5, tuple(TRUE), 2) >= 0.95 - sampling_error(200)


def test_intervals_hold_under_looking():
    always, at_stop = share_that_holds_at_every_look(40, 12, ("one", "two"), 3)
    assert min(always, at_stop) >= 0.95 - sampling_error(40)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_a_thousand_studies_of_one_arm(seeds):
    assert abs(share_that_holds(1000, seeds, ("one",), 10 + seeds) - 0.95) <= sampling_error(1000)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 10])
def test_a_thousand_studies_of_several_arms_hold_jointly(seeds):
    held = share_that_holds(1000, seeds, tuple(TRUE), 20 + seeds)
    assert 0.95 - sampling_error(1000) <= held <= 0.99  # Bonferroni errs by a little


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arms", [("two",), tuple(TRUE)])
def test_a_thousand_studies_with_a_look_after_each_seed(arms):
    always, at_stop = share_that_holds_at_every_look(1000, 25, arms, 30 + len(arms))
    assert min(always, at_stop) >= 0.95 - sampling_error(1000)


@pytest.mark.slow
@pytest.mark.parametrize(("images", "base", "arm"), [(100, 0.95, 0.95), (359, 0.99, 0.99), (359, 0.97, 0.995)])
def test_a_thousand_studies_of_an_accuracy_near_its_end(images, base, arm):
    """Counts of images, with ties and skew: no normal distribution, and the intervals hold all the same."""
    rng = np.random.default_rng(50)
    hold = []
    for _ in range(1000):
        shares = {name: (rng.binomial(images, p, 5) / images).tolist() for name, p in (("base", base), ("arm", arm))}
        (effect,) = effects_of(runs(**shares), Question("base", ("val/accuracy",)))
        if effect.interval is not None:
            hold.append(effect.interval.low <= arm - base <= effect.interval.high)
    assert len(hold) > 980
    assert np.mean(hold) >= 0.95 - sampling_error(len(hold))


@pytest.mark.slow
def test_looking_with_the_interval_of_one_look_would_not_hold():
    """What the rule is for: were it dropped, the test above would fail."""
    rng = np.random.default_rng(40)
    hold = 0
    for _ in range(1000):
        sample = rng.normal(size=25)
        hold += all(abs(stats.ttest_1samp(sample[:n], 0).pvalue) > 0.05 for n in range(2, 26))
    assert hold / 1000 < 0.85
