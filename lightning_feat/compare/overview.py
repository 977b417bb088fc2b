"""All metrics side by side, a row for each arm: for many metrics, and for the same arms under several conditions."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from lightning_feat.compare.effects import Effect, Question, bounds_of, mean_and_spread
from lightning_feat.compare.records import Record
from lightning_feat.compare.tables import decimals_for, number

Part = tuple[list[Record], list[Effect], Question]


def overview(parts: Mapping[str, Part], titles: Mapping[str, str] | None = None, condition: str = "condition") -> str:
    """Two Markdown tables: means and spreads; differences to the base with their intervals. Shares in per cent.

    Args:
        parts: what was found under each condition; under ``""`` where there is one alone, which then has no column.
        titles: of arms, metrics and conditions, by their names.
        condition: heading of their column.
    """
    titles = titles or {}
    named = [titles.get(name, name) for name in parts if name]
    metrics = next(iter(parts.values()))[2].metrics
    shares = {metric: _is_share(parts, metric) for metric in metrics}
    heads = [titles.get(metric, metric) + (" (%)" if shares[metric] else "") for metric in metrics]
    first = [condition] if named else []
    values: list[list[str]] = []
    changes: list[list[str]] = []
    digits = {metric: _digits(parts, metric, 100.0 if shares[metric] else 1.0) for metric in metrics}
    for name, (records, effects, question) in parts.items():
        start = [titles.get(name, name)] if name else []
        for arm in [question.base, *dict.fromkeys(effect.arm for effect in effects)]:
            runs = [record for record in records if record.arm == arm]
            row = [*start, titles.get(arm, arm)]
            values.append([*row, *(_mean(runs, metric, shares[metric], digits[metric][0]) for metric in metrics)])
            found = {effect.metric: effect for effect in effects if effect.arm == arm}
            if found:
                cells = [_change(found[metric], shares[metric], digits[metric][1]) for metric in metrics]
                changes.append([*row, *cells])
    bases = {question.base for _, _, question in parts.values()}
    minus = f"arm, minus {titles.get(base := bases.pop(), base)}" if len(bases) == 1 else "arm, minus its base"
    return _markdown([*first, "arm", *heads], values) + "\n" + _markdown([*first, minus, *heads], changes)


def _is_share(parts: Mapping[str, Part], metric: str) -> bool:
    values = [record.value(metric) for records, _, _ in parts.values() for record in records if record.finished]
    given = [question.bounds[metric] for _, _, question in parts.values() if metric in question.bounds]
    return (tuple(given[0] or ()) if given else bounds_of(metric, values)) == (0.0, 1.0)


def _digits(parts: Mapping[str, Part], metric: str, factor: float) -> tuple[int, int]:
    """Decimals of means and of differences, by a typical spread and half width: one for all rows of a column."""
    spreads, halves = [], []
    for records, effects, _ in parts.values():
        for arm in dict.fromkeys(record.arm for record in records):
            spreads.append(mean_and_spread([record for record in records if record.arm == arm], metric)[2])
        halves += [effect.interval.width / 2 for effect in effects if effect.metric == metric and effect.interval]
    sizes = [[size for size in found if size > 1e-9] for found in (spreads, halves)]
    typical = [decimals_for(median(found) * factor) if found else 2 for found in sizes]
    return typical[0], typical[1]


def _mean(runs: Sequence[Record], metric: str, share: bool, decimals: int) -> str:
    _, mean, spread = mean_and_spread(runs, metric)
    factor = 100.0 if share else 1.0
    if math.isnan(mean):
        return ""
    return number(mean * factor, decimals) + ("" if math.isnan(spread) else f" ± {number(spread * factor, decimals)}")


def _change(effect: Effect, share: bool, decimals: int) -> str:
    factor = 100.0 if share else 1.0
    if math.isnan(effect.difference):
        return ""
    said = number(effect.difference * factor, decimals, True)
    if effect.interval is None:
        return said
    low, high = (number(end * factor, decimals, True) for end in effect.interval)
    return f"{said} [{low}, {high}]"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines: list[Sequence[str]] = [heads, ["---"] * len(heads), *rows]
    line: Callable[[Sequence[str]], str] = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    return "\n".join(map(line, lines)) + "\n"
