"""``compare``: a study from its arms to its answer, in a folder of its own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_feat.compare.records import clear_partial, read_json, write_json
from lightning_feat.compare.reporting import Comparison, report
from lightning_feat.compare.running.arms import as_arms
from lightning_feat.compare.running.executors import (
    InThisProcess,
    LocalProcesses,
    cores,
    in_child,
    submitit_executor,
    visible_gpus,
)
from lightning_feat.compare.running.start import Start
from lightning_feat.compare.running.task import Arm
from lightning_feat.compare.running.work import Plan, Work

EXECUTORS = ("processes", "inline", "slurm")
MOST_JOBS = 8  # by default: more processes than that seldom fit into the memory of a workstation


def compare(
    arms: Mapping[str, Callable[..., Any] | Arm],
    seeds: int | Sequence[int] = 5,
    metrics: str | Sequence[str] = "val/accuracy",
    *,
    base: str | None = None,
    folder: str | Path = "comparison",
    level: float = 0.95,
    until_told: float | None = None,
    jobs: int | None = None,
    threads: int | None = None,
    executor: str | Any = "processes",
    slurm: Mapping[str, Any] | None = None,
    share_order: bool = True,
    test: bool = False,
    bounds: Mapping[str, tuple[float, float] | None] | None = None,
    joint: bool = True,
    start: Callable[[int], Any] | None = None,
    trial: bool = True,
    titles: Mapping[str, str] | None = None,
    quiet: bool = False,
    answer: bool = True,
) -> Comparison:
    """Train each arm with each seed, and tell by how much they differ from the base.

    All runs of one seed start from the same global seed and see the training data in the same order; the result says
    what they could not share. Each run is a folder, complete or not there: the same call goes on with what is missing,
    and tries again what failed.

    Args:
        arms: functions that make ``(trainer, module, data)``, by name; see ``arms.FunctionArm`` and ``YamlArm``.
        seeds: how many (0, 1, ...), or which ones. With ``until_told`` the most there will be.
        metrics: names of logged metrics. The last value of a run counts; ``val/loss:min`` or ``:max`` say otherwise.
        base: which arm the others are compared with; the first by default.
        folder: for all runs, ``table.md``, ``cost.md``, ``runs.csv`` and ``comparison.png``; with several metrics
            ``overview.md``, too.
        level: at which the intervals of all arms hold together.
        until_told: add no more seeds once the interval of each arm in the first metric excludes zero or is narrower
            than this, in points for a share. The intervals are then those of ``statistics.sequence_interval``.
        jobs: runs at a time; by default one for each GPU, or as many as there are cores, at most 8.
        threads: of each run; cores over jobs by default. A study that goes on keeps those it began with.
        executor: ``"processes"`` of this machine, ``"inline"`` for one after another in this process, ``"slurm"``, or
            any object with ``submit`` of the ``concurrent.futures`` kind.
        slurm: options of ``submitit``, such as ``{"timeout_min": 60, "slurm_partition": "gpu"}``.
        share_order: whether batches follow the seed alone, so that a random number more in an arm changes no batch.
            Without it a run is, bit for bit, that of ``lightning-feat fit --seed_everything``.
        test: whether to test after each fit, with the last weights.
        bounds: lowest and highest value of metrics, ``(0, 1)`` for a share, ``None`` for none; shares such as
            accuracies are known by name.
        joint: whether the intervals of all arms hold together at ``level``, or each on its own.
        start: a function of the seed that makes what its arms begin with, such as the weights of a pre-training: once
            for each seed. Functions of arms get it if they name ``start``. Tensors, state dicts and numbers.
        trial: whether to try one batch of the base first, to hear at once of a metric that is not logged.
        titles: of arms and metrics, by their names, for ``overview.md`` and its figure.
        quiet: whether to print nothing.
        answer: whether to print what comes out, and not only which run is done.

    Raises:
        ValueError: for an argument that cannot be.
        StudyError: if an arm cannot be built with its first seed, or a metric is not logged: nothing is lost, and the
            same call goes on after a correction.
        RuntimeError: if another process works on ``folder``.
    """
    if in_child():
        raise RuntimeError(
            'put the call of compare under `if __name__ == "__main__":`, as its processes read the file.'
        )
    plan = Plan(
        as_arms(arms, executor != "inline", Start(start, str(Path(folder).resolve() / "starts")) if start else None),
        list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds],
        [metrics] if isinstance(metrics, str) else list(metrics),
        base if base is not None else next(iter(arms)),
        level,
        until_told,
        share_order,
        test,
        dict(bounds or {}),
        joint,
        trial,
    )
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    with _alone_in(root):
        own = executor if isinstance(executor, str) else "given"
        total = len(plan.arms) * len(plan.seeds)
        jobs, threads = _shares(root, jobs, threads, own, total)
        study = _study_of(root, plan, threads)
        if own in ("processes", "inline"):
            clear_partial(root)
        made = _executor(executor, root, jobs, threads, slurm)
        try:
            study["used"] = Work(root, plan, study, made, jobs, own).do(quiet)
        finally:
            if own in ("processes", "inline"):
                made.shutdown(True, cancel_futures=True)
                clear_partial(root)
        write_json(root / "study.json", study | {"titles": dict(titles or {})})
        comparison = report(root)
    if answer and not quiet:
        print(comparison)
        print(f"Files: {root}/table.md, cost.md, runs.csv, comparison.png, comparison.pdf")
    return comparison


def _study_of(root: Path, plan: Plan, threads: int) -> dict[str, Any]:
    """What ``study.json`` says, with what is new. An arm that is there must be the one it was."""
    about = {name: {"digest": arm.digest()} for name, arm in plan.arms.items()}
    path = root / "study.json"
    old = read_json(path) if path.is_file() else {"arms": {}, "looks": [], "until_told": None}
    for name, now in about.items():
        before = old["arms"].get(name, now)
        if before["digest"] != now["digest"]:
            raise ValueError(
                f"arm {name!r} is another one than that of the runs in {root}: give another folder or another name, "
                f"or remove {root / 'runs' / name}."
            )
    for key in ("share_order", "test"):
        if key in old and old[key] != getattr(plan, key):
            raise ValueError(f"{key}={getattr(plan, key)}, but the runs in {root} had {old[key]}: give another folder.")
    study = {
        "arms": {**old["arms"], **about},
        "base": plan.base,
        "metrics": plan.metrics,
        "seeds": plan.seeds,
        "level": plan.level,
        "joint": plan.joint,
        "until_told": plan.until_told if plan.until_told is not None else old["until_told"],
        "share_order": plan.share_order,
        "test": plan.test,
        "bounds": plan.bounds,
        "threads": threads,
        "looks": old["looks"],
    }
    write_json(path, study)
    return study


def _shares(root: Path, jobs: int | None, threads: int | None, own: str, runs: int) -> tuple[int, int]:
    """Runs at a time, and threads of each: those the study began with, as sums depend on them."""
    for name, value in (("jobs", jobs), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: give at least 1.")
    if own == "inline":
        return 1, threads or cores()
    at_most = len(visible_gpus()) or min(cores(), MOST_JOBS)
    jobs = jobs or max(1, min(at_most, runs))
    path = root / "study.json"
    before = read_json(path)["threads"] if path.is_file() else None
    return jobs, threads or before or max(1, cores() // jobs)


def _executor(executor: Any, root: Path, jobs: int, threads: int, slurm: Mapping[str, Any] | None) -> Any:
    if not isinstance(executor, str):
        if not hasattr(executor, "submit"):
            raise ValueError(f"executor is {type(executor).__name__}: give an object with submit, or {EXECUTORS}.")
        return executor
    if executor not in EXECUTORS:
        raise ValueError(f"executor={executor!r}: choose from {', '.join(EXECUTORS)}.")
    if executor == "processes":
        return LocalProcesses(jobs, threads, visible_gpus())
    return InThisProcess() if executor == "inline" else submitit_executor(root / "slurm", slurm or {})


@contextmanager
def _alone_in(root: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout  # torch needs it, too

    lock = FileLock(root / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RuntimeError(f"another process works on {root}: wait for it, or give another folder.") from None
    try:
        yield
    finally:
        lock.release()
