"""What is on disk: one folder for each run, complete or not there, and one file that says what the study is.

FOLDER/study.json                arms, base, metrics, and after how many seeds somebody looked
FOLDER/runs/ARM/seed_0/          status.json, metrics.csv, config.yaml, log.txt, and what the run's loggers wrote
FOLDER/runs/ARM/.seed_1-ab12/    a run that goes on, or was killed
FOLDER/runs/ARM/trial.json       what one batch of the base logged, before the first run
FOLDER/starts/                   what all arms of a seed began with, where there is such
"""

import contextlib
import csv
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Curve = list[tuple[float, float]]  # (epochs completed, value)
SELECTIONS = ("last", "max", "min")


@dataclass
class Record:
    """One run as it was found on disk.

    Attributes:
        arm: name of the arm.
        seed: ``None`` where nothing on disk tells it.
        curves: each metric against the epochs completed.
        status: all of ``status.json``; of runs that were not started here, what could be found.
        folder: where it is.
    """

    arm: str
    seed: int | None
    curves: dict[str, Curve]
    status: dict[str, Any]
    folder: Path = field(default_factory=Path)

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return bool(self.status.get("status") == "finished")

    def value(self, metric: str) -> float:
        """Of ``val/accuracy`` (its last value) or ``val/accuracy:max``, say; nan where it was not logged."""
        name, selection = split_metric(metric)
        values = [value for _, value in self.curves.get(name, [])]
        if not values:
            return math.nan
        if selection == "last":
            return values[-1]
        finite = [value for value in values if not math.isnan(value)]
        return (max if selection == "max" else min)(finite, default=math.nan)


def split_metric(metric: str) -> tuple[str, str]:
    """Name, and which of its values counts: the last one, or the largest or smallest."""
    name, colon, selection = metric.rpartition(":")
    return (name, selection) if colon and selection in SELECTIONS else (metric, "last")


def run_path(folder: Path, arm: str, seed: int) -> Path:
    """Where a complete run is."""
    return folder / "runs" / arm / f"seed_{seed}"


def trial_path(folder: Path, arm: str) -> Path:
    """What an arm logs, as far as a trial of one batch tells."""
    return folder / "runs" / arm / "trial.json"


@contextlib.contextmanager
def complete_or_absent(final: Path) -> Iterator[Path]:
    """A folder beside ``final`` to write into, which takes its place at the end of the block. A block that is broken
    off by an error, or killed, leaves ``final`` as it was.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    yield partial
    for path in (path for path in partial.rglob("*") if path.is_file() and path.suffix in (".json", ".csv")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if final.exists():  # a run that had failed
        old = final.with_name(f".{final.name}-old-{uuid.uuid4().hex[:8]}")
        final.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    partial.rename(final)


def clear_partial(folder: Path) -> None:
    """Remove what killed runs left. For who holds the study's lock, when none of its runs goes on."""
    for path in (folder / "runs").glob("*/.seed_*"):
        # Moved first: a process that has not noticed yet that it is alone can then neither write into it nor move it.
        aside = path.with_name(f".seed_gone-{uuid.uuid4().hex[:8]}")
        with contextlib.suppress(FileNotFoundError):
            path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Written aside and moved."""
    aside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    with aside.open("w") as file:
        json.dump(content, file, indent=1, allow_nan=True)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_text(path: Path, content: str) -> None:
    """Written aside and moved."""
    aside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    aside.write_text(content)
    aside.replace(path)


def read_json(path: Path) -> Any:
    """Its content.

    Raises:
        ValueError: if it is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} cannot be read: {error}. Remove its folder to do this run again.") from error


def write_curves(path: Path, curves: Mapping[str, Curve]) -> None:
    """One line for each value, with all its digits."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["metric", "epoch", "value"])
        writer.writerows([name, repr(x), repr(y)] for name, curve in curves.items() for x, y in curve)


def read_run(folder: Path) -> Record | None:
    """The run in its folder; ``None`` if none came to an end there."""
    if not (folder / "status.json").is_file():
        return None
    status = read_json(folder / "status.json")
    if status["status"] == "finished" and not (folder / "metrics.csv").is_file():
        raise ValueError(f"{folder} says that its run is finished, but has no metrics.csv: remove it to do it again.")
    curves: dict[str, Curve] = {}
    if (folder / "metrics.csv").is_file():
        with (folder / "metrics.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                curves.setdefault(row["metric"], []).append((float(row["epoch"]), float(row["value"])))
    return Record(status["arm"], int(status["seed"]), curves, status, folder)


def read_runs(folder: Path) -> list[Record]:
    """All runs of a study that came to an end, failed ones too."""
    paths = sorted((folder / "runs").glob("*/seed_*"))
    return [record for path in paths if (record := read_run(path)) is not None]
