from dataclasses import astuple

import pytest

from tests.conformance import pair as cells_of_a_pair
from tests.conformance import table
from tests.conformance.cells import Outcome
from tests.pairs import run_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """What two processes found, started once for all their cells."""
    return run_pair(cells_of_a_pair, tmp_path_factory.mktemp("pair"), patience=280)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """What a worker of pytest-xdist found, when it has ended."""
    for condition, name, *outcome in getattr(node, "workeroutput", {}).get("cells", []):
        table.FOUND[condition, name] = Outcome(*outcome)


def pytest_sessionfinish(session):
    if not table.WRITING:
        return
    if hasattr(session.config, "workeroutput"):  # one of several workers: the controller writes
        session.config.workeroutput["cells"] = [(*cell, *astuple(outcome)) for cell, outcome in table.FOUND.items()]
        return
    gaps = table.missing()
    if session.testsfailed or gaps:
        print(f"\n{table.FILE} is not written: {session.testsfailed} tests failed, {len(gaps)} cells are missing.")
        print("\n".join(gaps[:20]))
    else:
        table.FILE.write_text(table.render(table.FOUND))
