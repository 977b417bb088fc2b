"""A process that is killed, in any phase, resumes from its checkpoint as if nothing had happened."""

from pathlib import Path

import pytest
import torch

from tests.faults.runs import series
from tests.faults.stage import KILLED
from tests.helpers import equal

slow = pytest.mark.slow


@pytest.fixture(scope="session")
def undisturbed(stage, tmp_path_factory):
    """The folder of an undisturbed run with the same options, made once."""
    folders = {}

    def of(**options):
        key = tuple(sorted(options.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("undisturbed")
            run(stage, folders[key], **options)
        return folders[key]

    return of


def run(stage, folder, expected=0, **options):
    error = folder / "error.txt"
    error.unlink(missing_ok=True)
    status = stage.run("fit", folder, **options)
    assert status == expected, error.read_text() if error.exists() else status


def killed_and_resumed(stage, folder, place, **options):
    run(stage, folder, expected=KILLED, place=place, **options)
    assert not (folder / "weights.pt").exists()
    run(stage, folder, resume=True, **options)


def final(folder):
    return torch.load(folder / "weights.pt", weights_only=True)


def assert_as_undisturbed(folder, reference):
    assert equal(final(folder), final(reference))
    values, expected = series(folder), series(reference)
    assert set(values) == set(expected)
    for place, logged in values.items():  # what the killed run had logged beyond its checkpoint was right already
        assert set(logged) == set(expected[place]), place
    table = Path("series", "version_0", "neural_collapse.csv")  # the folder of the run, as its logger names it
    assert (folder / table).read_text() == (reference / table).read_text()


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("pillars", "mid-epoch"),
        ("pillars", "validation"),
        pytest.param("pillars", "pass of a monitor", marks=slow),
        pytest.param("plan", "mid-epoch", marks=slow),
        pytest.param("plan", "validation", marks=slow),
        pytest.param("upsampler", "mid-epoch", marks=slow),
        ("upsampler", "pass of the selection"),
        pytest.param("upsampler", "restart", marks=slow),
        ("upsampler", "first batch after the restart"),
        pytest.param("upsampler", "mid-epoch, after the restart", marks=slow),
        pytest.param("pillars", "after the last epoch", marks=slow),
    ],
)
def test_from_the_end_of_an_epoch_weights_and_all_series_are_those_of_the_undisturbed_run(
    stage, undisturbed, tmp_path, kind, place
):
    killed_and_resumed(stage, tmp_path, place, kind=kind)
    assert_as_undisturbed(tmp_path, undisturbed(kind=kind))


@pytest.mark.parametrize("place", ["writing a checkpoint", pytest.param("moving a checkpoint", marks=slow)])
def test_a_checkpoint_that_was_being_written_is_not_the_only_one(stage, undisturbed, tmp_path, place):
    """What Lightning does: it writes a temporary file elsewhere, moves it into its place, and removes the old one
    last. The move is one step within a file system; between two it is a copy, and a kill leaves half a file under
    the new name, which ``torch.load`` refuses. With a new name for each (not ``save_last``, which overwrites) the old
    one is still there.
    """
    run(stage, tmp_path, expected=KILLED, place=place, keep=1)
    saved = sorted((tmp_path / "saved").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    if place == "moving a checkpoint":
        torn = saved.pop()
        with pytest.raises(Exception, match=r"central directory|Invalid argument"):
            torch.load(torn, weights_only=True)
        torn.unlink()  # as the user would
    (old,) = saved
    assert torch.load(old, weights_only=True)["epoch"] == 0
    run(stage, tmp_path, resume=True, keep=1)
    assert_as_undisturbed(tmp_path, undisturbed(kind="pillars"))


@pytest.mark.parametrize("kind", ["plan", pytest.param("upsampler", marks=slow)])
def test_in_mid_epoch_a_plan_goes_on_with_what_had_not_been_seen(stage, undisturbed, tmp_path, kind):
    killed_and_resumed(stage, tmp_path, "mid-epoch, later", kind=kind, every_n_batches=5)
    reference = undisturbed(kind=kind)
    assert equal(final(tmp_path), final(reference))
    values, expected = series(tmp_path), series(reference)
    # Of the epoch that was interrupted: the batch losses; all else is a sum over it.
    for place, logged in expected.items():
        interrupted = 6 <= place[1] < 12 and place[0] != "train/loss_step" and kind == "plan"
        if not interrupted and kind == "plan":
            assert set(values[place]) == set(logged), place


@pytest.mark.parametrize("by_epoch", [False, pytest.param(True, marks=slow)])
def test_in_mid_epoch_an_ordinary_loader_does_what_it_does_without_us(stage, tmp_path, by_epoch):
    options = {"by_epoch": by_epoch, "every_n_batches": 5}
    ours, bare = tmp_path / "ours", tmp_path / "bare"
    killed_and_resumed(stage, ours, "mid-epoch, later", kind="monitors", **options)
    killed_and_resumed(stage, bare, "mid-epoch, later", kind="bare", **options)
    assert equal(final(ours), final(bare))
    values = series(ours)
    assert all(values[place] == logged for place, logged in series(bare).items())
