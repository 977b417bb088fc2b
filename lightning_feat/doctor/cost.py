"""What each callback costs, measured in turns with and without it.

One round is two copies of the run, one with the callback and one without, which of them first by turns. Of the
batches of each the median counts, loading left out, and of a round the quotient of the two: what slows the machine
down for longer than a round falls out.
"""

import math
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_feat.doctor.blame import is_ours, name_of
from lightning_feat.doctor.checks.terms import begin_now
from lightning_feat.doctor.finding import Finding
from lightning_feat.doctor.trial import Run, make_trial, without_a_trace
from lightning_feat.joints.module.wraps import add_link

_ROUNDS, _FEWEST_ROUNDS = 7, 5  # by chance all of 5 rounds have one sign in 6 % of cases, all of 7 in 2 %
_FEWEST, _MOST, _WARM = 10, 60, 3  # batches of one copy, and how many of them come first and do not count
_EPOCHS = 10**6
_SHORT, _LONG = 2, 6  # batches of a pass at the end of an epoch, to tell what grows with them


@dataclass
class Stopwatch(Callback):
    """Measures batches, and the end of the epoch for one callback; it comes first among the callbacks.

    Attributes:
        seconds: of each batch, hooks of all callbacks included.
        at_end: seconds of ``on_train_epoch_end`` of ``measured``.
        passed: batches that a pass over all data of ``measured`` would have.
    """

    batches: int
    measured: Callback | None = None
    seconds: list[float] = field(default_factory=list)
    at_end: list[float] = field(default_factory=list)
    num_batches: float = math.inf
    passed: float = 0.0
    _start: float = 0.0

    __hash__ = object.__hash__

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        begin_now(pl_module)
        add_link(pl_module, "on_train_batch_end", "doctor", self._around_batch_end)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if math.isinf(self.num_batches):
            self.num_batches = trainer.num_training_batches
        # As many epochs as it takes; a schedule was made for fewer.
        trainer.fit_loop.max_epochs, trainer.strategy.lr_scheduler_configs = _EPOCHS, []
        if self.measured is not None:
            self.passed = _passed_by(self.measured, trainer)
            self.measured.on_train_epoch_end = _Timed(self, self.measured.on_train_epoch_end)  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = now(pl_module.device)

    def _around_batch_end(self, module: LightningModule, call: Any, *args: Any, **kwargs: Any) -> Any:
        self.seconds.append(now(module.device) - self._start)  # the hooks of all callbacks have run
        if len(self.seconds) >= self.batches:
            module.trainer.should_stop = True
        return call(*args, **kwargs)


class _Timed:
    def __init__(self, watch: Stopwatch, hook: Any) -> None:
        self.watch, self.hook = watch, hook

    def __call__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        start = now(pl_module.device)
        self.hook(trainer, pl_module)
        self.watch.at_end.append(now(pl_module.device) - start)


