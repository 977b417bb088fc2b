"""``lightning-feat compare``: a base configuration, arms that change it, seeds, and the answer."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_feat.compare.conditions import Conditions, compare_conditions, report_conditions
from lightning_feat.compare.reporting import Comparison, report
from lightning_feat.compare.running.arms import YamlArm
from lightning_feat.compare.running.work import StudyError
from lightning_feat.compare.study import EXECUTORS, compare

_USAGE = """lightning-feat compare --config FILE --arm NAME=FILE [--arm ...] [--seeds N] [--metric NAME] [options]
       lightning-feat compare --config FILE --arm NAME=FILE --condition NAME=FILE --condition NAME=FILE [options]
       lightning-feat compare --report FOLDER [FOLDER ...] [--metric NAME ...]"""
_END = """An arm is the base and one more YAML file: `callbacks+:` in it appends to the list of the base, `callbacks:`
replaces it. Options of `lightning-feat fit`, such as --trainer.max_epochs 3, go to all arms. The same command again
goes on with the runs that are missing."""


def run_compare(arguments: Sequence[str]) -> int:
    """Do what these arguments say, and print the answer.

    Returns:
        The exit status: 1 where a run failed, 2 for a mistake in the arguments, 130 where it was interrupted.
    """
    parser = _parser()
    own, rest = parser.parse_known_args(list(arguments))
    try:
        bounds = {name: _bounds(value) for name, value in map(_named, own.bounds)}
        made = _again(own, rest, bounds) if own.report else _new(own, rest, bounds)
    except (ValueError, ModuleNotFoundError, StudyError, RuntimeError) as error:
        print(f"lightning-feat compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with the runs that are missing.", file=sys.stderr)
        return 130
    found = made.comparisons.values() if isinstance(made, Conditions) else [made]
    return int(not all(record.finished for each in found for record in each.records))


def _again(own: argparse.Namespace, rest: Sequence[str], bounds: dict[str, Any]) -> Comparison | Conditions:
    if rest or own.config or own.arm or own.condition:
        raise ValueError(f"--report takes finished runs: leave out {' '.join(rest) or '--config and --arm'}.")
    asked = {"metrics": own.metric, "base": own.base, "level": own.level, "bounds": bounds, "joint": own.joint}
    if len(own.report) == 1 and (Path(own.report[0]) / "conditions.json").is_file():
        return report_conditions(own.report[0], **asked)
    made = report(*own.report, out=own.folder, **asked)
    print(made)
    print(f"Files: {made.folder}/table.md, cost.md, runs.csv, comparison.png, comparison.pdf")
    return made


def _new(own: argparse.Namespace, rest: Sequence[str], bounds: dict[str, Any]) -> Comparison | Conditions:
    options = {
        "base": own.base,
        "folder": own.folder or "comparison",
        "level": own.level or 0.95,
        "until_told": own.until_told,
        "jobs": own.jobs,
        "threads": own.threads,
        "executor": own.executor,
        "slurm": {name: _plain(value) for name, value in map(_named, own.slurm)},
        "share_order": not own.own_order,
        "test": own.test,
        "bounds": bounds,
        "joint": own.joint is not False,
        "trial": not own.no_trial,
    }
    asked: tuple[Any, ...] = (_seeds(own.seeds), own.metric or "val/accuracy")
    if not own.condition:
        return compare(_arms(own, rest), *asked, **options)
    conditions = {}
    for given in own.condition:
        name, value = _named(given)
        if name in conditions:
            raise ValueError(f"--condition {given}: there are two of the name {name!r}.")
        conditions[name] = _arms(own, rest, tuple(value.split(",")))
    return compare_conditions(conditions, *asked, **options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lightning-feat compare", usage=_USAGE, description=__doc__, epilog=_END, allow_abbrev=False
    )
    add: Any = parser.add_argument
    add("-c", "--config", action="append", default=[], metavar="FILE", help="the base; several, one over the other")
    add("--arm", action="append", default=[], metavar="NAME=FILE", help="what an arm changes; FILE,FILE for several")
    add(
        "--condition",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="ask the same of the base with this over it; several, each with a base and a table of its own",
    )
    add("--seeds", default="5", metavar="N", help="how many (0, 1, ...), or which: 3,5,8 (default 5)")
    add(
        "--metric",
        action="append",
        metavar="NAME",
        help="logged metric, last value; NAME:max, NAME:min (default val/accuracy)",
    )
    add("--base", metavar="NAME", help="what to compare with; by default the base configuration, an arm called base")
    add(
        "--no-base", action="store_true", help="do not run the base configuration itself; the first arm takes its place"
    )
    add("--folder", metavar="FOLDER", help="for runs, table and figure (default comparison)")
    add("--until-told", type=float, metavar="WIDTH", help="stop at an interval narrower than this, or without zero")
    add("--level", type=float, help="at which the intervals of all arms hold together (default 0.95)")
    add(
        "--separate",
        dest="joint",
        action="store_const",
        const=False,
        help="let each interval hold on its own, and not all arms' together",
    )
    add("--jobs", type=int, metavar="N", help="runs at a time (default: one for each GPU, else cores, at most 8)")
    add("--threads", type=int, metavar="N", help="of each run (default: cores over jobs)")
    add("--executor", choices=EXECUTORS, default="processes", help="who does the runs (default processes)")
    add("--slurm", action="append", default=[], metavar="KEY=VALUE", help="option of submitit, such as timeout_min=60")
    add("--seed-option", action="append", default=[], metavar="KEY", help="option that gets the seed, too")
    add("--own-order", action="store_true", help="leave the order of batches to the run, bit for bit as fit does")
    add("--test", action="store_true", help="test after each fit, with the last weights")
    add("--no-trial", action="store_true", help="do not try one batch of the base first, to hear which metrics it logs")
    add("--bounds", action="append", default=[], metavar="NAME=LOW,HIGH", help="range of a metric; none for without")
    add("--report", nargs="+", metavar="FOLDER", help="table and figure from finished runs; also NAME=FOLDER")
    return parser


def _arms(own: argparse.Namespace, rest: Sequence[str], condition: tuple[str, ...] = ()) -> dict[str, Any]:
    if not own.config:
        raise ValueError("give the base by --config FILE, or finished runs by --report FOLDER.")
    layers: dict[str, tuple[str, ...]] = {} if own.no_base else {"base": ()}
    for given in own.arm:
        name, value = _named(given)
        if name in layers:
            raise ValueError(f"--arm {given}: there are two arms of the name {name!r}.")
        layers[name] = tuple(value.split(","))
    for path in (*own.config, *condition, *(path for paths in layers.values() for path in paths)):
        if not Path(path).is_file():
            raise ValueError(f"there is no file {path!r}.")
    if len(layers) < 2:
        raise ValueError("give an arm to compare with the base: --arm NAME=FILE.")
    make = {"options": tuple(rest), "seed_options": tuple(own.seed_option)}
    return {name: YamlArm(name, (*own.config, *condition, *paths), **make) for name, paths in layers.items()}


def _named(given: str) -> tuple[str, str]:
    name, equals, value = given.partition("=")
    if not (name and equals and value):
        raise ValueError(f"{given!r}: give NAME=VALUE.")
    return name, value


def _seeds(given: str) -> int | list[int]:
    try:
        return [int(part) for part in given.split(",")] if "," in given else int(given)
    except ValueError:
        raise ValueError(f"--seeds {given}: give how many, or which ones with commas between.") from None


def _bounds(given: str) -> tuple[float, float] | None:
    if given == "none":
        return None
    try:
        low, high = map(float, given.split(","))
    except ValueError:
        raise ValueError(f"--bounds {given}: give LOW,HIGH, or none.") from None
    return low, high


def _plain(value: str) -> Any:
    import yaml

    return yaml.safe_load(value)
