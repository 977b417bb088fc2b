"""Time of importing this library, beside Lightning's, each in a fresh process.

    python benchmarks/imports.py [--quick]

Seconds of the import statement alone, without the start of the interpreter; the processes take turns. What is imported
beyond Lightning comes from ``python -X importtime``, as times without those of what a module imports in turn.
"""

import subprocess
import sys
from collections import defaultdict
from functools import partial

from turns import Effort, Row, effort_asked, in_turns, pick, ratios, table

LIGHTNING = "lightning"
OURS = ("lightning_feat", "lightning_feat.callbacks")
BAR = 1.15


def seconds_of(module: str) -> float:
    code = f"import time; began = time.perf_counter(); import {module}; print(time.perf_counter() - began)"
    return float(_run("-c", code).stdout)


def measure(effort: Effort) -> list[Row]:
    if effort == "full":
        seconds_of(OURS[-1])  # bytecode and the cache of the file system
    ways = {module: partial(seconds_of, module) for module in (LIGHTNING, *OURS)}
    taken = in_turns(ways, seconds=45, effort=effort, most=9)
    rows = []
    for module in OURS:
        ratio = ratios(taken[module], taken[LIGHTNING])
        rows.append(Row(f"import {module}", f"import {LIGHTNING}", ratio, bar=f"<= {BAR}", holds=ratio.middle <= BAR))
    return rows


def beyond_lightning() -> list[tuple[str, float]]:
    """Milliseconds of each package that the callbacks import and Lightning does not, the slowest first."""
    own, theirs = _self_times(OURS[-1]), _self_times(LIGHTNING)
    packages: defaultdict[str, float] = defaultdict(float)
    for module, milliseconds in own.items():
        if module not in theirs:
            name = module.split(".")
            packages[".".join(name[:2]) if name[0] == "lightning_feat" else name[0]] += milliseconds
    return sorted(packages.items(), key=lambda item: -item[1])


def _self_times(module: str) -> dict[str, float]:
    lines = _run("-X", "importtime", "-c", f"import {module}").stderr.splitlines()
    cells = [line.removeprefix("import time:").split("|") for line in lines if line.startswith("import time:")]
    return {name.strip(): int(own) / 1000 for own, _, name in cells if own.strip().isdigit()}


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-W", "ignore", *arguments], capture_output=True, text=True, check=True)


def main() -> None:
    effort = effort_asked(__doc__)
    print(table(("import", "beside", "ratio"), ((row.what, row.beside, row.time) for row in measure(effort))))
    print("\nBeyond Lightning, milliseconds:\n")
    most = pick(effort, 30, 10, 3)
    print(table(("package", "ms"), ((name, f"{taken:.1f}") for name, taken in beyond_lightning()[:most])))


if __name__ == "__main__":
    main()
