"""Every callback under every condition: equal to the loop that its author would write, or refused at once.

The conditions of ``FIRST`` belong to the default run; the rest is slow. ``docs/compatibility.md`` shows what comes out.
"""

import pytest
from lightning.pytorch import Callback

from lightning_feat import callbacks
from tests.conformance import table
from tests.conformance.cells import Outcome, outcome
from tests.conformance.conditions import CONDITIONS, FIRST
from tests.conformance.registry import CALLBACKS

BASES = {"MetricHistory", "Regularizer"}  # made to be derived from


def cells(where, only_quick=False):
    for entry in CALLBACKS:
        for condition in CONDITIONS:
            if condition.where == where and (condition.quick or not only_quick):
                marks = [] if condition.name in FIRST else [pytest.mark.slow]
                if not condition.available:
                    marks.append(pytest.mark.skip(reason="not installed"))
                yield pytest.param(entry, condition, marks=marks, id=f"{entry}, {condition}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("entry", "condition"), cells("here"))
def test_cell(entry, condition, tmp_path):
    table.check(entry, condition, outcome(entry, condition, tmp_path))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("entry", "condition"), cells("here", only_quick=True))
def test_cell_of_a_module_that_brings_the_callback(entry, condition, tmp_path):
    table.check_again(entry, condition, outcome(entry, condition, tmp_path, by_mixin=True))


@pytest.mark.parametrize(("entry", "condition"), cells("pair"))
def test_cell_of_two_processes(entry, condition, pair):
    for found in pair:
        word, detail = found.get(f"{entry}, {condition}", ["raised", "the cell was not reached"])
        assert word != "raised", detail
    table.check(entry, condition, Outcome(word, detail))


def test_the_conditions_of_the_default_run_are_there():
    assert {condition.name for condition in CONDITIONS if condition.quick} >= FIRST


def test_every_public_callback_is_here():
    public = {name for name in callbacks.__all__ if isinstance(getattr(callbacks, name), type)}
    public = {name for name in public if issubclass(getattr(callbacks, name), Callback)}
    assert public - BASES == {entry.cls.__name__ for entry in CALLBACKS}


def test_the_table_has_exactly_the_cells_of_the_matrix():
    if not table.WRITING:
        assert table.committed().keys() == {
            (condition.name, entry.name) for condition in CONDITIONS for entry in CALLBACKS
        }
