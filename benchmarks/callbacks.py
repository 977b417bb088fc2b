"""What each callback costs in a fit: time of a step and of an epoch, memory, and the operators that it adds.

    python benchmarks/callbacks.py [--quick]

- step, epoch: a fit with the callback beside the same fit without, in turns, every other time in reverse order. A step
  is that of Lightning with the hooks of all callbacks, its loading left out; an epoch is all that happens in it, its
  validation and what callbacks do at its end.
- memory: the peak of a fit above what the process had before it, resident set of a fresh process (on a GPU: what torch
  has allocated), with the callback and without.
- operators: those of torch that a fit has more of with the callback, on small data.
"""

import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from counting import LOOKS, Counter, largest
from fits import DIGITS, EPOCHS, RESNET18, Network, Times, fit
from registry import CALLBACKS, Entry
from turns import Effort, Row, Spread, effort_asked, in_turns, ratios, spread_of, table


class Added(NamedTuple):
    """Operators that a callback brings into a fit."""

    name: str
    calls: float  # for each batch
    looks: float  # for each batch, at a value on the device
    microseconds: float  # of a call, mean
    share: float  # of the operators' time without it
    largest: str


def measure(effort: Effort, device: str, seconds: float = 400.0) -> tuple[list[Row], list[Added], list[str]]:
    """Rows, operators on the small network, and what could not be measured. A quick run has rows without memory."""
    rows, added, failed = [], [], []
    began = time.perf_counter()
    for network, until in ((DIGITS, 0.45), (RESNET18, 1.0)) if effort == "full" else ((DIGITS, 1.0),):
        entries = [entry for entry in CALLBACKS if network is DIGITS or entry.task != "clip"]
        entries, wrong = _that_run(entries, network, effort, device)
        failed += wrong
        if network is DIGITS and effort != "quick":
            added = [_added(entry, network, device) for entry in entries]
        memory = {} if effort == "quick" else _memory(entries, network, effort, device)
        left = until * seconds - (time.perf_counter() - began)
        times = _times(entries, network, effort, device, left)
        for entry in entries:
            bare, own = times[entry.name]
            rows.append(
                Row(
                    entry.name,
                    f"{'small CLIP' if entry.task == 'clip' else network.name} without",
                    ratios([t.step for t in own], [t.step for t in bare]),
                    ratios([t.epochs for t in own], [t.epochs for t in bare]),
                    memory.get(entry.name),
                )
            )
    return rows, added, failed


def _times(
    entries: list[Entry], network: Network, effort: Effort, device: str, seconds: float
) -> dict[str, tuple[list[Times], list[Times]]]:
    """Without and with each entry: one pair of fits in a round, the order within a pair alternating."""
    times: dict[str, tuple[list[Times], list[Times]]] = {entry.name: ([], []) for entry in entries}

    def one_round() -> float:
        for entry in entries:
            pair = times[entry.name]
            for with_it in (True, False) if len(pair[0]) % 2 else (False, True):
                pair[with_it].append(
                    fit(network, entry.task, _callbacks(entry, with_it, network, effort), effort, device)
                )
        return 0.0

    in_turns({"": one_round}, seconds, effort)
    return times


def _callbacks(entry: Entry, with_it: bool, network: Network, effort: Effort) -> list[Any]:
    """Of two with one key the later: an entry may put another in the place of one that stands beside."""
    batch_size, batches = network.size(effort)
    examples = batch_size * batches
    callbacks = entry.beside(examples) + (entry.make(examples) if with_it else [])
    return list({callback.state_key: callback for callback in callbacks}.values())


