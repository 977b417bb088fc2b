"""Two processes measure on the averaged weights what one measures on them."""

import pytest

from tests.helpers import EMAWeightAveraging
from tests.joints.run import averaged_ddp_cases as cases
from tests.pairs import run_pair

if EMAWeightAveraging is None:
    pytest.skip("this Lightning has no EMAWeightAveraging", allow_module_level=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    results = run_pair(cases, tmp_path_factory.mktemp("pair"))
    for name, result in results[0].items():
        assert not isinstance(result, str), (name, result)
    return results


@pytest.mark.parametrize("name", [case.__name__ for case in cases.CASES])
def test_two_processes_find_what_one_finds(pair, name):
    expected = getattr(cases, name)(1)
    assert expected
    for results in pair:
        # float32 logits of batches of another size, and an iteration that ends at another product
        assert results[name] == pytest.approx(expected, rel=1e-3, abs=1e-5, nan_ok=True)


def test_the_averaged_weights_are_not_the_current_ones(pair):
    name = "neural_collapse/nc1_quotient/penultimate"
    assert pair[0]["collapse"][name] != pytest.approx(pair[0]["current"][name], rel=5e-3)
