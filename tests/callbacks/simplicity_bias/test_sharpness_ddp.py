"""Two processes look for one worst point, or each for its own."""

import pytest

from tests.callbacks.simplicity_bias import sharpness_ddp_cases as cases
from tests.pairs import run_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    results = run_pair(cases, tmp_path_factory.mktemp("pair"))
    for name, result in results[0].items():
        assert not isinstance(result, str), (name, result)
    return results


def test_jointly_they_do_what_one_does_with_the_batch_of_both(pair):
    weights, rise = cases.joint(1)
    for results in pair:
        assert results["joint"][0] == pytest.approx(weights, rel=1e-5, abs=1e-6)
        assert results["joint"][1] == pytest.approx(rise, rel=1e-4)
    assert pair[0]["joint"] == pair[1]["joint"]


def test_each_by_itself_takes_the_worst_point_of_its_own_share(pair):
    weights, _ = cases.per_process(1)
    for results in pair:
        assert results["per_process"][0] == pytest.approx(weights, rel=1e-5, abs=1e-6)
    assert pair[0]["per_process"] == pair[1]["per_process"]
    assert pair[0]["per_process"][0] != pytest.approx(pair[0]["joint"][0], rel=1e-3)
