import math

import pytest

from lightning_feat.compare.effects import Question, bounds_of, costs, effects_of, enough_seeds
from lightning_feat.compare.statistics import paired_interval
from tests.compare.helpers import run, runs

ACCURACY = Question("base", ("val/accuracy",))


def effect_of(records, question=ACCURACY):
    (effect,) = effects_of(records, question)
    return effect


def test_runs_are_paired_by_their_seed_and_not_by_their_order():
    records = [run("base", 0, 0.1), run("base", 7, 0.5), run("arm", 7, 0.7), run("arm", 0, 0.2)]
    effect = effect_of(records)
    assert effect.seeds == [0, 7]
    assert effect.differences == pytest.approx([0.1, 0.2])
    assert effect.interval == pytest.approx(paired_interval([0.1, 0.2]))


def test_what_the_seeds_share_does_not_widen_the_interval():
    near = effect_of(runs(base=[0.1, 0.5, 0.9], arm=[0.12, 0.521, 0.92]))
    assert near.interval.width < 0.06
    assert near.interval.excludes_zero


def test_a_seed_with_a_failed_run_is_left_out_and_said():
    records = [*runs(base=[0.5, 0.6, 0.7], arm=[0.6, 0.8]), run("arm", 2, 0.1, status="failed")]
    effect = effect_of(records)
    assert effect.seeds == [0, 1]
    assert effect.notes == ["seed 2: left out, as one arm has no finished run."]


def test_a_value_that_is_not_finite_is_left_out_and_said():
    effect = effect_of(runs("loss", base=[0.5, 0.6, 0.7], arm=[0.6, math.nan, 0.9]), Question("base", ("loss",)))
    assert effect.seeds == [0, 2]
    assert effect.notes[0] == "seed 1: left out, as the metric is not there or not finite."


def test_one_seed_gives_no_interval_and_says_so():
    effect = effect_of(runs(base=[0.5], arm=[0.6]))
    assert effect.interval is None
    assert effect.needed is None
    assert effect.notes == ["one seed: a difference without an interval, which may be chance."]


def test_no_pair_at_all():
    effect = effect_of([run("base", 0, 0.5), run("arm", 1, 0.6)])
    assert math.isnan(effect.difference)
    assert effect.notes[-1] == "no pair of finished runs: nothing can be said."


@pytest.mark.parametrize(
    ("arm", "said"), [([0.7, 0.8, 0.9], "no difference in any of 3"), ([0.8, 0.9, 1.0], "the same difference in each")]
)
def test_ties_in_all_seeds_give_no_interval(arm, said):
    effect = effect_of(runs(base=[0.7, 0.8, 0.9], arm=arm))
    assert effect.interval is None
    assert effect.notes[0].startswith(said)


def test_many_ties_and_a_metric_at_its_end_are_said():
    effect = effect_of(runs(base=[1.0, 1.0, 0.9, 0.8], arm=[1.0, 1.0, 1.0, 0.9]))
    assert effect.interval is not None
    assert effect.notes == [
        "2 of 4 pairs are ties: the interval is rough.",
        "3 of 4 runs are at the end of the metric's range: a difference may be hidden.",
    ]


def test_a_difference_is_no_larger_than_the_range():
    effect = effect_of(runs(base=[0.1, 0.9], arm=[0.9, 0.2]))
    assert effect.interval == (-1.0, 1.0)
    free = effect_of(
        runs(base=[0.1, 0.9], arm=[0.9, 0.2]), Question("base", ACCURACY.metrics, bounds={"val/accuracy": None})
    )
    assert free.interval.high > 5
    assert not free.is_share


@pytest.mark.parametrize(
    ("metric", "values", "bounds"),
    [
        ("val/accuracy", [0.5, 1.0], (0.0, 1.0)),
        ("val_acc:max", [0.5], (0.0, 1.0)),
        ("val/top1", [50.0], None),  # per cent already
        ("val/loss", [0.5], None),
        ("map/loss", [0.5], None),
        ("accuracy", [], None),
    ],
)
def test_shares_are_known_by_name_and_values(metric, values, bounds):
    assert bounds_of(metric, values) == bounds


def test_the_best_or_the_last_value_of_a_run():
    record = run("arm", 0, [0.3, 0.9, 0.6])
    assert [record.value(f"val/accuracy{which}") for which in ("", ":last", ":max", ":min")] == [0.6, 0.6, 0.9, 0.3]
    assert math.isnan(record.value("val/loss"))


def test_runs_without_seeds_are_not_paired():
    records = [run("base", None, value) for value in (0.5, 0.6)] + [
        run("arm", None, value) for value in (0.9, 0.8, 0.85)
    ]
    effect = effect_of(records)
    assert not effect.paired
    assert effect.difference == pytest.approx(0.3)
    assert "not paired (Welch)" in effect.notes[0]


def test_an_unknown_base_is_refused():
    with pytest.raises(ValueError, match="base='bsae': there is no run of it; the arms are base, arm"):
        effects_of(runs(base=[0.1], arm=[0.2]), Question("bsae", ("val/accuracy",)))


def test_seeds_are_added_until_zero_is_excluded_or_the_interval_is_narrow():
    differences = [0.10, 0.11, 0.09, 0.10, 0.11, 0.10]
    records = runs(base=[0.5] * 6, arm=[0.5 + difference for difference in differences])
    arms, seeds = {"base", "arm"}, list(range(6))
    told = enough_seeds(records, arms, ACCURACY, seeds, 0.001)
    assert told == 4  # three have no interval that holds under looking
    assert enough_seeds(records[::-1], arms, ACCURACY, seeds, 0.001) == told  # whichever came first
    level = runs(base=[0.5] * 6, arm=[0.5 + difference - 0.1 for difference in differences])
    assert enough_seeds(level, arms, ACCURACY, seeds, 0.001) is None
    assert enough_seeds(level, arms, ACCURACY, seeds, 5.0) == 5  # points


def test_a_seed_that_is_not_there_for_all_arms_is_waited_for():
    records = [record for record in runs(base=[0.5] * 6, arm=[0.6, 0.61, 0.59, 0.6, 0.6, 0.6]) if record.seed != 1]
    assert enough_seeds(records, {"base", "arm"}, ACCURACY, list(range(6)), 0.001) is None


def test_costs_are_compared_seed_by_seed():
    base = [run("base", seed, 0, fit_s=seconds) for seed, seconds in enumerate((10.0, 20.0, 30.0))]
    arm = [run("arm", seed, 0, fit_s=seconds) for seed, seconds in enumerate((15.0, 30.0, 90.0))]
    assert costs(arm, base, "fit_s") == (45.0, 1.5)
    assert all(map(math.isnan, costs(arm, base, "memory_mb")))
