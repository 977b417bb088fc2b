"""Two processes do together what one does alone."""

import pytest

from tests.callbacks.feature_shift import monitor_ddp_cases as cases
from tests.pairs import run_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The results of all cases on two processes."""
    return run_pair(cases, tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("name", ["shift", "l2_sp", "distillation", "monitor", "cached", "towers"])
def test_both_processes_end_alike(pair, name):
    assert not isinstance(pair[0].get(name, "it did not run"), str), pair[0].get(name)
    assert pair[0][name] == pair[1][name]


def test_two_processes_do_what_two_do_by_hand(pair):
    assert pair[0]["shift"] == pytest.approx(pair[0]["by_hand"], rel=1e-5, abs=1e-6)  # terms in another order


@pytest.mark.parametrize("name", ["l2_sp", "distillation"])
def test_penalties_that_are_means_equal_one_process(pair, name):
    # float32, 6 steps: the mean of two half batches in place of one mean
    assert pair[0][name] == pytest.approx(getattr(cases, name)(1), rel=1e-4, abs=2e-5)


def test_the_monitor_sums_over_processes(pair):
    alone = cases.monitor(1)
    assert len(alone) == 4
    assert pair[0]["monitor"] == pytest.approx(alone, rel=1e-3, abs=1e-6)  # weights of 6 float32 steps


def test_every_process_holds_the_cached_features_of_all(pair):
    assert pair[0]["cached"] == pytest.approx(cases.cached(1), rel=1e-5, abs=1e-6)  # float32, other batches
