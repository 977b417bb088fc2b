import pytest

from tests.conformance import table
from tests.conformance.pair import run_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """What two processes found, started once for all their cells."""
    return run_pair(tmp_path_factory.mktemp("pair"))


def pytest_sessionfinish(session):
    if not table.WRITING:
        return
    gaps = table.missing()
    if session.testsfailed or gaps:
        print(f"\n{table.FILE} is not written: {session.testsfailed} tests failed, {len(gaps)} cells are missing.")
        print("\n".join(gaps[:20]))
    else:
        table.FILE.write_text(table.render(table.FOUND))
