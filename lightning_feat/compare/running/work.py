"""The runs that a study needs: which are missing, in what order they are done, and when there are enough."""

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning_feat.compare.effects import Question, enough_seeds
from lightning_feat.compare.records import (
    Record,
    complete_or_absent,
    read_json,
    read_run,
    read_runs,
    run_path,
    split_metric,
    trial_path,
    write_json,
)
from lightning_feat.compare.reporting import check_metrics
from lightning_feat.compare.running.executors import wait_for_one
from lightning_feat.compare.running.task import Arm, Task

Only: TypeAlias = Literal["", "build", "trial"]


class StudyError(RuntimeError):
    """Going on would be a waste: an arm cannot be built, or a metric is not logged."""


@dataclass
class Plan:
    """The arguments of ``compare``, checked."""

    arms: dict[str, Arm]
    seeds: list[int]
    metrics: list[str]
    base: str
    level: float
    until_told: float | None
    share_order: bool
    test: bool
    bounds: dict[str, tuple[float, float] | None]
    joint: bool = True
    trial: bool = True

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds={self.seeds}: give at least one, none of them twice or negative.")
        if not self.metrics:
            raise ValueError("metrics=[]: give at least one.")
        if self.base not in self.arms:
            raise ValueError(f"base={self.base!r}: there is no arm of that name; they are {', '.join(self.arms)}.")
        if not 0.5 <= self.level < 1:
            raise ValueError(f"level={self.level}: give a number below 1, such as 0.95.")
        if self.until_told is not None and not 0 < self.until_told < math.inf:
            raise ValueError(f"until_told={self.until_told}: give a width above zero.")
        for metric, ends in self.bounds.items():
            if ends is not None and not ends[0] < ends[1]:
                raise ValueError(f"bounds of {metric!r} are {ends}: give the lowest and the highest value.")

    @property
    def question(self) -> Question:
        """What is asked of the runs."""
        return Question(
            self.base, tuple(self.metrics), self.level, self.until_told is not None, self.bounds, self.joint
        )


class Work:
    """Submits run after run, in the order of the seeds, until all are there or enough is told."""

    def __init__(self, root: Path, plan: Plan, study: dict[str, Any], executor: Any, jobs: int, own: str) -> None:
        self.root, self.plan, self.study, self.executor, self.own = root, plan, study, executor, own
        found = [record for record in read_runs(root) if record.arm in plan.arms]
        if any(record.finished for record in found):
            _check_logged(found, plan.metrics)
        self.wanted = [(name, seed) for seed in plan.seeds for name in plan.arms]
        # What failed before is tried again, and until then it did not come to an end.
        self.records = {(record.arm, record.seed): record for record in found if record.finished}
        self.missing = [key for key in self.wanted if key not in self.records]
        self.pending: dict[Any, tuple[str, int, Only]] = {}
        self.together = {"processes": jobs, "inline": 1}.get(own, len(plan.arms) if plan.until_told else 10**9)
        self.begin = time.monotonic()

    def do(self, quiet: bool) -> list[int]:
        """All of it. Gives the seeds that count."""
        if not quiet:
            there = len(self.wanted) - len(self.missing)
            print(f"{len(self.wanted)} runs, {there} of them are there already; folder {self.root}", flush=True)
        try:
            self._try_one_batch()
            self._build_those_that_wait()
            while (told := self._told()) is None and (self.missing or self.pending):
                while self.missing and len(self.pending) < self.together:
                    self._submit(*self.missing.pop(0))
                for job in wait_for_one(list(self.pending)):
                    self._take(job, quiet)
        finally:
            for job in self.pending:
                job.cancel()
        return self.plan.seeds if told is None else self.plan.seeds[:told]

    def _try_one_batch(self) -> None:
        """To hear of a metric that is not logged before the first run is over. Other runs begin meanwhile."""
        unheard = not any(record.finished for record in self.records.values())
        if (
            self.plan.trial and self.missing and unheard and self.own != "slurm"
        ):  # there it would wait in the queue, too
            self._submit(self.plan.base, self.plan.seeds[0], "trial")

    def _build_those_that_wait(self) -> None:
        """To hear of a mistake in their arms before the first runs are over, which may take hours."""
        if self.own == "processes":
            for name, seed in self.missing[self.together : len(self.plan.arms)]:
                self._submit(name, seed, "build")

    def _submit(self, name: str, seed: int, only: Only = "") -> None:
        task = Task(
            self.plan.arms[name],
            seed,
            str(self.root.resolve()),
            self.study["arms"][name]["digest"],
            None if self.own == "inline" else self.study["threads"],
            self.plan.share_order,
            self.plan.test,
            only,
            alone=self.own != "inline",
        )
        self.pending[self.executor.submit(_perform, task)] = (name, seed, only)

    def _take(self, job: Any, quiet: bool) -> None:
        name, seed, only = self.pending.pop(job)
        if only == "trial":
            self._hear(name)
            return
        record = read_run(run_path(self.root, name, seed))
        if only == "build":
            if record is not None:
                _stop_for_mistakes(record, self.plan)
            return
        if record is None or (job.exception() is not None and not record.finished):
            record = _lost(self.root, name, seed, self.study, job)
        self.records[name, seed] = record
        if not quiet:
            place = f"[{len(self.records)}/{len(self.wanted)}]"
            print(place, _line(record, self.plan, time.monotonic() - self.begin), flush=True)
        _stop_for_mistakes(record, self.plan)

    def _hear(self, name: str) -> None:
        """Refuse metrics that no run will log. A trial that failed says nothing: the run itself may not, or tells."""
        path = trial_path(self.root, name)
        heard = read_json(path) if path.is_file() else {}
        if heard.get("digest") == self.study["arms"][name]["digest"]:
            for metric in self.plan.metrics:
                _judge(split_metric(metric)[0], heard["logged"], heard["may_log_later"], self.plan.test)

    def _told(self) -> int | None:
        plan = self.plan
        if plan.until_told is None:
            return None
        return enough_seeds(list(self.records.values()), plan.arms.keys(), plan.question, plan.seeds, plan.until_told)


