"""One cell: run both sides, compare, and say what was found."""

import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_feat.callbacks import MetricHistory
from tests.conformance import courses
from tests.conformance.conditions import Condition
from tests.conformance.registry import Entry, company
from tests.conformance.sides import Run, Side, patches, state


@dataclass(frozen=True)
class Outcome:
    """What a cell of the table says. ``detail``: the tolerance, the message or the reason."""

    word: str
    detail: str = ""


def outcome(entry: Entry, condition: Condition, folder: Path, by_mixin: bool = False) -> Outcome:
    """Raises where the cell is neither equal, nor refused as the entry says it is. ``by_mixin``: the module brings the
    callbacks, and not the Trainer.
    """
    reason = entry.lacks.get(condition.name) or condition.lacks(entry)
    if reason:
        return Outcome("not applicable", reason)
    if condition.with_others:
        entry = company(entry)
        key = condition.name, entry.name, by_mixin
        if key not in _COMPANIES:
            try:
                _COMPANIES[key] = _outcome(entry, condition, folder, by_mixin)
            except Exception as error:
                _COMPANIES[key] = error
        if isinstance(found := _COMPANIES[key], Exception):
            raise found
        return found
    return _outcome(entry, condition, folder, by_mixin)


def _outcome(entry: Entry, condition: Condition, folder: Path, by_mixin: bool) -> Outcome:
    ours = condition.side(entry, folder, ours=True, by_mixin=by_mixin)
    if condition.name in entry.refuses:
        return refused(ours, condition, entry.refuses[condition.name])
    found = condition.course(ours)
    theirs = reference(entry, condition)
    tolerance = max([condition.rounding, *(method.tolerance for method in entry.methods())])
    compare(entry, found, theirs, tolerance)
    compare_values(entry, found, theirs)
    for run in ours.made:
        assert not patches(run.module), f"left behind on the module: {patches(run.module)}"
    return Outcome("equal", f"{tolerance:g}" if tolerance else "")


_COMPANIES: dict[tuple[str, str, bool], Outcome | Exception] = {}  # run once for all their members


def refused(side: Side, condition: Condition, message: str) -> Outcome:
    """The course must end in an error of that text, before a second batch, and leave the module as it was."""
    said = ""
    try:
        condition.course(side)
    except (ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
    assert re.search(message, said), f"should be refused by {message!r}, but: {said or 'no error'}"
    last = side.made[-1]
    assert last.trainer.fit_loop.total_batch_idx <= 0, "refused, but not in the first batch"
    assert not patches(last.module), f"left behind on the module: {patches(last.module)}"
    return Outcome("refused", said)


_BARE: dict[tuple[str, str], Run] = {}  # by condition and task


def reference(entry: Entry, condition: Condition) -> Run:
    """The written side. Callbacks that change nothing share that of the bare module."""
    bare = not any(member.written for member in entry.family()) and condition.course is not courses.fails_inside
    key = condition.name, entry.task
    if not bare:
        return _reference(entry, condition)
    if key not in _BARE:
        _BARE[key] = _reference(entry, condition)
    return _BARE[key]


def _reference(entry: Entry, condition: Condition) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        return condition.course(condition.side(entry, Path(folder), ours=False))


def compare(entry: Entry, ours: Run, theirs: Run, tolerance: float) -> None:
    """Weights and buffers of the network, own parameters, and what the course gives beside; to ``tolerance``."""
    found, expected = (state(run.module) if run.here else {} for run in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        _same(found[name], value, tolerance, name)
    if ours.callbacks and ours.here:  # none where a checkpoint has gone on without them
        own = [p for member, callback in zip(entry.family(), ours.callbacks, strict=True) for p in member.own(callback)]
        for p, q in zip(own, [p for m in theirs.module.methods for p in m.own(theirs.module)], strict=True):
            _same(p, q, tolerance, "own parameters")
    assert ours.more.keys() == theirs.more.keys()
    for name, value in theirs.more.items():
        _same(ours.more[name], value, tolerance, name)
    for name, value in theirs.trainer.callback_metrics.items():
        _same(ours.trainer.callback_metrics[name], value, tolerance, name)
    assert ours.trainer.global_step == theirs.trainer.global_step
    assert ours.trainer.current_epoch == theirs.trainer.current_epoch


def _same(found: Any, expected: Any, tolerance: float, name: str) -> None:
    if isinstance(expected, (list, tuple)):
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            _same(one, other, tolerance, f"{name}[{i}]")
    elif isinstance(expected, dict):
        for key, value in expected.items():
            _same(found[key], value, tolerance, f"{name}[{key}]")
    else:
        one, other = torch.as_tensor(found), torch.as_tensor(expected)
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text: f"{name}: {text}"
        )


def compare_values(entry: Entry, ours: Run, theirs: Run) -> None:
    """What callbacks have logged is there, finite, and the value of the written side."""
    if not ours.callbacks or not ours.here:
        return
    logged = ours.trainer.callback_metrics
    shown = theirs.trainer.callback_metrics
    for callback in [callback for callback in ours.callbacks if isinstance(callback, MetricHistory)]:
        for name, value in shown.items():
            kept = callback.points[name][-1][1]
            assert math.isclose(kept, float(value), rel_tol=1e-3), f"{type(callback).__name__} kept {kept} as {name}"
    for name, expected in [pair for member in entry.family() for pair in member.values(theirs.module).items()]:
        found = float(logged[name])
        assert math.isfinite(found), f"{name} is {found}"
        # Logged in float32; under half precision features of the two sides are the same, their order is not.
        assert math.isclose(found, expected, rel_tol=1e-3, abs_tol=1e-4), f"{name}: {found}, not {expected}"
