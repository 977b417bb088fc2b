import logging

import pytest
import torch
from torch.utils.data import DataLoader

# For several workers, see below: tests that share nothing but what is in their brackets, and are most of the work; and
# files that share a process.
APART = (
    "tests/conformance/test_matrix.py::test_cell[",
    "tests/conformance/test_matrix.py::test_cell_of_a_module",
    "tests/conformance/test_written.py",
    "tests/fuzz/",
)
TOGETHER = ("tests/faults/",)


@pytest.fixture(autouse=True)
def _one_thread_and_no_chatter():
    torch.set_num_threads(1)  # tiny networks: threads only wait for one another
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _loaders_as_they_were():
    """An error in a loader hook leaves Lightning's patch on ``DataLoader``, which would change the tests after it."""
    methods = {name: getattr(DataLoader, name) for name in ("__init__", "__setattr__", "__delattr__")}
    yield
    for name, method in methods.items():
        if getattr(DataLoader, name) is not method:
            setattr(DataLoader, name, method)
            delattr(DataLoader, f"__old{name}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Who deals the tests out to several workers: file by file, as the tests of a file share what they prepare."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            if nodeid.startswith(APART):
                return f"{file}[{test.partition('[')[2]}"
            return next((folder for folder in TOGETHER if file.startswith(folder)), file)

    return Scheduling(config, log)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
