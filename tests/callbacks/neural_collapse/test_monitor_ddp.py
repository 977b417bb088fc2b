"""Two processes measure together what one does alone, write once, and stop together."""

import pytest

from tests.callbacks.neural_collapse import monitor_ddp_cases as cases
from tests.pairs import run_pair

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The results of all cases on two processes."""
    return run_pair(cases, tmp_path_factory.mktemp("pair"))


def of(pair, name):
    first, second = (results.get(name, f"{name} was not reached") for results in pair)
    assert not isinstance(first, str), first
    assert first == second
    return first


@pytest.mark.parametrize("name", ["indexed_online", "indexed_exact"])
def test_no_sample_of_an_indexed_data_set_counts_twice(pair, name):
    together, alone = of(pair, name), getattr(cases, name)(1)
    assert set(together) == set(alone)
    for measure, value in alone.items():  # logged in float32
        assert together[measure] == pytest.approx(value, rel=1e-5, abs=1e-6), measure


@pytest.mark.parametrize("name", ["written_online", "written_exact"])
def test_files_are_written_once_and_hold_the_values_of_all_processes(pair, name):
    together, alone = of(pair, name), getattr(cases, name)(1)
    assert together["figures"] == alone["figures"] == [f"neural_collapse-penultimate-epoch={n}.png" for n in (1, 2)]
    assert len(together["rows"]) == len(alone["rows"]) == 2
    for one, other in zip(together["rows"], alone["rows"], strict=True):
        assert one.keys() == other.keys()
        # features in other batches: float32 rounding
        assert float(one["nc1_quotient"]) == pytest.approx(float(other["nc1_quotient"]), rel=1e-5)


def test_both_stop_after_the_same_epoch(pair):
    assert of(pair, "stopped") == 2
