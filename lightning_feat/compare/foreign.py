"""Runs that were not started here: what Lightning's ``CSVLogger`` left of them."""

import csv
import math
import re
from pathlib import Path
from typing import Any

from lightning_feat.compare.records import Curve, Record

_SEED_KEYS = ("seed_everything", "seed")


def read_csv_runs(folder: Path, arm: str | None = None) -> list[Record]:
    """A run for each ``metrics.csv`` below ``folder``.

    Args:
        folder: of one arm, or with a folder for each arm in it.
        arm: its name; by default that of the folder above ``version_0``, ``version_1``, ...

    Raises:
        ValueError: if there is none.
    """
    files = sorted(folder.rglob("metrics.csv"), key=lambda path: _natural(str(path)))
    if not files:
        raise ValueError(f"{folder} holds neither study.json nor a metrics.csv of CSVLogger: give a folder with runs.")
    records = []
    for path in files:
        run = path.parent
        named = run.resolve().parent.name if re.fullmatch(r"(version|seed)[_=]?\d+", run.name) else run.resolve().name
        status = {"status": "finished", "foreign": True}
        records.append(Record(arm or named, seed_of(run), read_csv_logger(path), status, run))
    return records


def read_csv_logger(path: Path) -> dict[str, Curve]:
    """Each metric against the epochs completed, with its last value of each epoch; against steps where no epoch was
    logged.
    """
    curves: dict[str, Curve] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            epoch = row.get("epoch") or ""
            x = float(epoch) + 1 if epoch else float(row.get("step") or math.nan)
            for name, text in row.items():
                if name in ("epoch", "step") or not text:
                    continue
                curve = curves.setdefault(name, [])
                if curve and curve[-1][0] == x:
                    curve.pop()
                curve.append((x, float(text)))
    return curves


def seed_of(run: Path) -> int | None:
    """By the configuration that LightningCLI or the logger saved beside it, else by the name of its folder."""
    for name in ("config.yaml", "hparams.yaml"):
        if (run / name).is_file():
            content = _read_yaml(run / name)
            for key in _SEED_KEYS:
                value = content.get(key) if isinstance(content, dict) else None
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
    found = re.fullmatch(r"seed[_=]?(\d+)", run.name)
    return int(found.group(1)) if found else None


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError:  # with tags of Python objects
        return None


def _natural(text: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
