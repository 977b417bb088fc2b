"""From runs to what they say: for each arm and metric the difference to the base, with its interval."""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_feat.compare.records import Record, split_metric
from lightning_feat.compare.statistics import (
    Interval,
    mean_of,
    paired_interval,
    seeds_to_tell,
    sequence_interval,
    spread_of,
    spread_of_differences,
    unpaired_interval,
)

# What is a share, between 0 and 1, by the last part of its name; only where all its values are in there.
SHARES = {"acc", "accuracy", "top1", "top5", "f1", "precision", "recall", "auroc", "auc", "ap", "map", "iou", "miou"}
SHARES |= {"dice", "error", "error_rate", "mismatch", "jaccard", "specificity", "sensitivity"}


@dataclass
class Effect:
    """One arm against the base, in one metric.

    Attributes:
        arm: its name.
        base: that of the base.
        metric: as it was asked for.
        seeds: of the pairs; empty where runs could not be paired.
        values: of the arm, in the order of the seeds.
        base_values: of the base, likewise.
        interval: of the difference of the means; ``None`` where there is none to give, ``notes`` say why.
        level: of the interval, before it is shared among arms.
        comparisons: arms that share it.
        bounds: of the metric, where it has such.
        notes: what a reader must know, in sentences.
    """

    arm: str
    base: str
    metric: str
    seeds: list[int]
    values: list[float]
    base_values: list[float]
    interval: Interval | None = None
    level: float = 0.95
    comparisons: int = 1
    bounds: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def paired(self) -> bool:
        """Whether each value has its partner."""
        return bool(self.seeds)

    @property
    def differences(self) -> list[float]:
        """Arm less base, seed by seed."""
        return [a - b for a, b in zip(self.values, self.base_values, strict=True)] if self.paired else []

    @property
    def difference(self) -> float:
        """Of the means; nan without runs."""
        if not self.values or not self.base_values:
            return math.nan
        return mean_of(self.differences) if self.paired else mean_of(self.values) - mean_of(self.base_values)

    @property
    def needed(self) -> int | None:
        """Seeds that would tell a difference of the size seen, with probability 0.8, by Student's t."""
        if not self.paired or len(self.seeds) < 2:
            return None
        spread = spread_of_differences(self.values, self.base_values)
        return seeds_to_tell(self.difference, spread, self.level, self.comparisons)

    @property
    def is_share(self) -> bool:
        """Whether it is shown in per cent."""
        return self.bounds == (0.0, 1.0)

    @property
    def factor(self) -> float:
        """From the metric to the unit it is shown in."""
        return 100.0 if self.is_share else 1.0


@dataclass(frozen=True)
class Question:
    """What is asked of the runs.

    Attributes:
        base: name of the arm that the others are compared with.
        metrics: such as ``val/accuracy`` or ``val/loss:min``.
        level: at which the intervals of all arms hold together.
        looking: whether the intervals hold however often somebody looked.
        bounds: of metrics; of the others they are guessed by ``bounds_of``.
        joint: whether the intervals of all arms hold together, or each on its own.
    """

    base: str
    metrics: tuple[str, ...]
    level: float = 0.95
    looking: bool = False
    bounds: Mapping[str, tuple[float, float] | None] = field(default_factory=dict)
    joint: bool = True


def effects_of(records: Sequence[Record], question: Question) -> list[Effect]:
    """Metric by metric, arm by arm in the order in which they come in ``records``."""
    arms = list(dict.fromkeys(record.arm for record in records))
    if question.base not in arms:
        raise ValueError(f"base={question.base!r}: there is no run of it; the arms are {', '.join(arms) or 'none'}.")
    others = [arm for arm in arms if arm != question.base]
    by_arm = {arm: [record for record in records if record.arm == arm and record.finished] for arm in arms}
    effects = []
    for metric in question.metrics:
        values = [record.value(metric) for runs in by_arm.values() for record in runs]
        bounds = question.bounds.get(metric, bounds_of(metric, values))
        sharing = len(others) if question.joint else 1
        for arm in others:
            effects.append(_effect(by_arm[arm], by_arm[question.base], arm, metric, bounds, question, sharing))
    return effects


def bounds_of(metric: str, values: Sequence[float]) -> tuple[float, float] | None:
    """``(0, 1)`` for what is a share by its name, such as ``val/accuracy``, and by its values."""
    last = split_metric(metric)[0].lower().replace("-", "_").split("/")[-1]
    words = {last, *last.split("_")}
    finite = [value for value in values if not math.isnan(value)]
    return (0.0, 1.0) if words & SHARES and finite and all(0 <= value <= 1 for value in finite) else None