def _perform(task: Task) -> str:
    from lightning_feat.compare.running.run import perform  # imports Lightning, which who waits does not need

    return perform(task)


def _lost(root: Path, name: str, seed: int, study: dict[str, Any], job: Any) -> Record:
    """A run whose process ended before it could say why."""
    error = job.exception()
    status = {"arm": name, "seed": seed, "status": "failed", "stage": "lost", "digest": study["arms"][name]["digest"]}
    status["error"] = " ".join(str(error).split()) if error else "its process ended and left no result"
    folder = run_path(root, name, seed)
    with complete_or_absent(folder) as partial:
        write_json(partial / "status.json", status)
    return Record(name, seed, {}, status, folder)


def _line(record: Record, plan: Plan, seconds: float) -> str:
    who = f"{record.arm}, seed {record.seed}"
    if not record.finished:
        return f"{who}: FAILED: {record.status['error']} ({record.folder}/log.txt)"
    values = ", ".join(f"{metric} {record.value(metric):.5g}" for metric in plan.metrics)
    return f"{who}: {values} ({record.status['fit_s']:.0f} s; {seconds:.0f} s in all)"


def _stop_for_mistakes(record: Record, plan: Plan) -> None:
    if record.finished:
        _check_logged([record], plan.metrics)
    elif record.status["stage"] == "build" and record.seed == plan.seeds[0]:
        raise StudyError(f"arm {record.arm!r} cannot be built: {record.status['error']}")


def _judge(metric: str, logged: Sequence[str], may_log_later: bool, test: bool) -> None:
    """Refuse a metric that one batch of the base did not log, where none can come later or it looks like one of those
    that came; else warn.
    """
    if metric in logged:
        return
    space, _, last = metric.rpartition("/")
    beside = [name.rpartition("/")[2] for name in logged if name.rpartition("/")[0] == space]
    alike = get_close_matches(metric, logged, cutoff=0.8) or (space and get_close_matches(last, beside, cutoff=0.5))
    near = ", ".join(get_close_matches(metric, logged, n=3, cutoff=0.4) or logged[:8]) or "nothing was logged"
    said = f"one batch of training and validation logged no {metric!r}; nearest: {near}."
    if metric.startswith("test/") and not test:
        said += " What is logged in a test needs test=True (--test)."
    if not may_log_later or alike:
        raise StudyError(f"{said} If it is logged later in a run, give trial=False (--no-trial).")
    warnings.warn(f"{said} The first run will tell whether it is logged later.", stacklevel=2)


def _check_logged(records: list[Record], metrics: Sequence[str]) -> None:
    try:
        check_metrics(records, metrics)
    except ValueError as error:
        raise StudyError(str(error)) from None
