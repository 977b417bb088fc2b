"""What bounds each method: memory traffic, arithmetic, the launch of operators, or a factorisation, told by profiles.

    python benchmarks/bounds.py [--quick]

Every operator that reaches the device is counted, with the bytes of the tensors that it reads and writes and the
operations of matrix products, and each sum is priced by what this machine does at best, measured beside: copying
64 MiB, a matrix product of 1024 x 1024, an operator on one number. The price over the time it takes is an upper bound
of that share; bytes that stay in the caches cost less. Factorisations (``linalg_*``) and sorting have no such price: of
these the time is told as it is. What bounds a method is the largest of the shares; where none has a third, much of
the time is Python's or that of operators slower than a copy.
"""

from typing import NamedTuple

import torch
from counting import Counter, largest
from subjects import SUBJECTS, Subject
from turns import Effort, effort_asked, pick, spread_of, table, timed

_FACTORISATIONS = ("linalg_", "_linalg_", "sort", "topk", "cholesky", "triangular_solve", "qr", "ormqr", "geqrf")
_PROFILED = 0.2  # seconds of steps, twenty at most


class Prices(NamedTuple):
    """Seconds on this machine: of a byte, of a floating-point operation in two precisions, and of an operator."""

    byte: float
    operation: float
    double: float
    operator: float


class Bound(NamedTuple):
    """Shares of the time of a call."""

    name: str
    milliseconds: float
    operators: int
    looks: int
    shares: dict[str, float]
    largest: str

    def by(self) -> str:
        best = max(self.shares, key=self.shares.__getitem__)
        return best if self.shares[best] >= 1 / 3 else "none of these alone"


def _is_factorisation(name: str) -> bool:
    return name.startswith(_FACTORISATIONS) and "norm" not in name


def prices_of(device: str, effort: Effort) -> Prices:
    """Medians of measurements on a device."""
    mebibytes, side = pick(effort, (64, 1024), (16, 512), (1, 64))
    big = torch.zeros(mebibytes * 2**18, device=device)
    other = torch.empty_like(big)
    number = torch.zeros(1, device=device)
    single = torch.randn(side, side, device=device)
    double = single.double()
    steps = {
        "byte": timed(lambda: other.copy_(big), device),
        "operation": timed(lambda: single @ single, device),
        "double": timed(lambda: double @ double, device),
        "operator": timed(lambda: number.add_(1.0), device),
    }
    taken = {name: min(step() for _ in range(pick(effort, 7, 3, 1))) for name, step in steps.items()}
    return Prices(
        taken["byte"] / (2 * mebibytes * 2**20),
        taken["operation"] / (2 * side**3),
        taken["double"] / (2 * side**3),
        taken["operator"],
    )


def bound_of(subject: Subject, prices: Prices, device: str, effort: Effort) -> Bound:
    sizes = subject.base if effort == "full" else subject.sizes("width", (pick(effort, 1.0, 0.5, 0.1),))[0]
    step = subject.make(sizes, device)
    step()
    measured = timed(step, device)
    seconds = spread_of([measured() for _ in range(pick(effort, 7, 3, 1))]).middle
    counters = [Counter(device) for _ in range(min(20, max(1, int(_PROFILED / seconds))))]
    for counter in counters:
        with counter:
            step()
    counter = counters[-1]
    times: dict[str, float] = {name: sum(c.seconds[name] for c in counters) for name in counter.seconds}
    whole = sum(times.values())
    factorised = sum(taken for name, taken in times.items() if _is_factorisation(name)) / whole
    operators = sum(counter.calls.values())
    operations = counter.operations[False] * prices.operation + counter.operations[True] * prices.double
    shares = {
        "memory traffic": counter.bytes * prices.byte / seconds,
        "arithmetic": operations / seconds,
        "launching operators": operators * prices.operator / seconds,
        "factorisation or sorting": factorised,
    }
    return Bound(subject.name, 1000 * seconds, operators, counter.looks, shares, largest(times))


def measure(effort: Effort, device: str) -> tuple[Prices, list[Bound]]:
    prices = prices_of(device, effort)
    return prices, [bound_of(subject, prices, device, effort) for subject in SUBJECTS]


def told(prices: Prices, bounds: list[Bound]) -> str:
    """The prices in words, and the table."""
    words = (
        f"At best, here: {1e-9 / prices.byte:.1f} GB/s of copying, {1e-9 / prices.operation:.0f} GFLOP/s in float32 "
        f"and {1e-9 / prices.double:.0f} in float64, {1e6 * prices.operator:.2f} us for an operator on one number.\n\n"
    )
    heads = (
        "method",
        "ms",
        "operators",
        "looks",
        "traffic",
        "arithmetic",
        "launching",
        "factorising",
        "bound by",
        "largest operators",
    )
    cells = (
        (
            b.name,
            f"{b.milliseconds:.3g}",
            b.operators,
            b.looks,
            *(f"{share:.0%}" for share in b.shares.values()),
            b.by(),
            b.largest,
        )
        for b in bounds
    )
    return words + table(heads, cells)


def main() -> None:
    print(told(*measure(effort_asked(__doc__), "cpu")))


if __name__ == "__main__":
    main()
