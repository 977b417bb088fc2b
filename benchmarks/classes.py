"""All collapse measures from the sums of many classes: time, memory, and how both grow.

    python benchmarks/classes.py [--quick] [--against FOLDER]   # FOLDER: another checkout of this repository

The yardstick is the product of the class means with themselves, ``2 C^2 D`` operations, which any measure of all pairs
has to make once (half of it would do). Against another checkout both are loaded into one process and take turns. Memory
is that of a fresh process above the sums, resident set.
"""

import argparse
import importlib
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from turns import Effort, Row, Spread, add_efforts, in_turns, pick, ratios, spread_of, table, timed

CLASSES, WIDTHS = (1250, 2500, 5000, 10_000), (1024, 2048, 4096, 8192)
MEMORY = (10_000, 1024)
_FOLDER = Path(__file__).parents[1]


def sums_of(num_classes: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts, sums and squares of twenty samples a class."""
    generator = torch.Generator().manual_seed(0)
    sums = torch.randn(num_classes, width, generator=generator, dtype=torch.float64).mul_(20)
    each = torch.full((num_classes,), 20.0, dtype=torch.float64)
    return each, sums, sums.square().sum(1) / 20 + 2 * width * each / 20


@contextmanager
def _loaded_from(folder: Path) -> Iterator[None]:
    """The package of a checkout in place of that which is loaded."""
    held = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "lightning_feat"}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == "lightning_feat"]:
            del sys.modules[name]
        sys.modules.update(held)


def measures_of(folder: Path = _FOLDER) -> Any:
    """``collapse_measures``, of counts, sums and squares, as the checkout in ``folder`` has it."""
    with _loaded_from(folder):
        module = importlib.import_module("lightning_feat.functional.neural_collapse")
    return lambda *entries: module.collapse_measures(module.ClassSums(*entries))


def time_of(shape: tuple[int, int], effort: Effort, seconds: float, against: Path | None = None) -> dict[str, Any]:
    """Seconds of each way in each round."""
    entries = sums_of(*shape)
    ours = measures_of()
    ways = {"ours": timed(lambda: ours(*entries)), "product": timed(lambda: entries[1] @ entries[1].T)}
    if against is not None:
        theirs = measures_of(against)
        ways["theirs"] = timed(lambda: theirs(*entries))
    for way in ways.values():
        way()
    return in_turns(ways, seconds, effort, most=9)


def memory_of(shape: tuple[int, int], folder: Path = _FOLDER) -> float:
    """Bytes above the sums, at most, of a fresh process."""
    command = [sys.executable, __file__, "--memory-of", *map(str, shape), str(folder)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _say_memory(num_classes: int, width: int, folder: Path) -> None:
    ours = measures_of(folder)
    ours(*sums_of(4, 8))  # loads what is loaded once
    entries = sums_of(num_classes, width)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize()
    ours(*entries)
    print(max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before))


def rows(effort: Effort) -> list[Row]:
    """For the one table: time beside the product, memory beside the sums."""
    shape = pick(effort, (1000, 2048), (200, 256), (20, 16))
    taken = time_of(shape, effort, seconds=15)
    size = pick(effort, MEMORY, (500, 256), (20, 16))
    memory = memory_of(size) / (8 * size[0] * size[1])
    return [
        Row(
            f"all collapse measures, {shape[0]} x {shape[1]}",
            "product of the means",
            ratios(taken["ours"], taken["product"]),
        ),
        Row(f"all collapse measures, {size[0]} x {size[1]}", "the sums", memory=spread_of([memory])),
    ]


def _slope(sizes: list[int], rounds: list[list[float]]) -> Spread:
    logs = np.log(sizes)
    return spread_of([float(np.polyfit(logs, np.log(times), 1)[0]) for times in zip(*rounds, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_efforts(parser)
    parser.add_argument("--against", type=Path, help="another checkout, to be compared with")
    parser.add_argument("--memory-of", nargs=3, metavar=("C", "D", "FOLDER"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.memory_of:
        _say_memory(int(asked.memory_of[0]), int(asked.memory_of[1]), Path(asked.memory_of[2]))
        return
    effort: Effort = "moment" if asked.moment else "quick" if asked.quick else "full"
    lines = []
    grown = {
        "classes": [(size, pick(effort, 1024, 64, 8)) for size in pick(effort, CLASSES, (250, 500, 1000), (16, 32))],
        "features": [(pick(effort, 1000, 64, 8), size) for size in pick(effort, WIDTHS, (256, 512, 1024), (16, 32))],
    }
    slopes = []
    for axis, shapes in grown.items():
        rounds, held = [], []
        for shape in shapes:
            taken = time_of(shape, effort, seconds=40, against=asked.against)
            memory, theirs = memory_of(shape), None
            beside = ["", ""]
            if asked.against is not None:
                theirs = memory_of(shape, asked.against)
                beside = [str(ratios(taken["ours"], taken["theirs"])), f"{theirs / 1e6:.0f}"]
            lines.append(
                (
                    f"{shape[0]:,} x {shape[1]:,}",
                    f"{spread_of(taken['ours']).middle:.3g}",
                    str(ratios(taken["ours"], taken["product"])),
                    f"{memory / 1e6:.0f}",
                    *beside,
                )
            )
            rounds.append(taken["ours"])
            held.append([max(memory, 1.0)])
        sizes = [shape[0 if axis == "classes" else 1] for shape in shapes]
        fewest = min(map(len, rounds))
        slopes.append((axis, str(_slope(sizes, [times[:fewest] for times in rounds])), str(_slope(sizes, held))))
    heads = ("C x D", "s", "over the product", "MB above the sums", "over the other build", "MB of the other build")
    print(table(heads, lines), "", table(("grows with", "time, exponent", "memory, exponent"), slopes), sep="\n")


if __name__ == "__main__":
    main()
