import pytest

from tests.faults.stage import Stage


@pytest.fixture(scope="session")
def stage():
    stage = Stage()
    yield stage
    stage.close()
