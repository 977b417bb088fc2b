"""Times taken in turns, and what is told of them.

What is compared is measured side by side: every way once in each round, in one process, every other round in reverse
order. A ratio is taken round by round, so that what slows the machine for longer than a round falls out; told are the
median of the ratios and the middle half of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import torch

Effort = Literal["full", "quick", "moment"]
Step = Callable[[], object]
_SHARE: dict[Effort, float] = {"full": 1.0, "quick": 0.05, "moment": 0.0}  # of the seconds of a full run
_FEWEST: dict[Effort, int] = {"full": 3, "quick": 1, "moment": 1}  # rounds
T = TypeVar("T")


class Spread(NamedTuple):
    """The middle half of some values: quartiles, and of how many rounds."""

    low: float
    middle: float
    high: float
    rounds: int

    def __str__(self) -> str:
        if self.rounds == 1:
            return _short(self.middle)
        return f"{_short(self.middle)} ({_short(self.low)} to {_short(self.high)})"


class Row(NamedTuple):
    """A line of the table: ratios of ``what`` to ``beside``."""

    what: str
    beside: str
    time: Spread | None = None
    epoch: Spread | None = None
    memory: Spread | None = None
    bar: str = ""
    holds: bool = True


def spread_of(values: Sequence[float]) -> Spread:
    """Quartiles of at least one value; of one value all are that value."""
    ends = statistics.quantiles(values, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Spread(ends[0], ends[1], ends[2], len(values))


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of values taken in the same rounds."""
    return spread_of([a / b for a, b in zip(above, below, strict=True)])


def pick(effort: Effort, full: T, quick: T, moment: T) -> T:
    """One of three sizes."""
    return {"full": full, "quick": quick, "moment": moment}[effort]


def in_turns(
    ways: Mapping[str, Callable[[], float]], seconds: float, effort: Effort = "full", most: int = 25
) -> dict[str, list[float]]:
    """What each way returns, its seconds, in each round.

    Rounds go on for so many ``seconds`` (a quick run takes its share of them), but there are at least three, or one in
    a quick run, and ``most`` at most. Who needs warming up calls each way once before.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    began, done = time.perf_counter(), 0
    while done < _FEWEST[effort] or (done < most and time.perf_counter() - began < seconds * _SHARE[effort]):
        for name in list(ways)[:: -1 if done % 2 else 1]:
            taken[name].append(ways[name]())
        done += 1
    return taken


def now(device: str = "cpu") -> float:
    """The time when the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(step: Step, device: str = "cpu", count: int = 0, least: float = 0.02) -> Callable[[], float]:
    """Seconds of a call of ``step``, as a mean over ``count`` calls, or over as many as take ``least`` seconds."""

    def seconds() -> float:
        began, done = now(device), 0
        while done < count or (not count and now(device) - began < least):
            step()
            done += 1
        return (now(device) - began) / done

    return seconds


def effort_asked(description: str | None) -> Effort:
    """From the command line of a file that runs alone."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_efforts(parser)
    arguments = parser.parse_args()
    return "moment" if arguments.moment else "quick" if arguments.quick else "full"


def add_efforts(parser: argparse.ArgumentParser) -> None:
    """``--quick`` and ``--moment``."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds: a first impression")
    how.add_argument("--moment", action="store_true", help="the smallest sizes, one round: shows only that it runs")


def table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """In Markdown."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _short(value: float) -> str:
    return (
        f"{value:.3g}"
        if abs(value) < 0.1 or abs(value) >= 100
        else f"{value:.3f}"
        if abs(value) < 2
        else f"{value:.2f}"
    )
