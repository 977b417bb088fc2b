"""Two processes do together what one does alone."""

import pytest

from tests.callbacks.spectrum import monitor_ddp_cases as cases
from tests.pairs import run_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The results of the cases on two processes."""
    return run_pair(cases, tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("name", ["an_odd_number_of_samples", "one_process_without_samples"])
def test_two_processes_log_what_one_does(pair, name):
    assert not isinstance(pair[0][name], str), pair[0][name]
    alone = getattr(cases, name)(1)
    assert len(alone) == 8
    for process in pair:
        # Logged in float32, from batches of another size.
        assert process[name] == pytest.approx(alone, rel=1e-5, abs=1e-6, nan_ok=True)
