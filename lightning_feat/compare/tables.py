"""The answer in words, in tables and as a file with a line for each run."""

import csv
import io
import math
from collections.abc import Mapping, Sequence

from lightning_feat.compare.effects import Effect, Question, costs, mean_and_spread
from lightning_feat.compare.records import Record


def decimals_for(size: float) -> int:
    """So many that a number of this size has two digits that count; all of a table are rounded alike."""
    return max(0, 1 - math.floor(math.log10(size))) if size > 0 and math.isfinite(size) else 2


def number(value: float, decimals: int, sign: bool = False) -> str:
    """Rounded, without a minus before a zero."""
    if not math.isfinite(value):
        return str(value)
    if decimals > 6:
        return f"{value:{'+' if sign else ''}.3g}"
    text = f"{value:{'+' if sign else ''}.{decimals}f}"
    return text.replace("-", "+" if sign else "") if float(text) == 0 else text


def answer(effect: Effect) -> str:
    """One sentence: higher, lower, or no difference told, with the interval; or why there is none."""
    factor, unit = effect.factor, " points" if effect.is_share else ""
    if math.isnan(effect.difference):
        said = "not known"
    elif effect.interval is None:
        decimals = decimals_for(abs(effect.difference) * factor) if effect.difference else 0
        said = f"difference {number(effect.difference * factor, decimals, True)}{unit}, no interval"
    else:
        decimals = decimals_for(effect.interval.width * factor / 2)
        low, high = effect.interval.low * factor, effect.interval.high * factor
        if effect.interval.excludes_zero:
            direction = "higher" if low > 0 else "lower"
            size = number(abs(effect.difference) * factor, decimals)
            ends = sorted((abs(low), abs(high)))
            said = f"{direction} by {size}{unit} [{number(ends[0], decimals)}, {number(ends[1], decimals)}]"
        else:
            said = f"no difference told: between {number(low, decimals, True)} and {number(high, decimals, True)}{unit}"
    return f"{effect.arm}, {effect.metric}: {said}"


def result_table(records: Sequence[Record], effects: Sequence[Effect], question: Question) -> str:
    """A Markdown table for each metric, and what must be known to read it. The same runs give the same text."""
    arms = [question.base, *dict.fromkeys(effect.arm for effect in effects)]
    runs = {arm: [record for record in records if record.arm == arm] for arm in arms}
    parts = []
    for metric in question.metrics:
        rows = {effect.arm: effect for effect in effects if effect.metric == metric}
        any_effect = next(iter(rows.values()))
        unit = " (%)" if any_effect.is_share else ""
        interval = f"{100 * question.level:g} % interval" + (", joint" if len(rows) > 1 and question.joint else "")
        lines = [
            f"| {metric}{unit} | runs | mean | spread | difference | {interval} | seeds to tell |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        stats = {arm: mean_and_spread(runs[arm], metric) for arm in arms}
        decimals = max([_decimals(stats[arm], any_effect.factor) for arm in arms])
        for arm in arms:
            count, mean, spread = stats[arm]
            cells = [arm, str(count), *(_cell(x * any_effect.factor, decimals) for x in (mean, spread))]
            cells += _difference_cells(rows[arm]) if arm in rows else ["", "", ""]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    parts.append("\n".join(answer(effect) + "." for effect in effects))
    notes = list(dict.fromkeys(f"{effect.arm}, {effect.metric}: {note}" for effect in effects for note in effect.notes))
    if notes:
        parts.append("\n".join(notes))
    parts.append(method(effects, question))
    return "\n\n".join(parts) + "\n"


def _decimals(stats: tuple[int, float, float], factor: float) -> int:
    _, mean, spread = stats
    if spread > 0:
        return decimals_for(spread * factor)
    return decimals_for(abs(mean) * factor / 100) if mean and math.isfinite(mean) else 0


def _cell(value: float, decimals: int) -> str:
    return "" if math.isnan(value) else number(value, decimals)


def _difference_cells(effect: Effect) -> list[str]:
    size = effect.interval.width / 2 if effect.interval else abs(effect.difference)
    decimals = decimals_for(size * effect.factor)
    if math.isnan(effect.difference):
        return ["", "", ""]
    ends = ""
    if effect.interval:
        low, high = (number(end * effect.factor, decimals, True) for end in effect.interval)
        ends = f"[{low}, {high}]"
    needed = str(effect.needed) if effect.needed else ("> 10000" if effect.interval and effect.paired else "")
    return [number(effect.difference * effect.factor, decimals, True), ends, needed]


def method(effects: Sequence[Effect], question: Question) -> str:
    """How the intervals were made, and on what they rest."""
    arms = len({effect.arm for effect in effects})
    kind = "confidence sequence (Wang and Ramdas, 2023), valid at every look" if question.looking else "Student's t"
    joint = ""
    if arms > 1:
        joint = f"; Bonferroni over {arms} arms, so that all hold together for one metric"
        joint = joint if question.joint else f", each of {arms} on its own: some may fail to hold"
    return (
        f"Differences are arm less {question.base}, paired by seed; intervals by {kind}, at {100 * question.level:g} %"
        f"{joint}. They rest on independent seeds and differences near a normal distribution, and speak of other seeds "
        "on this data, not of other data. Spread: standard deviation over seeds. Seeds to tell: for a difference of "
        "the size seen, with probability 0.8, if it is the true one, by Student's t."
    )


def cost_table(records: Sequence[Record], arms: Sequence[str]) -> str:
    """Time and memory of each arm, and their ratios to the first one; empty where nothing is known of either."""
    runs = {arm: [record for record in records if record.arm == arm] for arm in arms}
    rows = {
        arm: [*costs(runs[arm], runs[arms[0]], "fit_s"), *costs(runs[arm], runs[arms[0]], "memory_mb")] for arm in arms
    }
    if all(math.isnan(value) for row in rows.values() for value in row):
        return ""
    lines = ["| cost | time of a fit (s) | ratio | peak memory (MB) | ratio |", "|---|---:|---:|---:|---:|"]
    for arm, (seconds, slower, memory, larger) in rows.items():
        cells = [arm, _cell(seconds, 1), _cell(slower, 2), _cell(memory, 0), _cell(larger, 2)]
        lines.append("| " + " | ".join(cells) + " |")
    what = {str(record.status["memory_of"]) for record in records if "memory_of" in record.status}
    told = f" Memory of the {' or '.join(sorted(what))}." if what else ""
    return "\n".join(lines) + f"\n\nRatios are medians over seeds; runs side by side slow one another down.{told}\n"


def runs_csv(records: Sequence[Record], metrics: Sequence[str]) -> str:
    """A line for each run, failed ones too; numbers with all their digits."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    costs_of = ("fit_s", "memory_mb", "epochs", "steps")
    writer.writerow(["arm", "seed", "status", *metrics, *costs_of, "error", "folder"])
    for record in records:
        values = ["" if math.isnan(value := record.value(metric)) else repr(value) for metric in metrics]
        status: Mapping[str, object] = record.status
        seed = "" if record.seed is None else record.seed
        rest = [status.get(key, "") for key in costs_of]
        writer.writerow([record.arm, seed, status["status"], *values, *rest, status.get("error", ""), record.folder])
    return file.getvalue()
