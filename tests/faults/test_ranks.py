"""When one of two processes dies or falls silent, no collective of ours keeps the other beyond the timeout."""

import socket

import pytest

SECONDS = 6.0  # of the process group; starting on a busy machine must fit into it too
SLACK = 15.0  # the other process has to come to its collective, and to leave


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("fault", "place"),
    [
        ("dies", "mid-epoch"),
        ("dies", "selection"),
        ("dies", "compute of a monitor"),
        pytest.param("dies", "exact pass", marks=pytest.mark.slow),
        ("sleeps", "selection"),
        pytest.param("sleeps", "mid-epoch", marks=pytest.mark.slow),
        pytest.param("sleeps", "compute of a monitor", marks=pytest.mark.slow),
        pytest.param("sleeps", "exact pass", marks=pytest.mark.slow),
    ],
)
def test_the_other_process_ends_with_an_error_in_time(stage, tmp_path, fault, place):
    port = free_port()
    runs = [
        {"function": "pair_member", "folder": str(tmp_path), "rank": rank, "port": port}
        | {"seconds": SECONDS, "place": place, "fault": fault}
        for rank in range(2)
    ]
    guilty = 0 if place == "selection" else 1
    ended = stage.together(*runs, first=1 - guilty)
    assert (tmp_path / "failed").exists(), (tmp_path / "error.txt").read_text()
    assert ended[1 - guilty][0] == 1, ended  # with an error, and by itself
    waited = float((tmp_path / "noticed").read_text()) - float((tmp_path / "failed").read_text())
    # Death closes the connection, which is noticed at once; silence is noticed by the timeout.
    assert waited < (SECONDS if fault == "sleeps" else 0.0) + SLACK
    message = (tmp_path / "error.txt").read_text()
    assert any(word in message for word in ("closed", "reset", "Timed out", "timed out", "Broken pipe")), message
