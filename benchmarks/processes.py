"""How what callbacks do together grows with the number of processes.

    python benchmarks/processes.py [--quick]

Processes of one thread each under gloo, every one with a share of its own, so that the whole grows with them. Where
there are more of them than cores, they also wait for those: ``sums of a batch``, in which nothing is sent, shows how
long.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from subjects import Sizes, collapse_update, features_of
from turns import Effort, effort_asked, pick, spread_of, table

from lightning_feat.joints.data.processes import gather_samples
from lightning_feat.metrics import NeuralCollapse

COUNTS = (2, 3, 4)  # with one nothing is sent
CALLS = 10  # in one time


def sums_of_all(sizes: Sizes) -> Callable[[], object]:
    metric = NeuralCollapse(sizes.classes, sizes.width, second_moment=False)
    metric.update(*features_of(sizes, "cpu"))

    def step() -> None:
        metric.sync()
        metric.unsync()

    return step


def samples_of_all(sizes: Sizes) -> Callable[[], object]:
    features, targets = features_of(sizes, "cpu")
    index = torch.arange(sizes.samples)
    return lambda: gather_samples(features, targets, index)


WAYS: dict[str, tuple[Callable[[Sizes], Callable[[], object]], Sizes]] = {
    "neural collapse, sums of a batch": (lambda sizes: collapse_update(sizes, "cpu"), Sizes(100, 512, 512)),
    "neural collapse, sums of all processes": (sums_of_all, Sizes(100, 512, 512)),
    "linear probe, samples of all processes": (samples_of_all, Sizes(10, 128, 1000)),
}

TOGETHER = {  # what is done together, and the method that it is part of
    "neural collapse, sums of all processes": "neural collapse, sums of a batch",
    "linear probe, samples of all processes": "linear probe, one penalty",
}


def measure(effort: Effort) -> dict[str, list[list[float]]]:
    """Seconds of a call in each round, by number of processes."""
    taken: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    for _ in range(pick(effort, 5, 1, 1)):
        found = [_together(count) for count in pick(effort, COUNTS, COUNTS[:2], COUNTS[:2])]
        for name in WAYS:
            taken[name].append([times[name] for times in found])
    return taken


def _together(count: int) -> dict[str, float]:
    """Seconds of a call on the first of ``count`` processes."""
    context: Any = multiprocessing.get_context("forkserver")
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
    context.set_forkserver_preload(["callbacks", "processes"])
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = context.Pipe(duplex=False)
        workers = [context.Process(target=_work, args=(sender, folder, rank, count)) for rank in range(count)]
        for worker in workers:
            worker.start()
        sender.close()
        try:
            times: dict[str, float] = receiver.recv()
        finally:
            for worker in workers:
                worker.join()
    return times


def _work(sender: Any, folder: str, rank: int, count: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    times = {}
    for name, (make, sizes) in WAYS.items():
        step = make(sizes)
        step()
        torch.distributed.barrier()
        began = time.perf_counter()
        for _ in range(CALLS):
            step()
        torch.distributed.barrier()  # all are done
        times[name] = (time.perf_counter() - began) / CALLS
    if rank == 0:
        sender.send(times)
    torch.distributed.destroy_process_group()


def main() -> None:
    effort = effort_asked(__doc__)
    taken = measure(effort)
    counts = pick(effort, COUNTS, COUNTS[:2], COUNTS[:2])
    cells = (
        (name, *(f"{1000 * spread_of(column).middle:.3g}" for column in zip(*rounds, strict=True)))
        for name, rounds in taken.items()
    )
    print(f"{os.cpu_count()} cores; milliseconds\n")
    print(table(("what", *(f"{count} processes" for count in counts)), cells))


if __name__ == "__main__":
    main()
