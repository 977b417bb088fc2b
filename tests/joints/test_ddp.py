"""Two processes do together what one does alone."""

import math

import pytest

from tests.joints import ddp_cases
from tests.pairs import run_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The results of all cases on two processes, as a pair of dictionaries."""
    return run_pair(ddp_cases, tmp_path_factory.mktemp("pair"))


def of(pair, name):
    for results in pair:
        value = results.get(name, f"{name} was not reached")
        assert not isinstance(value, str), value
    return pair[0][name], pair[1][name]


def one_process(name):
    return getattr(ddp_cases, name)(1)


@pytest.mark.parametrize("name", ["term", "term_now_and_then", "grassmann", "grassmann_adaptive"])
def test_both_processes_end_bit_for_bit_alike(pair, name):
    first, second = of(pair, name)
    assert first == second


def test_a_term_equals_the_term_written_by_hand(pair):
    assert of(pair, "term")[0] == pytest.approx(of(pair, "by_hand")[0], rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", ["term", "grassmann_built", "grassmann_adaptive"])
def test_two_processes_equal_one_up_to_rounding(pair, name):
    # float32, 6 steps: mean of two half batches instead of one mean
    assert of(pair, name)[0] == pytest.approx(one_process(name), rel=1e-4, abs=2e-5)


def test_subspaces_are_orthonormal_on_both(pair):
    for results in (*of(pair, "grassmann"), *of(pair, "grassmann_adaptive")):
        assert results[0] < 1e-5


@pytest.mark.parametrize("name", ["collapse_online", "collapse_exact"])
def test_collapse_is_that_of_one_process_and_no_sample_counts_twice(pair, name):
    first, second = of(pair, name)
    alone = one_process(name)  # 43 samples: the sampler repeats one of them for the second process
    assert first == second
    assert set(first) == set(alone)
    for measure, value in alone.items():  # logged in float32
        assert first[measure] == pytest.approx(value, rel=1e-5, abs=1e-6), measure
        assert math.isfinite(value), measure


def test_an_optimizer_that_deals_its_parameters_out_trains_and_resumes_all_the_same(pair):
    expected = of(pair, "not_dealt")[0]
    for name in ("dealt_out", "dealt_out_resumed"):
        for found in of(pair, name):
            assert found == expected, name


def test_all_processes_run_again_where_one_exceeds_the_budget(pair):
    first, second = of(pair, "collapse_over_budget_of_one")
    assert first == second


fsdp2 = pytest.mark.skipif(not ddp_cases.FSDP2_ON_CPU, reason="this torch has no FSDP2 on a CPU")


@fsdp2
def test_under_fsdp2_each_process_steps_its_own_classes_and_together_they_are_ddp(pair):
    first, second = of(pair, "fsdp2")
    assert first == second == pytest.approx(of(pair, "grassmann_built")[0], rel=1e-5, abs=1e-6)


@fsdp2
def test_a_head_put_in_before_the_user_shards_is_sharded_and_stays_on_the_manifold(pair):
    first, second = of(pair, "fsdp2_swap")
    assert first == second
    assert first[0] < 1e-5


@fsdp2
def test_a_sharded_run_resumes_where_it_was(pair):
    assert of(pair, "fsdp2_resume")[0] == pytest.approx(of(pair, "fsdp2")[0], rel=1e-5, abs=1e-6)


@fsdp2
def test_parameters_of_a_callback_under_fsdp2_are_trained_and_clipped_as_under_ddp(pair):
    first, second = of(pair, "fsdp2_own")
    assert first == second == pytest.approx(of(pair, "own")[0], rel=1e-5, abs=1e-6)


@fsdp2
def test_parameters_of_a_callback_resume_under_fsdp2(pair):
    assert of(pair, "fsdp2_own_resume")[0] == pytest.approx(of(pair, "fsdp2_own")[0], rel=1e-5, abs=1e-6)