def _effect(
    runs: list[Record],
    base_runs: list[Record],
    arm: str,
    metric: str,
    bounds: tuple[float, float] | None,
    question: Question,
    comparisons: int,
) -> Effect:
    told = all(record.seed is not None for record in (*runs, *base_runs))
    effect = Effect(arm, question.base, metric, [], [], [], None, question.level, comparisons, bounds)
    if not told:
        return _unpaired(effect, runs, base_runs, question, comparisons)
    ours = {record.seed: record.value(metric) for record in runs}
    theirs = {record.seed: record.value(metric) for record in base_runs}
    common = sorted(seed for seed in ours.keys() & theirs.keys() if seed is not None)
    finite = [seed for seed in common if math.isfinite(ours[seed]) and math.isfinite(theirs[seed])]
    alone = sorted(str(seed) for seed in ours.keys() ^ theirs.keys())
    if alone:
        effect.notes.append(f"seed {', '.join(alone)}: left out, as one arm has no finished run.")
    if len(finite) < len(common):
        lost = ", ".join(str(seed) for seed in common if seed not in finite)
        effect.notes.append(f"seed {lost}: left out, as the metric is not there or not finite.")
    effect.seeds = finite
    effect.values, effect.base_values = [ours[seed] for seed in finite], [theirs[seed] for seed in finite]
    n = len(finite)
    if n == 0:
        effect.notes.append("no pair of finished runs: nothing can be said.")
        return effect
    if n == 1:
        effect.notes.append("one seed: a difference without an interval, which may be chance.")
        return effect
    spread = spread_of_differences(effect.values, effect.base_values)
    if spread == 0:
        same = all(value == 0 for value in effect.differences)
        what = "no difference in any" if same else "the same difference in each"
        effect.notes.append(f"{what} of {n} seeds: without a spread there is no interval.")
        return effect
    make = sequence_interval if question.looking else paired_interval
    effect.interval = _within(make(effect.differences, question.level, comparisons), bounds)
    if effect.interval is None:
        effect.notes.append(f"{n} seeds: too few for an interval that holds however often one looks.")
    effect.notes += _ties(effect)
    return effect


def _unpaired(
    effect: Effect, runs: list[Record], base_runs: list[Record], question: Question, comparisons: int
) -> Effect:
    effect.notes.append("the seeds of some runs are not known: not paired (Welch), which takes more runs to tell.")
    effect.values = [value for record in runs if math.isfinite(value := record.value(effect.metric))]
    effect.base_values = [value for record in base_runs if math.isfinite(value := record.value(effect.metric))]
    interval = unpaired_interval(effect.values, effect.base_values, question.level, comparisons)
    effect.interval = _within(interval, effect.bounds)
    if interval is None:
        effect.notes.append("too few runs, or none that differ: no interval.")
    return effect


def _within(interval: Interval | None, bounds: tuple[float, float] | None) -> Interval | None:
    """No difference is larger than the metric's range."""
    if interval is None or bounds is None:
        return interval
    most = bounds[1] - bounds[0]
    return Interval(max(interval.low, -most), min(interval.high, most))


def _ties(effect: Effect) -> list[str]:
    """Where the normal distribution that the interval rests on is far off."""
    notes = []
    n, ties = len(effect.seeds), sum(difference == 0 for difference in effect.differences)
    if 2 * ties >= n:
        notes.append(f"{ties} of {n} pairs are ties: the interval is rough.")
    if effect.bounds is not None:
        ends = [sum(value in effect.bounds for value in values) for values in (effect.values, effect.base_values)]
        if 2 * max(ends) >= n:
            notes.append(f"{max(ends)} of {n} runs are at the end of the metric's range: a difference may be hidden.")
    return notes


def enough_seeds(
    records: Sequence[Record], arms: Set[str], question: Question, seeds: Sequence[int], width: float
) -> int | None:
    """The first number of seeds, in their order, at which all arms are told apart from the base in the first metric, or
    the interval is narrower than ``width``; ``None`` if there is none yet. By the intervals that hold under looking.

    It depends on the runs and the order of the seeds alone, not on which run came to its end first.

    Args:
        records: runs that came to an end, failed ones too.
        arms: names of all, that of the base too.
        question: what is asked of them.
        seeds: in the order in which they are added.
        width: in the unit in which the metric is shown, points for a share.
    """
    asked = replace(question, metrics=question.metrics[:1], looking=True)
    ended: dict[int, set[str]] = {}
    for record in records:
        ended.setdefault(record.seed if record.seed is not None else -1, set()).add(record.arm)
    for n in range(1, len(seeds) + 1):
        if ended.get(seeds[n - 1], set()) != arms:
            return None
        some = [record for record in records if record.seed in seeds[:n]]
        if all(_is_told(effect, width) for effect in effects_of(some, asked)):
            return n
    return None


def _is_told(effect: Effect, width: float) -> bool:
    interval = effect.interval
    return interval is not None and (interval.excludes_zero or interval.width * effect.factor < width)


def mean_and_spread(records: Sequence[Record], metric: str) -> tuple[int, float, float]:
    """Of the finished runs of an arm: how many have the metric, mean, standard deviation."""
    values = [value for record in records if record.finished and math.isfinite(value := record.value(metric))]
    return len(values), mean_of(values) if values else math.nan, spread_of(values)


def costs(records: Sequence[Record], base: Sequence[Record], key: str) -> tuple[float, float]:
    """Mean of a cost over the finished runs of an arm, and its ratio to that of the base, the median over seeds."""
    values = _known(records, key)
    partners = _known(base, key)
    ratios = sorted(values[seed] / partners[seed] for seed in values if partners.get(seed))
    middle = len(ratios) // 2
    median = math.nan
    if ratios:
        median = ratios[middle] if len(ratios) % 2 else (ratios[middle - 1] + ratios[middle]) / 2
    return mean_of(list(values.values())) if values else math.nan, median


def _known(records: Sequence[Record], key: str) -> dict[Any, float]:
    return {record.seed: float(record.status[key]) for record in records if record.finished and key in record.status}