def now(device: torch.device) -> float:
    """The time when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def measure_costs(
    run: Run, order: list[int], seconds: float, needs: dict[type[Callback], type[Callback]]
) -> list[Finding]:
    """Notes on the cost of each callback of this library, in about so many seconds.

    Args:
        run: to copy.
        order: positions of the callbacks that a copy has, in their order.
        seconds: for all.
        needs: which classes of callbacks need another beside them, which is then part of both sides.
    """
    ours = [i for i in order if is_ours(run.callbacks[i])]
    return [_measured(run, order, ours, i, seconds / len(ours), needs) for i in ours]


def _measured(
    run: Run,
    order: list[int],
    ours: list[int],
    position: int,
    seconds: float,
    needs: dict[type[Callback], type[Callback]],
) -> Finding:
    callback = run.callbacks[position]
    needed = tuple(head for kind, head in needs.items() if isinstance(callback, kind))
    without = [i for i in order if i not in ours or isinstance(run.callbacks[i], needed)]
    with_it = [i for i in order if i in without or i == position]
    quotients: list[float] = []
    at_end: dict[int, list[float]] = {_SHORT: [], _LONG: []}
    began, where = time.perf_counter(), name_of(callback)
    try:
        first = _timed(run, with_it, _FEWEST, _SHORT, position)
        per_batch = median(first.seconds[_WARM:])
        beside = time.perf_counter() - began - sum(first.seconds)
        batches = int(((seconds / (2 * _ROUNDS + 1)) - beside) / max(per_batch, 1e-6))
        batches = min(max(batches, _FEWEST), _MOST)
        bare = per_batch
        for turn in range(_ROUNDS):
            if turn >= _FEWEST_ROUNDS and time.perf_counter() - began > seconds:
                break
            if turn and time.perf_counter() - began > 3 * seconds:
                return _note(
                    where,
                    f"not measured: a round takes {(time.perf_counter() - began) / turn:.0f} s; give more seconds.",
                )
            look = (_SHORT, _LONG)[turn % 2]
            sides = {}
            for side in (True, False) if turn % 2 else (False, True):
                sides[side] = _timed(run, with_it if side else without, batches, look, position if side else None)
            bare = median(sides[False].seconds[_WARM:])
            quotients.append(median(sides[True].seconds[_WARM:]) / bare - 1)
            at_end[look] += sides[True].at_end[:1]
    except Exception as error:  # what is wrong was said by the rehearsal
        return _note(where, f"not measured: {type(error).__name__}: {' '.join(str(error).split())}")
    low, high = min(quotients), max(quotients)
    amount = f"{_percent(median(quotients))} of a training batch" if low > 0 else "not distinguishable from zero"
    said = (
        f"{amount} ({100 * low:+.1f} to {100 * high:+.1f} % in {len(quotients)} rounds of {batches - _WARM} batches, "
        f"which take {1000 * bare:.3g} ms each without it and without loading)"
    )
    return _note(where, said + _end_of_epoch(at_end, first, bare) + ".")


def _end_of_epoch(at_end: dict[int, list[float]], first: Stopwatch, bare: float) -> str:
    if not (at_end[_SHORT] and at_end[_LONG]) or not math.isfinite(first.num_batches):
        return ""
    short, long = median(at_end[_SHORT]), median(at_end[_LONG])
    grows = min(at_end[_LONG]) > max(at_end[_SHORT])  # else a difference is chance, and so many batches of it a lot
    each = (long - short) / (_LONG - _SHORT) if grows else 0.0
    whole = short + each * max(0.0, first.passed - _SHORT)
    share = whole / (bare * first.num_batches)
    return (
        f"; and about {_percent(share)} of an epoch, at the end of those in which it measures" if share > 0.01 else ""
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share > 0.1 else f"{100 * share:.2g} %"


def _timed(run: Run, order: list[int], batches: int, look: int, position: int | None) -> Stopwatch:
    watch = Stopwatch(batches)
    with without_a_trace(run) as (folder, _):
        trial = make_trial(run, folder, look, order, [watch], [])
        watch.measured = None if position is None else trial.callbacks[position]
        trial.fit()
        watch.measured = None
    if len(watch.seconds) <= _WARM + 2:
        raise ValueError(f"the run has no more than {len(watch.seconds)} batches.")
    return watch


def _passed_by(callback: Callback, trainer: Trainer) -> float:
    """Batches of the data that a callback runs the network over, as far as it says so."""
    loaders = {"train": [trainer.train_dataloader], "val": [trainer.val_dataloaders]}
    which = getattr(callback, "data", None)
    parts = loaders.get(which, []) if isinstance(which, str) else []
    if not parts:
        parts = [*loaders["train"], *loaders["val"]] if which in ("both", None) else loaders["train"]
    return float(sum(sized_len(loader) or 0 for loader in parts if loader is not None))


def _note(where: str, what: str) -> Finding:
    return Finding("note", "cost", where, what)
