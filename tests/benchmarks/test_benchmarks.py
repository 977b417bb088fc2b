"""Every benchmark runs, for a moment; how it counts and compares is checked by hand. Nothing is asserted about time."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_feat import callbacks

FOLDER = Path(__file__).parents[2] / "benchmarks"
FILES = sorted(path for path in FOLDER.glob("*.py") if 'if __name__ == "__main__":' in path.read_text())
NOT_ALONE = {"Regularizer", "MetricHistory"}  # what others build on


@pytest.fixture(scope="module")
def benchmarks():
    """Imports a file of the folder by its name; its neighbours are found as when it runs alone."""
    names = {path.stem for path in FOLDER.glob("*.py")} - {"__main__"}
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(hidden)


def test_every_callback_is_measured(benchmarks):
    made = {type(callback).__name__ for entry in benchmarks("registry").CALLBACKS for callback in entry.make(4)}
    public = {name for name in callbacks.__all__ if hasattr(getattr(callbacks, name), "on_fit_start")}
    assert public - made == NOT_ALONE


def test_ratios_do_not_see_a_slow_round(benchmarks):
    turns = benchmarks("turns")
    assert turns.ratios([2.0, 2.0, 20.0], [1.0, 1.0, 10.0]) == (2.0, 2.0, 2.0, 3)
    assert turns.spread_of([5.0, 1.0, 4.0, 2.0, 3.0]) == (2.0, 3.0, 4.0, 5)
    assert str(turns.spread_of([3.0])) == "3.00"  # one value has no middle half


def test_ways_take_turns_in_alternating_order(benchmarks):
    order = []

    def way(name):
        return lambda: order.append(name) or float(len(order))

    taken = benchmarks("turns").in_turns({"a": way("a"), "b": way("b")}, seconds=0.0)
    assert "".join(order) == "abbaab"
    assert taken == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}


def test_slope_is_the_exponent_in_each_round(benchmarks):
    sizes = [10, 20, 40]
    rounds = [[factor * size**exponent for size in sizes] for factor, exponent in ((1.0, 1.0), (7.0, 1.5), (0.1, 2.0))]
    slope = benchmarks("growth").Curve("anything", "classes", sizes, rounds).slope()
    assert slope.middle == pytest.approx(1.5)
    assert slope.low == pytest.approx(1.25)


def test_bytes_and_operations_are_counted(benchmarks):
    counter = benchmarks("counting").Counter()
    square, row = torch.ones(10, 10), torch.ones(10)
    with counter:
        made = square.permute(1, 0) @ square  # a view, and a product that reads twice 100 numbers and writes 100
        made.add_(row.expand(10, 10))  # a view; 10 numbers are read again and again, and 100 are read and written
        made.double().sum().item()
    assert counter.operations == {True: 0.0, False: 2000.0}
    assert counter.looks == 1
    assert counter.calls == {
        "permute": 1,
        "mm": 1,
        "expand": 1,
        "add_": 1,
        "_to_copy": 1,
        "sum": 1,
        "_local_scalar_dense": 1,
    }
    # copy to double: 400 + 800; its sum: 800 + 8; the look: 8
    assert counter.bytes == 1200 + (400 + 40 + 400) + 1200 + 808 + 8


def test_table_has_a_column_for_a_gpu_only_where_one_was_measured(benchmarks):
    benchmarks("turns")
    spec = importlib.util.spec_from_file_location("benchmarks_main", FOLDER / "__main__.py")
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
    turns = benchmarks("turns")
    rows = [turns.Row("this", "that", turns.spread_of([1.5]), bar="<= 2")]
    assert "GPU" not in main.one_table(rows, [])
    assert "1.500 |  |  | <= 2 | yes | 1.250 |" in main.one_table(
        rows, [turns.Row("this", "that", turns.spread_of([1.25]))]
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_benchmark_runs_for_a_moment(path, tmp_path):
    more = ["--out", str(tmp_path)] if path.stem == "__main__" else []
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(path), "--moment", *more],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "|---" in done.stdout.replace(" ", "")
    if more:
        assert (tmp_path / "growth.png").stat().st_size > 0
        assert "Not measured" not in (tmp_path / "performance.md").read_text()
