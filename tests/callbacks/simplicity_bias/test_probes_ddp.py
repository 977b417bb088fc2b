"""Two processes measure what one measures."""

import pytest

from tests.callbacks.simplicity_bias import probes_ddp_cases as cases
from tests.pairs import run_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    results = run_pair(cases, tmp_path_factory.mktemp("pair"))
    for name, result in results[0].items():
        assert not isinstance(result, str), (name, result)
    return results


@pytest.mark.parametrize(
    "name",
    [
        "clones",
        "clones_of_few",
        "reliance",
        "reliance_of_two_classes",
        "reliance_of_few",
        "sharpness",
        "sharpness_of_few",
        "forgetting",
    ],
)
def test_two_processes_find_what_one_finds(pair, name):
    expected = getattr(cases, name)(1)
    assert expected
    for results in pair:
        # float32 logits of batches of another size, and an iteration that ends at another product
        assert results[name] == pytest.approx(expected, rel=2e-4, abs=1e-6, nan_ok=True)
