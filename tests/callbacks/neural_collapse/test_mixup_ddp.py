"""Two processes do together what one does alone."""

import pytest

from tests.callbacks.neural_collapse import mixup_ddp_cases as cases
from tests.pairs import run_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The results of the case on two processes."""
    return run_pair(cases, tmp_path_factory.mktemp("pair"))


def test_two_processes_log_what_one_does(pair):
    assert not isinstance(pair[0]["measures"], str), pair[0]["measures"]
    assert pair[0] == pair[1]
    alone = cases.measures(1)
    for name in ("plane_residual", "slope", "calibration_error"):
        key = f"mixup_geometry/{name}/penultimate"
        # Logged in float32, from batches of another size.
        assert pair[0]["measures"][key] == pytest.approx(alone[key], rel=1e-5, abs=1e-6), name
