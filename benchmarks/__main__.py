"""What the library costs, in one table of ratios.

    make bench                        # python benchmarks: about twelve minutes on two cores; writes docs/performance.md
    python benchmarks --quick         # a minute, smaller sizes, one round; writes nothing
    python benchmarks --only imports  # one part; imports, bars, callbacks, growth or bounds

Keep the machine quiet meanwhile. Each part is also a file that runs alone.
"""

import argparse
import datetime
import os
import platform
import sys
import time
from pathlib import Path

import bars
import bounds
import callbacks
import growth
import imports
import lightning
import torch
from turns import Effort, Row, add_efforts, table

DOCS = Path(__file__).parents[1] / "docs"
TRIED = Path(__file__).parent / "tried.md"  # the one part that is written by hand
PARTS = ("imports", "bars", "callbacks", "growth", "bounds")


def machine() -> str:
    """In words."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
        name = names[0] if names else name
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    graphics = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{name}, {os.cpu_count()} cores, {gibibytes:.0f} GiB of memory{graphics}; {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__} with {torch.get_num_threads()} threads, "
        f"Lightning {lightning.__version__}; float32"
    )


def load() -> str:
    """Processes that ran or waited, in the mean of the last minute; a quiet machine is near zero before the run."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def one_table(rows: list[Row], on_gpu: list[Row]) -> str:
    """With two more columns where there was a GPU."""
    heads = ["what", "beside", "time", "of an epoch", "peak memory", "bar", "holds"]
    heads += ["time, GPU", "of an epoch, GPU"] if on_gpu else []
    there = {(row.what, row.beside): row for row in on_gpu}
    cells = []
    for row in rows:
        line = [row.what, row.beside, *("" if v is None else str(v) for v in (row.time, row.epoch, row.memory))]
        line += [row.bar, ("yes" if row.holds else "no") if row.bar else ""]
        if on_gpu:
            twin = there.get((row.what, row.beside))
            line += ["" if twin is None or v is None else str(v) for v in (twin and twin.time, twin and twin.epoch)]
        cells.append(line)
    return table(heads, cells)


def report(effort: Effort, parts: list[str]) -> tuple[str, list[growth.Curve], list[str]]:
    """The page, what the figure shows, and what could not be measured."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows: dict[str, list[Row]] = {device: [] for device in devices}
    sections, failed, curves, before = [], [], [], load()
    began = time.perf_counter()

    def say(part: str) -> None:
        print(f"[{time.perf_counter() - began:4.0f} s] {part}", file=sys.stderr, flush=True)

    if "imports" in parts:
        say("imports")
        rows["cpu"] += imports.measure(effort)
        more = [] if effort == "quick" else imports.beyond_lightning()
        if more:
            named = ", ".join(f"{name} {taken:.0f}" for name, taken in more[:8])
            sections.append(
                f"## Imports\n\nWhat `lightning_feat.callbacks` imports and Lightning does not takes "
                f"{sum(taken for _, taken in more):.0f} ms in {len(more)} packages; most in {named}."
            )
    for device in devices:
        if "bars" in parts:
            say(f"bars, {device}")
            rows[device] += bars.measure(effort, device)
        if "callbacks" in parts:
            say(f"callbacks, {device}")
            measured, added, wrong = callbacks.measure(effort, device)
            rows[device] += measured
            failed += wrong
            if added:
                sections.append(_CALLBACKS.format(where=device) + callbacks.told(added))
    if "growth" in parts:
        say("growth")
        curves = growth.measure(effort, "cpu")
        sections.append(_GROWTH + growth.told(curves))
    for device in devices:
        if "bounds" in parts:
            say(f"bounds, {device}")
            sections.append(_BOUNDS.format(where=device) + bounds.told(*bounds.measure(effort, device)))
    say("done")
    command = "make bench" if effort == "full" else f"python benchmarks --{effort}"
    top = (
        f"# Performance\n\nWritten by `{command}` on {datetime.date.today():%d %B %Y}, in "
        f"{(time.perf_counter() - began) / 60:.0f} minutes; no number in a table is typed by hand.\n\n{machine()}. "
        f"Load before: {before}.\n\n{_TABLE} {_rounds(rows['cpu'])}\n\n{one_table(rows['cpu'], rows.get('cuda', []))}"
    )
    sections.insert(0, top)
    sections.append(TRIED.read_text().strip())
    if failed:
        sections.append("## Not measured\n\n" + "\n".join(f"- {line}" for line in failed))
    return "\n\n".join(sections) + "\n", curves, failed


def _rounds(rows: list[Row]) -> str:
    counts = [row.time.rounds for row in rows if row.time is not None] or [0]
    return f"Turns: {min(counts)} to {max(counts)}."


_TABLE = (
    "All numbers are ratios, measured side by side in one process and in turns (imports: fresh processes in turns):"
    " the median, and in brackets the middle half of the turns. `time` is that of a statement, a call or, for "
    "callbacks, of a training step with its hooks; `of an epoch` is all that happens in two epochs of eight batches"
    " (resnet18: four) with their validation, so that a pass over the data at the end of an epoch weighs as it does"
    " over real data. `peak memory` is that of a fit above what a fresh process had before it, resident set (GPU: "
    "what torch allocated), and moves by some percent from one process to the next. Batches are of 64 images of 32 "
    "x 32 for test_resnet and the small CLIP, and of 128 for resnet18. A ratio whose brackets hold one is no cost "
    "that could be told."
)
_CALLBACKS = (
    "## What callbacks add to a fit ({where})\n\nOperators of torch that the small run has more of with the callback,"
    " each timed by itself; of what it has less of nothing is told. Looks are values fetched from the device, each "
    "of which makes a GPU wait. The mean time of one tells launching (some microseconds) from work. The last "
    "columns say what share of the run's operator time they take, and which they are.\n\n"
)
_GROWTH = (
    "## How it grows\n\nExponents of the time in each size (log-log slopes, least squares), and between which sizes; "
    "the others are held. A fixed part, such as launching operators, makes them smaller than the operations alone. "
    "With processes, each has samples of its own, so zero would be ideal; beyond the number of cores they also wait"
    " for those.\n\n![Time over size on logarithmic axes, dotted lines of slope one](growth.png)\n\n"
)
_BOUNDS = (
    "## What bounds each ({where})\n\nBytes, floating-point operations and operators of a call, counted and priced by"
    " what this machine does at best, as shares of its time; of factorisations and sorting the time as it is. "
    "Traffic is an upper bound: what stays in the caches costs less. `bound by` is the largest share, of a third at"
    " least; else much of the time is Python's, or that of operators slower than a copy. Looks are values fetched "
    "from the device.\n\n"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_efforts(parser)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts; the page is not written")
    parser.add_argument("--out", type=Path, help="where to write performance.md and growth.png; docs for a whole run")
    arguments = parser.parse_args()
    effort: Effort = "moment" if arguments.moment else "quick" if arguments.quick else "full"
    whole = effort == "full" and len(arguments.only) == len(PARTS)
    page, curves, failed = report(effort, arguments.only)
    print(page)
    folder = arguments.out or (DOCS if whole else None)
    if folder is not None:
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "performance.md").write_text(page)
        if curves:
            growth.draw(curves, str(folder / "growth.png"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
