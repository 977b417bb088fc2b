"""Two processes do together what one does alone."""

import pytest

from tests.callbacks.simplicity_bias import upsampler_ddp_cases as cases
from tests.pairs import run_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    results = run_pair(cases, tmp_path_factory.mktemp("pair"))
    for name, result in results[0].items():
        assert not isinstance(result, str), (name, result)
    return results


@pytest.mark.parametrize("name", ["selected", "selected_at_random"])
def test_two_processes_choose_exactly_what_one_does(pair, name):
    assert pair[0][name] == pair[1][name] == getattr(cases, name)(1)


def test_the_second_start_is_the_run_by_hand_on_both(pair):
    for results in pair:
        by_callback, by_hand = results["upsampled"]
        assert by_callback == by_hand
    assert pair[0]["upsampled"] == pair[1]["upsampled"]


def test_both_weigh_the_same_loss(pair):
    assert pair[0]["weighted"] == pair[1]["weighted"]


def test_what_one_process_finds_wrong_is_said_on_both(pair):
    for results in pair:
        assert "1 of 43 outputs are NaN or inf" in results["diverged"][0]
