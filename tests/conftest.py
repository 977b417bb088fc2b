import logging

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_no_chatter():
    torch.set_num_threads(1)  # tiny networks: threads only wait for one another
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
