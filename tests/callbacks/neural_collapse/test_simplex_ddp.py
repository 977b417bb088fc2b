"""Two processes do together what one does alone."""

import pytest

from tests.callbacks.neural_collapse import simplex_ddp_cases as cases
from tests.pairs import run_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The results of both cases on two processes."""
    return run_pair(cases, tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("name", ["dot_regression", "collapse"])
def test_both_processes_end_bit_for_bit_alike(pair, name):
    assert not isinstance(pair[0][name], str), pair[0][name]
    assert pair[0][name] == pair[1][name]


def test_dot_regression_equals_one_process(pair):
    # float32, 6 steps: mean of two half batches instead of one mean
    assert pair[0]["dot_regression"] == pytest.approx(cases.dot_regression(1), rel=1e-4, abs=2e-5)


def test_pull_and_push_are_the_mean_over_the_batches_of_the_processes(pair):
    assert pair[0]["collapse"] == pytest.approx(cases.halves(), rel=1e-4, abs=2e-5)
    # Not one process with the whole batch: classes are averaged within each process.
    assert pair[0]["collapse"] != pytest.approx(cases.collapse(1), rel=1e-3, abs=1e-4)