def _that_run(entries: list[Entry], network: Network, effort: Effort, device: str) -> tuple[list[Entry], list[str]]:
    """Those whose fit ends, and a line on each other. What is imported or compiled late is there afterwards."""
    running, failed = [], []
    for entry in entries:
        try:
            for with_it in (False, True):
                fit(network, entry.task, _callbacks(entry, with_it, network, "moment"), "moment", device)
            running.append(entry)
        except Exception as error:
            failed.append(f"{entry.name} on {network.name}: {type(error).__name__}: {' '.join(str(error).split())}")
    for task in dict.fromkeys(entry.task for entry in running):
        first = next(entry for entry in running if entry.task == task)
        fit(network, task, _callbacks(first, False, network, effort), effort, device)
    return running, failed


def _added(entry: Entry, network: Network, device: str) -> Added:
    """An operator of which there are as many without the callback does not count: its time is noise."""
    bare, own = (_counted(entry, with_it, network, device) for with_it in (False, True))
    batches = EPOCHS * network.size("quick")[1]
    more = {name: calls - bare.calls[name] for name, calls in own.calls.items() if calls > bare.calls[name]}
    seconds = {name: calls * own.seconds[name] / own.calls[name] for name, calls in more.items()}
    whole, calls = sum(seconds.values()), sum(more.values())
    looks = sum(more.get(name, 0) for name in LOOKS)
    return Added(
        entry.name,
        calls / batches,
        looks / batches,
        1e6 * whole / max(calls, 1),
        whole / sum(bare.seconds.values()),
        largest(seconds),
    )


def _counted(entry: Entry, with_it: bool, network: Network, device: str) -> Counter:
    counter = Counter(device)
    fit(network, entry.task, _callbacks(entry, with_it, network, "quick"), "quick", device, counter)
    return counter


def _memory(entries: list[Entry], network: Network, effort: Effort, device: str) -> dict[str, Spread]:
    """Peak with over peak without, means over two processes each for the small network; those without are shared."""
    context: Any = multiprocessing.get_context("forkserver")  # it imports once, and each process starts from there
    context.set_forkserver_preload(["callbacks"])
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
    bare: dict[tuple[Any, ...], float] = {}

    def peak(entry: Entry, with_it: bool) -> float:
        peaks = []
        for _ in range(2 if effort == "full" and network is DIGITS else 1):
            receiver, sender = context.Pipe(duplex=False)
            position = CALLBACKS.index(entry)
            process = context.Process(target=_peak, args=(sender, position, network, effort, device, with_it))
            process.start()
            sender.close()
            peaks.append(receiver.recv())
            process.join()
        return sum(peaks) / len(peaks)

    found = {}
    for entry in entries:
        key = (entry.task, *(type(callback).__name__ for callback in entry.beside(0)))
        if key not in bare:
            bare[key] = peak(entry, False)
        found[entry.name] = spread_of([peak(entry, True) / bare[key]])
    return found


def _peak(sender: Any, position: int, network: Network, effort: Effort, device: str, with_it: bool) -> None:
    """Bytes above what the process had before; runs in a process of its own."""
    entry = CALLBACKS[position]
    torch.ones(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fit(network, entry.task, _callbacks(entry, with_it, network, effort), effort, device)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    unit = 1 if sys.platform == "darwin" else 2**10
    sender.send(torch.cuda.max_memory_allocated() if device == "cuda" else max(grown, 1) * unit)


def told(added: list[Added]) -> str:
    """The table of operators."""
    heads = ("callback", "operators a batch", "looks a batch", "us each", "share of the run's", "of that")
    cells = (
        (a.name, f"{a.calls:.0f}", f"{a.looks:.1f}", f"{a.microseconds:.1f}", f"{a.share:.1%}", a.largest)
        for a in added
    )
    return table(heads, cells)


def main() -> None:
    effort = effort_asked(__doc__)
    rows, added, failed = measure(effort, "cpu")
    heads = ("callback", "beside", "step", "epoch", "memory")
    print(table(heads, ((row.what, row.beside, row.time, row.epoch, row.memory) for row in rows)))
    print("\nOperators of torch that a fit has more of, on the small network:\n")
    print(told(added))
    print("".join(f"\nnot measured: {line}" for line in failed))


if __name__ == "__main__":
    main()
